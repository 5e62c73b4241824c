#include "ops/checks.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/isfinite.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include "algorithms/damping.h"
#include "algorithms/finite.h"
#include "algorithms/grid.h"
#include "algorithms/packing.h"
#include "algorithms/superblocks.h"
#include "algorithms/symmetric.h"
#include "ops/names.h"

namespace miniquant::ops {
namespace {

/// The position of the first element for which `bad` is true, as "[i, j]".
std::string first_position(const at::Tensor& bad) {
  const at::Tensor position = bad.nonzero().select(0, 0).cpu();
  std::string text = "[";
  for (int64_t i = 0; i < position.numel(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(position[i].item<int64_t>());
  }
  return text + "]";
}

}  // namespace

std::string name_of(at::ScalarType dtype) { return std::string(c10::getDtypeNames(dtype).first); }

std::string first_value(const at::Tensor& tensor, const at::Tensor& bad) {
  return c10::str(tensor.masked_select(bad)[0].item<double>(), " at ", first_position(bad));
}

void check_finite(const char* op, const char* argument, const at::Tensor& tensor) {
  if (!algorithms::all_finite(tensor)) {
    TORCH_CHECK_VALUE(false, op, ": expected ", argument, " to be finite, but got ",
                      first_value(tensor, at::isfinite(tensor).logical_not()));
  }
}

namespace {

constexpr const char* kWeightDtypes = "float32, float64, bfloat16 or float16";
constexpr const char* kHessianDtypes = "float32 or float64";

bool is_weight_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf;
}

bool is_hessian_dtype(at::ScalarType dtype) { return dtype == at::kFloat || dtype == at::kDouble; }

/// The kind of a tensor whose elements do not lie in memory as sizes and strides say; "" for any other tensor.
std::string special_layout_of(const at::Tensor& tensor) {
  if (tensor.unsafeGetTensorImpl()->is_nested()) {
    return "a nested tensor";
  }
  return tensor.layout() == at::kStrided ? "" : c10::str("a tensor of layout ", tensor.layout());
}

void check_strided(const char* op, const char* argument, const at::Tensor& tensor) {
  const std::string layout = special_layout_of(tensor);
  TORCH_CHECK_VALUE(layout.empty(), op, ": expected ", argument, " to be a dense tensor of layout Strided, but got ",
                    layout);
}

void check_matrix(const char* op, const char* argument, const char* shape, const at::Tensor& tensor) {
  check_strided(op, argument, tensor);
  TORCH_CHECK_VALUE(tensor.dim() == 2, op, ": expected ", argument, " to be a matrix ", shape, ", but got shape ",
                    tensor.sym_sizes());
}

void check_same_device(const char* op, const char* argument, const at::Tensor& tensor, const char* other,
                       const at::Tensor& reference) {
  TORCH_CHECK_VALUE(tensor.device() == reference.device(), op, ": expected ", argument, " to be on the device of ",
                    other, " (", reference.device(), "), but got ", tensor.device());
}

void check_weight(const char* op, const at::Tensor& weight) {
  check_matrix(op, "weight", "[N, K]", weight);
  TORCH_CHECK_TYPE(is_weight_dtype(weight.scalar_type()), op, ": expected weight to be ", kWeightDtypes, ", but got ",
                   name_of(weight.scalar_type()));
}

void check_hessian(const char* op, const at::Tensor& hessian, const char* argument = "hessian") {
  check_matrix(op, argument, "[K, K]", hessian);
  TORCH_CHECK_VALUE(hessian.sym_size(0) == hessian.sym_size(1), op, ": expected ", argument,
                    " to be square, but got shape ", hessian.sym_sizes());
  TORCH_CHECK_TYPE(is_hessian_dtype(hessian.scalar_type()), op, ": expected ", argument, " to be ", kHessianDtypes,
                   ", but got ", name_of(hessian.scalar_type()));
}

void check_hessian_of(const char* op, const at::Tensor& weight, const at::Tensor& hessian,
                      const char* argument = "hessian") {
  check_hessian(op, hessian, argument);
  TORCH_CHECK_VALUE(hessian.sym_size(0) == weight.sym_size(1), op, ": expected ", argument, " to have shape [K, K] = [",
                    weight.sym_size(1), ", ", weight.sym_size(1), "] for a weight of shape ", weight.sym_sizes(),
                    ", but got shape ", hessian.sym_sizes());
  check_same_device(op, argument, hessian, "weight", weight);
}

void check_bits(const char* op, int64_t bits) {
  TORCH_CHECK_VALUE(bits >= 2 && bits <= 8, op, ": expected bits to be 2 to 8, but got ", bits);
}

void check_group_size(const char* op, int64_t group_size) {
  TORCH_CHECK_VALUE(group_size == -1 || group_size >= 1, op,
                    ": expected group_size to be positive, or -1 for one group per row, but got ", group_size);
}

void check_per_group(const char* op, const char* argument, const at::Tensor& tensor, const at::Tensor& weight,
                     int64_t group_size) {
  check_strided(op, argument, tensor);
  const c10::SymInt groups = groups_per_row(group_size, weight.sym_size(1));
  TORCH_CHECK_VALUE(tensor.dim() == 2 && tensor.sym_size(0) == weight.sym_size(0) && tensor.sym_size(1) == groups, op,
                    ": expected ", argument, " to have shape [N, groups] = [", weight.sym_size(0), ", ", groups,
                    "], but got shape ", tensor.sym_sizes());
}

void check_zero_point_dtype(const char* op, const at::Tensor& zero_points) {
  TORCH_CHECK_TYPE(zero_points.scalar_type() == at::kChar, op, ": expected zero_points to be int8, but got ",
                   name_of(zero_points.scalar_type()));
}

/// Checks scale_dtype, and returns the dtype in which scales are stored.
at::ScalarType check_scale_dtype(const char* op, const at::Tensor& weight, std::optional<at::ScalarType> scale_dtype) {
  const at::ScalarType dtype = scale_dtype.value_or(weight.scalar_type());
  const bool is_double = weight.scalar_type() == at::kDouble;
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || (dtype == at::kDouble && is_double), op,
      ": expected scale_dtype to be float32, bfloat16", is_double ? ", float16 or float64" : " or float16", " for a ",
      name_of(weight.scalar_type()), " weight, but got ", name_of(dtype));
  return dtype;
}

GridOptions check_grid(const char* op, const at::Tensor& weight, const GridArguments& grid) {
  check_bits(op, grid.bits);
  check_group_size(op, grid.group_size);
  TORCH_CHECK_VALUE(grid.symmetric || !grid.full_range, op,
                    ": expected full_range to be False where symmetric=False (an asymmetric grid uses every code; "
                    "preset(\"best\", symmetric=False) leaves it out), but got True");
  TORCH_CHECK_VALUE(grid.scales.has_value() || !grid.zero_points.has_value(), op,
                    ": expected zero_points to come with scales, but got no scales");
  TORCH_CHECK_VALUE(grid.symmetric || !grid.scales.has_value() || grid.zero_points.has_value(), op,
                    ": expected scales to come with zero_points where symmetric=False, but got no zero_points");
  const ScaleMethod scale_method = choice_named<ScaleMethod>(op, "scale_method", grid.scale_method);
  const at::ScalarType scale_dtype = check_scale_dtype(op, weight, grid.scale_dtype);
  if (grid.scales.has_value()) {
    TORCH_CHECK_VALUE(scale_method == ScaleMethod::kAbsmax, op, ": expected no scales with scale_method='",
                      grid.scale_method, "', which computes them, but got scales of shape ", grid.scales->sym_sizes());
    TORCH_CHECK_TYPE(grid.scales->scalar_type() == scale_dtype, op, ": expected scales to have ",
                     grid.scale_dtype.has_value() ? "scale_dtype (" : "the dtype of weight (", name_of(scale_dtype),
                     "), but got ", name_of(grid.scales->scalar_type()));
    check_per_group(op, "scales", *grid.scales, weight, grid.group_size);
    check_same_device(op, "scales", *grid.scales, "weight", weight);
  }
  if (grid.zero_points.has_value()) {
    check_zero_point_dtype(op, *grid.zero_points);
    check_per_group(op, "zero_points", *grid.zero_points, weight, grid.group_size);
    check_same_device(op, "zero_points", *grid.zero_points, "weight", weight);
  }
  GridOptions options;
  options.bits = grid.bits;
  options.group_size = grid.group_size;
  options.symmetric = grid.symmetric;
  options.full_range = grid.full_range;
  options.scale_method = scale_method;
  options.scales = grid.scales;
  options.zero_points = grid.zero_points;
  options.scale_dtype = grid.scale_dtype;
  return options;
}

void check_grid_values(const char* op, const GridArguments& grid) {
  if (grid.scales.has_value()) {
    const at::Tensor in_range = grid.full_range ? *grid.scales != 0 : *grid.scales > 0;
    const at::Tensor good = at::isfinite(*grid.scales).logical_and(in_range);
    TORCH_CHECK_VALUE(good.all().item<bool>(), op, ": expected scales to be ",
                      grid.full_range ? "finite and not 0" : "positive and finite", ", but got ",
                      first_value(*grid.scales, good.logical_not()));
  }
  if (grid.zero_points.has_value()) {
    const kernels::CodeRange range = algorithms::code_range(grid.bits, grid.symmetric, grid.full_range);
    const int32_t low = grid.symmetric ? 0 : range.code_min;
    const int32_t high = grid.symmetric ? 0 : range.code_max;
    const at::Tensor bad = (*grid.zero_points < low).logical_or(*grid.zero_points > high);
    TORCH_CHECK_VALUE(!bad.any().item<bool>(), op, ": expected zero_points to be ",
                      grid.symmetric ? std::string("0 where symmetric=True")
                                     : c10::str("in [", low, ", ", high, "] for ", grid.bits, " bits"),
                      ", but got ", first_value(*grid.zero_points, bad));
  }
}

/// The tolerance is half of the dtype's digits. Rounding makes the two halves of a computed X X^T differ by much less,
/// a few units in the last place; a matrix that is not meant to be symmetric differs by much more. Returns max |H_ij|.
double check_hessian_values(const char* op, const at::Tensor& hessian, const char* argument = "hessian") {
  const algorithms::SymmetrySurvey survey = algorithms::survey_symmetry(hessian);
  if (!survey.finite) {
    check_finite(op, argument, hessian);
  }
  const double eps = hessian.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                                          : std::numeric_limits<float>::epsilon();
  const double tolerance = std::sqrt(eps) * survey.largest;
  if (survey.largest_asymmetry > tolerance) {
    const at::Tensor bad = (hessian - hessian.mT()).abs() > tolerance;
    TORCH_CHECK_VALUE(false, op, ": expected ", argument, " to be symmetric to within ", tolerance, ", but got ",
                      first_value(hessian, bad), " and ", first_value(hessian.mT(), bad), " of its transpose");
  }
  algorithms::check_diagonal_not_negative(op, argument, hessian);
  return survey.largest;
}

/// The largest finite value of the dtype in which a weight is computed.
double largest_computed(const at::Tensor& weight) {
  return algorithms::compute_dtype(weight.scalar_type()) == at::kDouble ? std::numeric_limits<double>::max()
                                                                        : std::numeric_limits<float>::max();
}

void check_ridge(const char* op, const at::Tensor& weight, double ridge) {
  TORCH_CHECK_VALUE(std::isfinite(ridge) && ridge >= 0, op, ": expected ridge to be finite and not negative, but got ",
                    ridge);
  TORCH_CHECK_VALUE(ridge <= largest_computed(weight), op, ": expected ridge to be at most ", largest_computed(weight),
                    " for a ", name_of(weight.scalar_type()), " weight, but got ", ridge);
}

/// Checks that ridge * mean(diag H) is finite in the compute dtype. `largest` is max |H_ij|.
void check_ridge_of(const char* op, const at::Tensor& weight, const at::Tensor& hessian, double largest, double ridge) {
  // A ridge of at most 1 adds at most the mean of diag H, which is in range at any scale of H.
  if (ridge <= 1 || ridge * largest <= largest_computed(weight)) {
    return;
  }
  const double mean = hessian.diagonal().to(at::kDouble).mean().item<double>();
  TORCH_CHECK_VALUE(ridge * mean <= largest_computed(weight), op, ": expected ridge to be at most ",
                    largest_computed(weight) / mean, " for a hessian with a mean diagonal of ", mean, ", but got ",
                    ridge);
}

}  // namespace

void check_on_cpu(const char* op, const char* argument, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.is_cpu(), op, ": expected ", argument, " to be on the CPU, but got a tensor on ",
                    tensor.device());
}

c10::SymInt groups_per_row(int64_t group_size, const c10::SymInt& columns) {
  if (columns == 0) {
    return 0;
  }
  return group_size == -1 ? c10::SymInt(1) : (columns - 1) / group_size + 1;
}

GridOptions check_rtn_arguments(const char* op, const at::Tensor& weight, const GridArguments& grid) {
  check_weight(op, weight);
  const GridOptions options = check_grid(op, weight, grid);
  TORCH_CHECK_VALUE(options.scale_method == ScaleMethod::kAbsmax || options.scale_method == ScaleMethod::kMse, op,
                    ": expected scale_method to be 'absmax' or 'mse' (the others need a Hessian), but got '",
                    grid.scale_method, "'");
  return options;
}

void check_rtn_values(const char* op, const at::Tensor& weight, const GridArguments& grid) {
  check_finite(op, "weight", weight);
  check_grid_values(op, grid);
}

GptqOptions check_gptq_arguments(const char* op, const at::Tensor& weight, const at::Tensor& hessian,
                                 const GridArguments& grid, const SweepArguments& sweep) {
  check_weight(op, weight);
  GptqOptions options{check_grid(op, weight, grid)};
  check_hessian_of(op, weight, hessian);
  check_ridge(op, weight, sweep.ridge);
  TORCH_CHECK_VALUE(sweep.block_size >= 1, op, ": expected block_size to be positive, but got ", sweep.block_size);
  TORCH_CHECK_VALUE(sweep.refine >= 0, op, ": expected refine to be a number of rounds, 0 or more, but got ",
                    sweep.refine);
  TORCH_CHECK_VALUE(sweep.beam_scales >= 0 && sweep.beam_scales <= kMostBeamScales, op,
                    ": expected beam_scales to be from 0 to ", kMostBeamScales, ", but got ", sweep.beam_scales);
  options.ridge = sweep.ridge;
  options.block_size = sweep.block_size;
  options.group_scales = choice_named<GroupScales>(op, "group_scales", sweep.group_scales);
  options.column_order = choice_named<ColumnOrder>(op, "column_order", sweep.column_order);
  options.refine = sweep.refine;
  options.beam_scales = sweep.beam_scales;
  if (options.group_scales == GroupScales::kDynamic) {
    TORCH_CHECK_VALUE(options.column_order != ColumnOrder::kActivation, op,
                      ": expected column_order to be 'natural' or 'group' with group_scales='dynamic' (in activation "
                      "order the columns of a stored group are not reached together), but got 'activation'");
    TORCH_CHECK_VALUE(!grid.scales.has_value(), op,
                      ": expected no scales with group_scales='dynamic', which computes them, but got scales of shape ",
                      grid.scales->sym_sizes());
    TORCH_CHECK_VALUE(options.scale_method == ScaleMethod::kAbsmax || options.scale_method == ScaleMethod::kLoss, op,
                      ": expected scale_method to be 'absmax' or 'loss' with group_scales='dynamic' (the others use "
                      "the original weights), but got '",
                      grid.scale_method, "'");
  } else {
    TORCH_CHECK_VALUE(options.scale_method != ScaleMethod::kLoss, op,
                      ": expected group_scales to be 'dynamic' with scale_method='loss' (scales are chosen during the "
                      "sweep), but got 'static'");
  }
  TORCH_CHECK_VALUE(sweep.beam_scales == 0 || options.scale_method == ScaleMethod::kLoss, op,
                    ": expected scale_method to be 'loss' with beam_scales (a beam search uses the best scales of that "
                    "method), but got '",
                    grid.scale_method, "' and beam_scales ", sweep.beam_scales);
  return options;
}

GptqOptions check_gptq_reference_arguments(const at::Tensor& weight, const at::Tensor& hessian,
                                           const GridArguments& grid, const SweepArguments& sweep) {
  TORCH_CHECK_VALUE(grid.scale_method != "loss",
                    "gptq_reference: expected scale_method to be 'absmax', 'mse' or 'hessian', but got 'loss', which "
                    "only gptq has");
  TORCH_CHECK_VALUE(sweep.beam_scales == 0,
                    "gptq_reference: expected beam_scales to be 0, as only gptq searches, but got ", sweep.beam_scales);
  GptqOptions options = check_gptq_arguments("gptq_reference", weight, hessian, grid, sweep);
  TORCH_CHECK_VALUE(options.refine == 0, "gptq_reference: expected refine to be 0, as only gptq refines, but got ",
                    options.refine);
  TORCH_CHECK_VALUE(
      options.scale_method == ScaleMethod::kAbsmax || weight.is_cpu() || weight.is_meta(),
      "gptq_reference: expected scale_method to be 'absmax' for a weight that is not on the CPU, but got '",
      grid.scale_method, "'");
  return options;
}

void check_gptq_values(const char* op, const at::Tensor& weight, const at::Tensor& hessian, const GridArguments& grid,
                       const SweepArguments& sweep) {
  check_rtn_values(op, weight, grid);
  const double largest = check_hessian_values(op, hessian);
  check_ridge_of(op, weight, hessian, largest, sweep.ridge);
}

std::tuple<int64_t, int64_t, bool> superblock_grid(std::string_view kind) {
  const QuantizationGrid grid = algorithms::grid_of(choice_named<SuperblockType>("superblock_grid", "kind", kind));
  return {grid.bits, grid.group_size, grid.symmetric};
}

SuperblockArguments check_superblock_arguments(const char* op, const at::Tensor& weight, std::string_view kind,
                                               std::string_view scale_method) {
  static const std::optional<at::Tensor> none;
  const auto type = choice_named<SuperblockType>(op, "kind", kind);
  check_weight(op, weight);
  TORCH_CHECK_VALUE(weight.sym_size(1) % algorithms::kSuperblockColumns == 0, op,
                    ": expected weight to have columns in multiples of ", algorithms::kSuperblockColumns,
                    ", a superblock of ", kind, ", but got shape ", weight.sym_sizes());
  const QuantizationGrid grid = algorithms::grid_of(type);
  return {type, {grid.bits, grid.group_size, grid.symmetric, none, none, grid.full_range, scale_method, at::kFloat}};
}

GridOptions check_choose_ridge_arguments(const at::Tensor& weight, const at::Tensor& first, const at::Tensor& second,
                                         int64_t tokens, const GridArguments& grid) {
  constexpr const char* op = "choose_ridge";
  const GridOptions options = check_rtn_arguments(op, weight, grid);
  check_hessian_of(op, weight, first, "first");
  check_hessian_of(op, weight, second, "second");
  TORCH_CHECK_TYPE(first.scalar_type() == second.scalar_type(), op, ": expected second to have the dtype of first (",
                   name_of(first.scalar_type()), "), but got ", name_of(second.scalar_type()));
  TORCH_CHECK_VALUE(tokens >= 2, op, ": expected tokens to be at least 2, one for each half, but got ", tokens);
  return options;
}

void check_choose_ridge_values(const at::Tensor& weight, const at::Tensor& first, const at::Tensor& second) {
  check_finite("choose_ridge", "weight", weight);
  check_hessian_values("choose_ridge", first, "first");
  check_hessian_values("choose_ridge", second, "second");
}

namespace {

/// Checks tokens [..., `letter`] that are to have `columns` columns and the device of `sum`, an argument of that name.
void check_tokens(const char* op, const char* argument, const at::Tensor& tokens, const char* letter,
                  const c10::SymInt& columns, const char* sum_argument, const at::Tensor& sum) {
  check_strided(op, argument, tokens);
  TORCH_CHECK_TYPE(is_weight_dtype(tokens.scalar_type()), op, ": expected ", argument, " to be ", kWeightDtypes,
                   ", but got ", name_of(tokens.scalar_type()));
  TORCH_CHECK_VALUE(tokens.dim() >= 1 && tokens.sym_size(-1) == columns, op, ": expected ", argument,
                    " to have shape [..., ", letter, "] = [..., ", columns, "], but got shape ", tokens.sym_sizes());
  check_same_device(op, argument, tokens, sum_argument, sum);
}

}  // namespace

void check_inputs_of(const char* op, const at::Tensor& inputs, const char* sum, const at::Tensor& hessian) {
  check_tokens(op, "inputs", inputs, "K", hessian.sym_size(-1), sum, hessian);
}

void check_of_tokens(const char* op, const char* argument, const at::Tensor& tensor, const at::Tensor& inputs) {
  TORCH_CHECK_VALUE(tensor.sym_sizes() == inputs.sym_sizes().slice(0, inputs.dim() - 1), op, ": expected ", argument,
                    " to have the shape of the tokens, ", inputs.sym_sizes().slice(0, inputs.dim() - 1),
                    " for inputs of shape ", inputs.sym_sizes(), ", but got shape ", tensor.sym_sizes());
}

void check_token_weights(const char* op, const std::optional<at::Tensor>& token_weights, const at::Tensor& inputs) {
  if (token_weights.has_value()) {
    TORCH_CHECK_TYPE(at::isFloatingType(token_weights->scalar_type()), op,
                     ": expected token_weights to be floating point, but got ", name_of(token_weights->scalar_type()));
    check_of_tokens(op, "token_weights", *token_weights, inputs);
  }
}

void check_hessian_update_arguments(const at::Tensor& hessian, const at::Tensor& inputs,
                                    const std::optional<at::Tensor>& token_weights) {
  constexpr const char* op = "hessian_update_";
  check_hessian(op, hessian);
  check_inputs_of(op, inputs, "hessian", hessian);
  check_token_weights(op, token_weights, inputs);
}

void check_product_update_arguments(const at::Tensor& sum, const at::Tensor& left, const at::Tensor& right) {
  constexpr const char* op = "product_update_";
  check_matrix(op, "sum", "[M, K]", sum);
  TORCH_CHECK_TYPE(is_hessian_dtype(sum.scalar_type()), op, ": expected sum to be ", kHessianDtypes, ", but got ",
                   name_of(sum.scalar_type()));
  check_tokens(op, "left", left, "M", sum.sym_size(0), "sum", sum);
  check_tokens(op, "right", right, "K", sum.sym_size(1), "sum", sum);
  TORCH_CHECK_VALUE(left.sym_sizes().slice(0, left.dim() - 1) == right.sym_sizes().slice(0, right.dim() - 1), op,
                    ": expected left and right to have the same tokens, but got shapes ", left.sym_sizes(), " and ",
                    right.sym_sizes());
}

void check_quantization_loss_arguments(const at::Tensor& weight, const at::Tensor& dequantized,
                                       const at::Tensor& hessian) {
  constexpr const char* op = "quantization_loss";
  check_weight(op, weight);
  check_strided(op, "dequantized", dequantized);
  TORCH_CHECK_VALUE(dequantized.sym_sizes() == weight.sym_sizes(), op,
                    ": expected dequantized to have the shape of weight ", weight.sym_sizes(), ", but got shape ",
                    dequantized.sym_sizes());
  TORCH_CHECK_TYPE(is_weight_dtype(dequantized.scalar_type()), op, ": expected dequantized to be ", kWeightDtypes,
                   ", but got ", name_of(dequantized.scalar_type()));
  check_same_device(op, "dequantized", dequantized, "weight", weight);
  check_hessian_of(op, weight, hessian);
}

void check_dequantize_arguments(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zero_points,
                                int64_t group_size, std::optional<at::ScalarType> dtype) {
  constexpr const char* op = "dequantize";
  check_matrix(op, "codes", "[N, K]", codes);
  TORCH_CHECK_TYPE(codes.scalar_type() == at::kChar, op, ": expected codes to be int8, but got ",
                   name_of(codes.scalar_type()));
  check_group_size(op, group_size);
  TORCH_CHECK_TYPE(is_weight_dtype(scales.scalar_type()), op, ": expected scales to be ", kWeightDtypes, ", but got ",
                   name_of(scales.scalar_type()));
  check_per_group(op, "scales", scales, codes, group_size);
  check_same_device(op, "scales", scales, "codes", codes);
  check_zero_point_dtype(op, zero_points);
  check_per_group(op, "zero_points", zero_points, codes, group_size);
  check_same_device(op, "zero_points", zero_points, "codes", codes);
  const at::ScalarType values = dtype.value_or(scales.scalar_type());
  TORCH_CHECK_TYPE(is_weight_dtype(values), op, ": expected dtype to be ", kWeightDtypes, ", but got ",
                   name_of(values));
}

c10::SymInt packed_bytes(const c10::SymInt& columns, int64_t bits) { return (columns * bits + 7) / 8; }

void check_pack_arguments(const char* op, const at::Tensor& codes, int64_t bits) {
  check_matrix(op, "codes", "[N, K]", codes);
  TORCH_CHECK_TYPE(codes.scalar_type() == at::kChar, op, ": expected codes to be int8, but got ",
                   name_of(codes.scalar_type()));
  check_bits(op, bits);
}

void check_pack_values(const char* op, const at::Tensor& codes, int64_t bits) {
  if (bits == 8 || algorithms::fit_in(codes, bits)) {
    return;
  }
  const auto half = static_cast<int64_t>(uint64_t{1} << static_cast<unsigned>(bits - 1));
  const at::Tensor bad = (codes < -half).logical_or(codes >= half);
  TORCH_CHECK_VALUE(false, op, ": expected codes to be in [", -half, ", ", half - 1, "] for ", bits, " bits, but got ",
                    first_value(codes, bad));
}

void check_unpack_arguments(const char* op, const at::Tensor& packed, int64_t bits, const c10::SymInt& columns) {
  check_matrix(op, "packed", "[N, ceil(K * bits / 8)]", packed);
  TORCH_CHECK_TYPE(packed.scalar_type() == at::kByte, op, ": expected packed to be uint8, but got ",
                   name_of(packed.scalar_type()));
  check_bits(op, bits);
  // With more columns the number of bits overflows int64_t.
  constexpr int64_t kMostColumns = std::numeric_limits<int64_t>::max() / 16;
  TORCH_CHECK_VALUE(columns >= 0 && columns <= kMostColumns, op, ": expected columns to be 0 to ", kMostColumns,
                    ", but got ", columns);
  TORCH_CHECK_VALUE(packed.sym_size(1) == packed_bytes(columns, bits), op,
                    ": expected packed to have shape [N, ceil(K * bits / 8)] = [", packed.sym_size(0), ", ",
                    packed_bytes(columns, bits), "] for ", columns, " columns of ", bits, " bits, but got shape ",
                    packed.sym_sizes());
}

}  // namespace miniquant::ops
