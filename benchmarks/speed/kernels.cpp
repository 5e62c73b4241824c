// Measures the kernels of csrc/kernels/kernels.h on one thread each, and the operators on torch's threads. The counter
// `of_mm` is the rate of multiplications and additions relative to that of at::mm on the same number of threads,
// measured in this process: for a kernel at 1024 x 1024 x 1024, for an operator at its own sizes. A comment at each
// kernel says what counts as its work.

#include "kernels/kernels.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <benchmark/benchmark.h>
#include <miniquant/miniquant.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <map>
#include <new>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <vector>

namespace miniquant {
namespace {

using benchmark::State;
using kernels::kPanelColumns;
using kernels::TriangleLayout;

constexpr std::size_t kAlignment = 64;
constexpr int kMmRuns = 5;
/// The size of at::mm that kernels are compared with.
constexpr int64_t kMmSize = 1024;

const kernels::TypedKernels<float>& f32() { return kernels::kernels().f32; }

/// Floats at an address aligned for vectors of any length.
class Workspace {
 public:
  explicit Workspace(int64_t count)
      : data_(static_cast<float*>(
            ::operator new(static_cast<std::size_t>(count) * sizeof(float), std::align_val_t{kAlignment}))) {
    std::fill_n(data_, count, 0.0F);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { ::operator delete(data_, std::align_val_t{kAlignment}); }
  [[nodiscard]] float* data() { return data_; }

 private:
  float* data_;
};

std::vector<float> normal(int64_t count, double factor) {
  // Every run draws the same numbers.
  std::mt19937 generator(1);  // NOLINT(bugprone-random-generator-seed)
  std::normal_distribution<float> distribution(0.0F, static_cast<float>(factor));
  std::vector<float> values(static_cast<std::size_t>(count));
  std::ranges::generate(values, [&] { return distribution(generator); });
  return values;
}

/// Multiplications and additions per second of at::mm [rows, inner] [inner, columns] on `threads` threads: the best of
/// a few runs, measured once.
double mm_rate(int64_t rows, int64_t inner, int64_t columns, int threads) {
  static std::map<std::tuple<int64_t, int64_t, int64_t, int>, double> known;
  double& rate = known[{rows, inner, columns, threads}];
  if (rate == 0.0) {
    const int before = at::get_num_threads();
    at::set_num_threads(threads);
    const at::Tensor left = at::randn({rows, inner});
    const at::Tensor right = at::randn({inner, columns});
    at::Tensor product = at::empty({rows, columns});
    at::mm_out(product, left, right);
    double seconds = std::numeric_limits<double>::infinity();
    for (int run = 0; run < kMmRuns; ++run) {
      const auto start = std::chrono::steady_clock::now();
      at::mm_out(product, left, right);
      seconds = std::min(seconds, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    rate = 2.0 * static_cast<double>(rows) * static_cast<double>(inner) * static_cast<double>(columns) / seconds;
    at::set_num_threads(before);
  }
  return rate;
}

/// Runs `body` as often as Google Benchmark asks, and sets `of_mm` from the `flops` multiplications and additions of
/// each run, relative to `rate` per second.
template <typename Body>
void measure(State& state, double flops, double rate, const Body& body) {
  const auto start = std::chrono::steady_clock::now();
  for ([[maybe_unused]] const auto iteration : state) {
    body();
    benchmark::ClobberMemory();
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  state.counters["of_mm"] = flops * static_cast<double>(state.iterations()) / (seconds * rate);
}

template <typename Body>
void measure_kernel(State& state, double flops, const Body& body) {
  measure(state, flops, mm_rate(kMmSize, kMmSize, kMmSize, 1), body);
}

/// A weight with room for its grid. Sizes are the benchmark's arguments: rows, columns, columns per group.
struct Layer {
  explicit Layer(const State& state, kernels::CodeRange code_range = {-7, 7, true})
      : rows(state.range(0)),
        columns(state.range(1)),
        group_size(state.range(2)),
        range(code_range),
        weight(normal(rows * columns, 0.02)),
        scales(static_cast<std::size_t>(rows * groups())),
        zero_points(scales.size()),
        codes(weight.size()) {}

  [[nodiscard]] int64_t groups() const { return (columns + group_size - 1) / group_size; }

  [[nodiscard]] kernels::GridView<float> grid() {
    return {range, group_size, groups(), scales.data(), zero_points.data(), codes.data(), [](float scale) {
              return std::max(scale, std::numeric_limits<float>::min());
            }};
  }

  /// N K^2
  [[nodiscard]] double sweep_flops() const {
    return static_cast<double>(rows) * static_cast<double>(columns) * static_cast<double>(columns);
  }

  int64_t rows;
  int64_t columns;
  int64_t group_size;
  kernels::CodeRange range;
  std::vector<float> weight;             // [N, K]
  std::vector<float> scales;             // [N, groups]
  std::vector<std::int8_t> zero_points;  // [N, groups]
  std::vector<std::int8_t> codes;        // [N, K]
};

/// A lower triangle with 1 on the diagonal and small values below, in panels.
std::vector<float> unit_triangle(int64_t columns) {
  const TriangleLayout layout{columns};
  std::vector<float> triangle = normal(layout.size(), 0.1 / static_cast<double>(columns));
  for (int64_t j = 0; j < columns; ++j) {
    triangle[static_cast<std::size_t>(layout.offset(j, j / kPanelColumns) + j % kPanelColumns)] = 1.0F;
  }
  return triangle;
}

// --- kernels ---------------------------------------------------------------------------------------------------------

// N K^2
void sweep(State& state) {
  Layer layer(state);
  const bool dynamic_scales = state.range(3) != 0;
  const std::vector<float> triangle = unit_triangle(layer.columns);
  std::vector<kernels::SweepStep<float>> steps;
  steps.reserve(static_cast<std::size_t>(layer.columns));
  for (int64_t j = 0; j < layer.columns; ++j) {
    steps.push_back({j, j / layer.group_size, 1.0F, 1.0F});
  }
  const float factor = 1.0F;
  std::vector<float> row_loss(static_cast<std::size_t>(layer.rows));
  const int64_t segment_columns = dynamic_scales ? layer.group_size : 128;
  const kernels::SweepProblem<float> problem{
      .columns = layer.columns,
      .weight = layer.weight.data(),
      .grid = layer.grid(),
      .dynamic_scales = dynamic_scales,
      .search = {&factor, 1, nullptr},
      .beam_scales = 0,
      .steps = steps.data(),
      .triangle = triangle.data(),
      .segment_columns = segment_columns,
      .block_columns = std::max<int64_t>(1, 128 / segment_columns) * segment_columns,
      .row_loss = row_loss.data(),
      .gradient = nullptr};
  f32().compute_grid(problem.grid, problem.weight, layer.columns, 0, layer.rows);
  Workspace workspace(f32().sweep_workspace(problem, layer.rows));
  measure_kernel(state, layer.sweep_flops(), [&] { f32().sweep(problem, 0, layer.rows, workspace.data()); });
}

// N K^2: one round
void refine(State& state) {
  Layer layer(state);
  const kernels::SymmetricLayout layout{layer.columns};
  std::vector<float> hessian(static_cast<std::size_t>(layout.size()), 0.0F);
  for (int64_t j = 0; j < layer.columns; ++j) {
    hessian[static_cast<std::size_t>(layout.offset(j, j / kernels::kPanelColumns) + j % kernels::kPanelColumns)] = 1.0F;
  }
  std::vector<float> gradient(static_cast<std::size_t>(layer.rows * layout.padded_columns()), 0.0F);
  std::vector<float> row_loss(static_cast<std::size_t>(layer.rows));
  const kernels::RefineProblem<float> problem{.columns = layer.columns,
                                              .grid = layer.grid(),
                                              .hessian = hessian.data(),
                                              .gradient = gradient.data(),
                                              .rounds = 1,
                                              .row_loss = row_loss.data()};
  f32().compute_grid(problem.grid, layer.weight.data(), layer.columns, 0, layer.rows);
  f32().round_to_nearest(problem.grid, layer.weight.data(), layer.columns, 0, layer.rows);
  Workspace workspace(f32().refine_workspace(problem, layer.rows));
  measure_kernel(state, layer.sweep_flops(), [&] { f32().refine(problem, 0, layer.rows, workspace.data()); });
}

// N K^2: half of the products of e H
void quadratic_form(State& state) {
  Layer layer(state);
  const std::vector<float> triangle = unit_triangle(layer.columns);
  std::vector<float> form(static_cast<std::size_t>(layer.rows));
  const kernels::QuadraticFormProblem<float> problem{
      {layer.columns}, layer.weight.data(), triangle.data(), form.data()};
  Workspace workspace(f32().quadratic_form_workspace(problem));
  measure_kernel(state, layer.sweep_flops(), [&] { f32().quadratic_form(problem, 0, layer.rows, workspace.data()); });
}

// N K: one comparison for each weight
void compute_grid(State& state) {
  Layer layer(state);
  measure_kernel(state, static_cast<double>(layer.rows * layer.columns),
                 [&] { f32().compute_grid(layer.grid(), layer.weight.data(), layer.columns, 0, layer.rows); });
  state.SetBytesProcessed(state.iterations() * layer.rows * layer.columns * static_cast<int64_t>(sizeof(float)));
}

// 5 N K for each scale that is tried: w / s, its rounded value times s, the difference, weighted and squared
void search_grid(State& state) {
  constexpr int64_t kFactors = 25;
  Layer layer(state);
  std::vector<float> factors(kFactors);
  std::iota(factors.rbegin(), factors.rend(), 0.0F);
  std::ranges::transform(factors, factors.begin(),
                         [](float step) { return 0.5F + step / static_cast<float>(2 * kFactors); });
  const std::vector<float> importance(static_cast<std::size_t>(layer.columns), 1.0F);
  const kernels::ScaleSearch<float> search{factors.data(), kFactors, importance.data()};
  measure_kernel(state, 5.0 * static_cast<double>(kFactors * layer.rows * layer.columns),
                 [&] { f32().search_grid(layer.grid(), search, layer.weight.data(), layer.columns, 0, layer.rows); });
}

// 2 tile^2 for each row
void rank_update(State& state) {
  const int64_t count = state.range(0);
  const int64_t lanes = f32().tile_rows;
  const std::vector<float> tiles = normal(2 * count * lanes, 1.0);
  std::vector<float> a(static_cast<std::size_t>(4 * lanes * lanes));
  measure_kernel(state, 2.0 * static_cast<double>(count * lanes * lanes),
                 [&] { f32().rank_update(a.data(), 2 * lanes, 2 * lanes, tiles.data(), count, 0, 1); });
}

// 2 panel^2 for each term
void subtract_products(State& state) {
  const int64_t count = state.range(0) == 0 ? f32().terms_per_product : state.range(0);
  const std::vector<float> left = normal((count + kernels::kSpareRows) * kPanelColumns, 1.0);
  const std::vector<float> right = normal((count + kernels::kSpareRows) * kPanelColumns, 1.0);
  Workspace block((kPanelColumns + kernels::kSpareRows) * kPanelColumns);
  measure_kernel(state, 2.0 * static_cast<double>(count * kPanelColumns * kPanelColumns),
                 [&] { f32().subtract_products(left.data(), right.data(), count, kPanelColumns, block.data(), {}); });
}

// --- operators -------------------------------------------------------------------------------------------------------

at::Tensor random_weight(int64_t rows, int64_t columns) { return at::randn({rows, columns}) * 0.02; }

/// Correlated inputs [tokens, columns].
at::Tensor random_inputs(int64_t tokens, int64_t columns) {
  return at::randn({tokens, columns}) + at::randn({tokens, 1});
}

// N K^2 + K^3 / 3
void gptq_operator(State& state) {
  const int64_t rows = state.range(0);
  const int64_t columns = state.range(1);
  const at::Tensor weight = random_weight(rows, columns);
  HessianAccumulator accumulator(columns);
  accumulator.update(random_inputs(2 * columns, columns));
  const at::Tensor hessian = accumulator.hessian();
  GptqOptions options;
  options.group_size = state.range(2);
  const double square = static_cast<double>(columns) * static_cast<double>(columns);
  measure(state, square * (static_cast<double>(rows) + static_cast<double>(columns) / 3),
          mm_rate(rows, columns, columns, at::get_num_threads()), [&] { gptq(weight, hessian, options); });
}

// 4 N K: a comparison for the scale; a quotient, rounded, and a clamp for the code
void rtn_operator(State& state) {
  const int64_t rows = state.range(0);
  const int64_t columns = state.range(1);
  const at::Tensor weight = random_weight(rows, columns);
  GridOptions options;
  options.group_size = state.range(2);
  measure(state, 4.0 * static_cast<double>(rows * columns), mm_rate(rows, columns, columns, at::get_num_threads()),
          [&] { rtn(weight, options); });
  state.SetBytesProcessed(state.iterations() * rows * columns * static_cast<int64_t>(sizeof(float)));
}

// T K^2: one of two triangles
void hessian_update_operator(State& state) {
  const int64_t tokens = state.range(0);
  const int64_t columns = state.range(1);
  const at::Tensor inputs = random_inputs(tokens, columns);
  at::Tensor hessian = at::zeros({columns, columns});
  measure(state, static_cast<double>(tokens) * static_cast<double>(columns) * static_cast<double>(columns),
          mm_rate(columns, tokens, columns, at::get_num_threads()), [&] { hessian_update_(hessian, inputs); });
}

// The rows of one thread's share, and columns from the size of the caches to well above it.
BENCHMARK(sweep)
    ->ArgNames({"N", "K", "group", "dynamic"})
    ->Args({96, 768, 64, 0})
    ->Args({96, 768, 64, 1})
    ->Args({96, 4096, 128, 0})
    ->Args({96, 4096, 128, 1})
    ->Unit(benchmark::kMillisecond);
BENCHMARK(refine)
    ->ArgNames({"N", "K", "group"})
    ->Args({96, 768, 64})
    ->Args({96, 4096, 128})
    ->Unit(benchmark::kMillisecond);
BENCHMARK(quadratic_form)
    ->ArgNames({"N", "K", "group"})
    ->Args({96, 768, 64})
    ->Args({96, 4096, 128})
    ->Unit(benchmark::kMillisecond);
BENCHMARK(compute_grid)->ArgNames({"N", "K", "group"})->Args({96, 768, 64})->Unit(benchmark::kMicrosecond);
BENCHMARK(search_grid)->ArgNames({"N", "K", "group"})->Args({96, 768, 64})->Unit(benchmark::kMicrosecond);
BENCHMARK(rank_update)->ArgName("T")->Arg(96)->Arg(1024)->Unit(benchmark::kMicrosecond);
// 0 terms: the number for which one call is fastest
BENCHMARK(subtract_products)->ArgName("terms")->Arg(0)->Arg(16)->Unit(benchmark::kMicrosecond);

BENCHMARK(gptq_operator)
    ->Name("gptq")
    ->ArgNames({"N", "K", "group"})
    ->Args({384, 384, 64})
    ->Args({768, 768, 64})
    ->Args({2048, 2048, 128})
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);
BENCHMARK(rtn_operator)
    ->Name("rtn")
    ->ArgNames({"N", "K", "group"})
    ->Args({768, 768, 64})
    ->Args({2048, 2048, 128})
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);
BENCHMARK(hessian_update_operator)
    ->Name("hessian_update_")
    ->ArgNames({"T", "K"})
    ->Args({1536, 768})
    ->Args({4096, 2048})
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace miniquant

int main(int count, char** arguments) {
  benchmark::AddCustomContext("instruction_set",
                              miniquant::kernels::name(miniquant::kernels::kernels().instruction_set));
  benchmark::AddCustomContext("threads of the operators", std::to_string(at::get_num_threads()));
  benchmark::Initialize(&count, arguments);
  if (benchmark::ReportUnrecognizedArguments(count, arguments)) {
    return EXIT_FAILURE;
  }
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return EXIT_SUCCESS;
}
