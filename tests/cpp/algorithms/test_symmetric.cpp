#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/randperm.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "algorithms/symmetric.h"
#include "algorithms/triangle_testing.h"
#include "kernels/triangle.h"
#include "tensor_testing.h"

namespace miniquant::algorithms {
namespace {

// none; one; a panel of 48 less one, itself and plus one; several, the last partly filled
constexpr int64_t kSizes[] = {0, 1, 47, 48, 49, 200};

TEST(Symmetric, LowerTriangleIsThatOfTheAverageInTheOrderAskedFor) {
  for (const int64_t columns : kSizes) {
    for (const at::ScalarType from : {at::kFloat, at::kDouble}) {
      for (const at::ScalarType dtype : {at::kFloat, at::kDouble}) {
        const at::Tensor hessian =
            (testing::hessian_of_inputs(columns, columns, 1) + at::arange(columns, at::kDouble) * 1e-3).to(from);
        const at::Tensor wide = hessian.to(dtype);
        const at::Tensor average = (wide + wide.mT()) / 2;
        const at::Tensor column = at::randperm(columns, at::kLong);
        EXPECT_TRUE(at::equal(testing::dense_triangle(lower_triangle(hessian, 1.0, dtype), columns), average.tril()))
            << columns << ", " << from << " to " << dtype;
        EXPECT_TRUE(at::equal(testing::dense_triangle(lower_triangle(hessian, 1.0, dtype, column), columns),
                              average.index_select(0, column).index_select(1, column).tril()))
            << columns << ", " << from << " to " << dtype << ", permuted";
      }
    }
  }
}

TEST(Symmetric, PanelsHoldAllOfTheAverage) {
  for (const int64_t columns : kSizes) {
    for (const at::ScalarType from : {at::kFloat, at::kDouble}) {
      const at::Tensor hessian =
          (testing::hessian_of_inputs(columns, columns, 1) + at::arange(columns, at::kDouble) * 1e-3).to(from);
      const at::Tensor wide = hessian.to(at::kDouble);
      at::Tensor expected = (wide + wide.mT()) / 2;
      expected.mul_(0.25).diagonal().add_(0.5);
      const kernels::SymmetricLayout layout{columns};
      at::Tensor panels = symmetric_panels(hessian, 0.25, at::kDouble);
      add_to_diagonal_of_panels(panels, columns, 0.5);
      const int64_t in_panels = layout.offset(0, layout.panels());
      EXPECT_EQ(panels.numel(), layout.size());
      EXPECT_FALSE(panels.slice(0, in_panels).any().item<bool>()) << columns;
      const at::Tensor padded = panels.slice(0, 0, in_panels)
                                    .view({layout.panels(), columns, kernels::kPanelColumns})
                                    .transpose(0, 1)
                                    .reshape({columns, layout.padded_columns()});
      EXPECT_TRUE(at::equal(padded.narrow(1, 0, columns), expected)) << columns << ", " << from;
      EXPECT_FALSE(padded.narrow(1, columns, padded.size(1) - columns).any().item<bool>()) << columns;
    }
  }
}

// float64 entries that fit float32 only after the multiplication by a power of two.
TEST(Symmetric, LowerTriangleIsMultipliedBeforeItIsCast) {
  const at::Tensor hessian = testing::hessian_of_inputs(50, 80, 1);
  for (const int exponent : {-400, 400}) {
    const double factor = std::ldexp(1.0, -exponent);
    const at::Tensor column = at::randperm(50, at::kLong);
    for (const at::Tensor& order : {at::Tensor(), column}) {
      const at::Tensor large = lower_triangle(hessian * std::ldexp(1.0, exponent), factor, at::kFloat, order);
      EXPECT_TRUE(at::equal(testing::dense_triangle(large, 50),
                            testing::dense_triangle(lower_triangle(hessian, 1.0, at::kFloat, order), 50)))
          << exponent;
    }
  }
}

TEST(Symmetric, LowerTriangleTakesAnyStrides) {
  const at::Tensor hessian = testing::hessian_of_inputs(70, 90, 1);
  const at::Tensor strided = at::zeros({70, 140}, hessian.options()).slice(1, 0, 140, 2).copy_(hessian);
  EXPECT_TRUE(at::equal(testing::dense_triangle(lower_triangle(strided, 1.0, at::kDouble), 70),
                        testing::dense_triangle(lower_triangle(hessian, 1.0, at::kDouble), 70)));
}

TEST(Symmetric, DiagonalIsReadAndSet) {
  for (const int64_t columns : kSizes) {
    const at::Tensor inputs = testing::hessian_of_inputs(columns, columns, 1);
    const at::Tensor hessian = inputs + inputs.mT();
    const at::Tensor triangle = lower_triangle(hessian, 1.0, at::kDouble);
    EXPECT_TRUE(at::equal(diagonal_of_triangle(triangle, columns), hessian.diagonal())) << columns;
    const at::Tensor diagonal = at::arange(columns, at::kDouble);
    set_diagonal_of_triangle(triangle, diagonal);
    at::Tensor expected = hessian.tril();
    expected.diagonal().copy_(diagonal);
    EXPECT_TRUE(at::equal(testing::dense_triangle(triangle, columns), expected)) << columns;
  }
}

TEST(Symmetric, SurveyFindsTheLargestEntryAndAsymmetryWhereverTheyAre) {
  for (const int64_t columns : {2, 48, 49, 200}) {
    const at::Tensor hessian = testing::hessian_of_inputs(columns, columns, 1);
    const at::Tensor symmetric = hessian + hessian.mT();
    EXPECT_EQ(survey_symmetry(symmetric).largest_asymmetry, 0.0);
    for (const auto& [i, j] : std::vector<std::pair<int64_t, int64_t>>{
             {0, 1}, {columns - 1, 0}, {0, columns - 1}, {columns - 1, columns - 2}}) {
      at::Tensor asymmetric = symmetric.clone();
      asymmetric[i][j] -= 1e4;
      const SymmetrySurvey survey = survey_symmetry(asymmetric);
      EXPECT_TRUE(survey.finite);
      EXPECT_EQ(survey.largest, asymmetric.abs().max().item<double>());
      EXPECT_EQ(survey.largest_asymmetry, (asymmetric - asymmetric.mT()).abs().max().item<double>());
    }
  }
}

TEST(Symmetric, SurveyFindsWhatIsNotFinite) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  constexpr int64_t kColumns = 100;
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble}) {
    const at::Tensor hessian = testing::hessian_of_inputs(kColumns, kColumns, 1).to(dtype);
    for (const double value : {kInfinity, -kInfinity, std::numeric_limits<double>::quiet_NaN()}) {
      for (const auto& [i, j] : std::vector<std::pair<int64_t, int64_t>>{{0, 0}, {99, 0}, {0, 99}, {98, 99}}) {
        at::Tensor bad = hessian.clone();
        bad[i][j] = value;
        EXPECT_FALSE(survey_symmetry(bad).finite) << value << " at " << i << ", " << j;
      }
    }
  }
}

TEST(Symmetric, SurveyAcceptsAnEmptyMatrix) {
  const SymmetrySurvey survey = survey_symmetry(at::zeros({0, 0}));
  EXPECT_TRUE(survey.finite);
  EXPECT_EQ(survey.largest, 0.0);
  EXPECT_EQ(survey.largest_asymmetry, 0.0);
}

}  // namespace
}  // namespace miniquant::algorithms
