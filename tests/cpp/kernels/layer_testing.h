#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "kernels/kernel_testing.h"

// A quantized layer, for the kernels that lower its loss.

namespace miniquant::kernels::testing {

inline std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

/// A weight and its Hessian.
template <typename T>
struct Layer {
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t group_size;
  std::vector<T> weight;
  std::vector<T> hessian;  // [K, K]

  [[nodiscard]] std::int64_t groups() const { return (columns + group_size - 1) / group_size; }
};

/// The error of a layer.
template <typename T>
struct Quantized {
  std::vector<std::int8_t> codes;
  std::vector<T> scales;
  std::vector<T> row_loss;
};

template <typename T>
Layer<T> make_layer(std::mt19937_64& generator, std::int64_t rows, std::int64_t columns, std::int64_t group_size) {
  Layer<T> layer{rows, columns, group_size, normal<T>(generator, rows * columns), {}};
  const std::int64_t tokens = 2 * columns;
  const std::vector<double> inputs = normal<double>(generator, tokens * columns);
  layer.hessian.resize(at(columns * columns));
  for (std::int64_t i = 0; i < columns; ++i) {
    for (std::int64_t j = 0; j <= i; ++j) {
      double sum = 0;
      for (std::int64_t t = 0; t < tokens; ++t) {
        sum += inputs[at(t * columns + i)] * inputs[at(t * columns + j)];
      }
      layer.hessian[at(i * columns + j)] = static_cast<T>(sum / static_cast<double>(tokens));
      layer.hessian[at(j * columns + i)] = layer.hessian[at(i * columns + j)];
    }
  }
  return layer;
}

/// e H e^T of a row.
template <typename T>
Wide<T> loss_of(const Layer<T>& layer, const std::vector<std::int8_t>& codes, const std::vector<T>& scales,
                std::int64_t row) {
  std::vector<Wide<T>> error(at(layer.columns));
  for (std::int64_t j = 0; j < layer.columns; ++j) {
    const Wide<T> scale = scales[at(row * layer.groups() + j / layer.group_size)];
    error[at(j)] = layer.weight[at(row * layer.columns + j)] - codes[at(row * layer.columns + j)] * scale;
  }
  Wide<T> loss = 0;
  for (std::int64_t i = 0; i < layer.columns; ++i) {
    for (std::int64_t j = 0; j < layer.columns; ++j) {
      loss += error[at(i)] * static_cast<Wide<T>>(layer.hessian[at(i * layer.columns + j)]) * error[at(j)];
    }
  }
  return loss;
}

/// E H of one row.
template <typename T>
std::vector<Wide<T>> gradient_of(const Layer<T>& layer, const Quantized<T>& quantized, std::int64_t row) {
  std::vector<Wide<T>> gradient(at(layer.columns), 0);
  for (std::int64_t i = 0; i < layer.columns; ++i) {
    const Wide<T> scale = quantized.scales[at(row * layer.groups() + i / layer.group_size)];
    const Wide<T> error =
        layer.weight[at(row * layer.columns + i)] - quantized.codes[at(row * layer.columns + i)] * scale;
    for (std::int64_t j = 0; j < layer.columns; ++j) {
      gradient[at(j)] += error * static_cast<Wide<T>>(layer.hessian[at(i * layer.columns + j)]);
    }
  }
  return gradient;
}

/// E H of all rows, in the kernels' layout.
template <typename T>
std::vector<T> padded_gradient_of(const Layer<T>& layer, const Quantized<T>& quantized) {
  const std::int64_t padded = SymmetricLayout{layer.columns}.padded_columns();
  std::vector<T> all(at(layer.rows * padded), T(0));
  for (std::int64_t row = 0; row < layer.rows; ++row) {
    const std::vector<Wide<T>> gradient = gradient_of(layer, quantized, row);
    for (std::int64_t j = 0; j < layer.columns; ++j) {
      all[at(row * padded + j)] = static_cast<T>(gradient[at(j)]);
    }
  }
  return all;
}

/// The Hessian, in the kernels' layout.
template <typename T>
std::vector<T> symmetric_panels_of(const Layer<T>& layer) {
  const SymmetricLayout layout{layer.columns};
  std::vector<T> panels(at(layout.size()), T(0));
  for (std::int64_t i = 0; i < layer.columns; ++i) {
    for (std::int64_t j = 0; j < layer.columns; ++j) {
      panels[at(layout.offset(i, j / kPanelColumns) + j % kPanelColumns)] = layer.hessian[at(i * layer.columns + j)];
    }
  }
  return panels;
}

}  // namespace miniquant::kernels::testing
