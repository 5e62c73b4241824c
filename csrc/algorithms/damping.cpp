#include "algorithms/damping.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

#include "algorithms/dispatch.h"

namespace miniquant::algorithms {
namespace {

/// Rows and columns per tile of the passes below. A tile of the other triangle is first copied next to each other:
/// rows a power of two apart would evict one another from the cache while they are read column by column.
constexpr int64_t kTile = 64;

/// body(row_begin, column_begin) for the tiles of the lower triangle, in parallel over rows of tiles.
template <typename Body>
void for_lower_tiles(int64_t columns, const Body& body) {
  for_triangle((columns + kTile - 1) / kTile, [&](int64_t tile) {
    for (int64_t j_begin = 0; j_begin <= tile * kTile; j_begin += kTile) {
      body(tile * kTile, j_begin);
    }
  });
}

/// A tile of H^T: at(i, j) = H[column[j], column[i]] for i, j counted from the tile's begin.
template <typename T>
class TransposedTile {
 public:
  TransposedTile(const T* h, int64_t columns, const int64_t* column, int64_t i_begin, int64_t j_begin)
      : rows_(std::min(kTile, columns - i_begin)), columns_(std::min(kTile, columns - j_begin)) {
    for (int64_t j = 0; j < columns_; ++j) {
      const T* const row = h + column[j_begin + j] * columns;
      for (int64_t i = 0; i < rows_; ++i) {
        values_[j * kTile + i] = row[column[i_begin + i]];
      }
    }
  }

  [[nodiscard]] int64_t rows() const { return rows_; }
  [[nodiscard]] int64_t columns() const { return columns_; }
  [[nodiscard]] T at(int64_t i, int64_t j) const { return values_[j * kTile + i]; }

 private:
  int64_t rows_;
  int64_t columns_;
  std::array<T, kTile * kTile> values_;
};

}  // namespace

double added_to_diagonal(const at::Tensor& hessian, double ridge) {
  return hessian.size(0) == 0 ? 0.0 : ridge * hessian.diagonal().to(at::kDouble).mean().item<double>();
}

at::Tensor damped_lower_triangle(const at::Tensor& hessian, double added, const at::Tensor& column) {
  const int64_t columns = hessian.size(0);
  const at::Tensor h = hessian.contiguous();
  const at::Tensor lower = at::empty({columns, columns}, h.options().dtype(at::kDouble));
  double* const out = lower.mutable_data_ptr<double>();
  const int64_t* const order = column.const_data_ptr<int64_t>();
  dispatch_compute(h.scalar_type(), [&]<typename T> {
    const T* const values = h.const_data_ptr<T>();
    for_lower_tiles(columns, [&](int64_t i_begin, int64_t j_begin) {
      const TransposedTile<T> transposed(values, columns, order, i_begin, j_begin);
      for (int64_t i = 0; i < transposed.rows(); ++i) {
        const T* const row = values + order[i_begin + i] * columns;
        double* const to = out + (i_begin + i) * columns + j_begin;
        for (int64_t j = 0; j < transposed.columns(); ++j) {
          to[j] = (static_cast<double>(row[order[j_begin + j]]) + static_cast<double>(transposed.at(i, j))) / 2;
        }
      }
    });
  });
  for (int64_t i = 0; i < columns; ++i) {
    double& entry = out[i * columns + i];
    entry += added;
    entry = entry == 0.0 ? 1.0 : entry;
  }
  return lower;
}

double largest_asymmetry(const at::Tensor& hessian) {
  const int64_t columns = hessian.size(0);
  if (columns == 0) {
    return 0.0;
  }
  if (!hessian.is_cpu()) {
    return (hessian - hessian.mT()).abs().max().item<double>();
  }
  const at::Tensor h = hessian.contiguous();
  const at::Tensor column = at::arange(columns, h.options().dtype(at::kLong));
  const int64_t* const order = column.const_data_ptr<int64_t>();
  std::vector<double> of_row(columns, 0.0);
  dispatch_compute(h.scalar_type(), [&]<typename T> {
    const T* const values = h.const_data_ptr<T>();
    for_lower_tiles(columns, [&](int64_t i_begin, int64_t j_begin) {
      const TransposedTile<T> transposed(values, columns, order, i_begin, j_begin);
      for (int64_t i = 0; i < transposed.rows(); ++i) {
        const T* const row = values + (i_begin + i) * columns + j_begin;
        T largest = 0;
        for (int64_t j = 0; j < transposed.columns(); ++j) {
          largest = std::max(largest, std::abs(row[j] - transposed.at(i, j)));
        }
        of_row[i_begin + i] = std::max(of_row[i_begin + i], static_cast<double>(largest));
      }
    });
  });
  return *std::ranges::max_element(of_row);
}

DampedHessian damp(const at::Tensor& hessian, double ridge, at::ScalarType dtype) {
  const at::Tensor h = hessian.to(dtype);
  at::Tensor matrix = (h + h.mT()) / 2;
  const double added = added_to_diagonal(h, ridge);
  matrix.diagonal().add_(added);
  return {matrix, ridge, added};
}

at::Tensor with_dead_inputs_decoupled(const at::Tensor& matrix) {
  at::Tensor decoupled = matrix.clone();
  at::Tensor diagonal = decoupled.diagonal();
  diagonal.copy_(at::where(diagonal == 0, at::ones_like(diagonal), diagonal));
  return decoupled;
}

void throw_not_positive_definite(const char* op, const DampedHessian& damped) {
  const at::Tensor matrix = with_dead_inputs_decoupled(damped.matrix.to(at::kDouble));
  const auto leading_minor = std::get<1>(at::linalg_cholesky_ex(matrix)).item<int64_t>();
  const std::string minor = leading_minor > 0
                                ? "the leading minor of order " + std::to_string(leading_minor) + " is not"
                                : "it is not to working precision (all leading minors are positive in float64)";
  const double next_ridge = std::max(0.1, damped.ridge * 10);
  TORCH_CHECK_LINALG(false, op, ": expected hessian to be positive definite with ridge=", damped.ridge, " (",
                     damped.added, " added to its diagonal), but ", minor, "; try ridge=", next_ridge);
}

}  // namespace miniquant::algorithms
