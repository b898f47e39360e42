// Grouped feed-forward and linear layers of the bench model (H 512, F 1024, 8 experts), as a share
// of the machine's own oneDNN peak, measured in the same run: counter "share".
#include <benchmark/benchmark.h>

#include <algorithm>
#include <map>
#include <memory>
#include <vector>

#include "kernels/arena.hpp"
#include "kernels/cpu/gemm_cache.hpp"
#include "kernels/ffn.hpp"
#include "kernels/gemm.hpp"
#include "kernels/gradient.hpp"
#include "kernels/peak.hpp"

namespace arcus {
namespace {

constexpr FfnShape kShape{512, 1024};
constexpr std::int64_t kExperts = 8;
constexpr double kFlopsPerRow = 6.0 * kShape.hidden_size * kShape.ff_size;  // one pass

/// Peaks are measured beside each benchmark: clocks wander.
double peak_of(int threads, DType dtype) {
  Stream stream(threads);
  return measure_gemm_peak(stream, dtype);
}

void fill(TensorView view, float value) {
  for (std::int64_t i = 0; i < view.rows; ++i) {
    for (std::int64_t j = 0; j < view.cols; ++j) {
      const float varied = value * static_cast<float>((i * 31 + j * 17) % 64 - 31) / 64;
      if (view.dtype == DType::f32) view.row<float>(i)[j] = varied;
      if (view.dtype == DType::bf16) view.row<bf16>(i)[j] = bf16(varied);
    }
  }
}

struct FfnBench {
  FfnBench(int threads, DType compute, std::int64_t rows_each)
      : stream(threads), dtype(compute), arena("benchmark", std::int64_t{1} << 32) {
    for (std::int32_t e = 0; e < kExperts; ++e) {
      segments.push_back({e, 0, rows, rows, rows_each});
      rows += padded_rows(rows_each);
    }
    const std::int64_t h = kShape.hidden_size, f = kShape.ff_size;
    weights = tensor(kExperts * 3 * f, h);
    x = tensor(rows + kWgradRowPadding, h);
    for (TensorView* view : {&y, &dout, &dx, &dy}) *view = tensor(rows, h);
    for (TensorView* view : {&gate_up, &dgate_up}) *view = tensor(rows, 2 * f);
    act = tensor(rows, f);
    row_weight = arena.allocate(DType::f32, 1, rows);
    drow_weight = arena.allocate(DType::f32, 1, rows);
    fill(row_weight, 1);
    sums = arena.allocate(DType::i64, kExperts * 3 * f, h);
    fill(weights, 0.1F), fill(x, 1), fill(dout, 1);
    views = {
        weights.row_range(0, 2 * f), {weights.row_range(2 * f, h).data, dtype, h, f}, 3 * f * h};
    build_primitives(stream, ffn_gemm_shapes(kShape, dtype, rows_each, true));
  }
  TensorView tensor(std::int64_t num_rows, std::int64_t cols) {
    return arena.allocate(dtype, num_rows, cols);
  }
  void forward() {
    ffn_forward(stream, {.y = y,
                         .gate_up = gate_up,
                         .act = act,
                         .x = x,
                         .weights = views,
                         .shape = kShape,
                         .segments = segments});
  }
  void backward() {
    ffn_backward(stream, {.dx = dx,
                          .drow_weight = drow_weight,
                          .dy = dy,
                          .dgate_up = dgate_up,
                          .dout = dout,
                          .row_weight = row_weight,
                          .y = y,
                          .gate_up = gate_up,
                          .weights = views,
                          .shape = kShape,
                          .segments = segments});
  }
  void wgrad(DType sum_dtype) {
    const std::int64_t matrix = kShape.hidden_size * kShape.ff_size;
    const GradientSum sum{.sum = sums.data, .dtype = sum_dtype, .limit = 4096};
    ffn_wgrad(stream, {.dgate = sum,
                       .dup = sum.at(matrix),
                       .ddown = sum.at(2 * matrix),
                       .expert_stride = 3 * matrix,
                       .x = x,
                       .act = act,
                       .dy = dy,
                       .dgate_up = dgate_up,
                       .shape = kShape,
                       .segments = segments});
  }

  Stream stream;
  DType dtype;
  Arena arena;
  std::int64_t rows = 0;
  std::vector<Segment> segments;
  TensorView weights, x, y, dout, dx, dy, gate_up, dgate_up, act, row_weight, drow_weight, sums;
  FfnWeights views;
};

enum class Part { forward, backward, wgrad_i64, wgrad_f32, all_i64, all_f32 };

void run_part(FfnBench& bench, Part part) {
  const bool all = part == Part::all_i64 || part == Part::all_f32;
  if (all || part == Part::forward) bench.forward();
  if (all || part == Part::backward) bench.backward();
  if (part == Part::all_i64 || part == Part::wgrad_i64) bench.wgrad(DType::i64);
  if (part == Part::all_f32 || part == Part::wgrad_f32) bench.wgrad(DType::f32);
}

/// Arguments: threads, bf16, rows per segment.
template <Part kPart>
void ffn(benchmark::State& state) {
  const int threads = static_cast<int>(state.range(0));
  const DType dtype = state.range(1) != 0 ? DType::bf16 : DType::f32;
  if (dtype == DType::bf16 && !cpu::bf16_is_native()) {
    state.SkipWithError("no native bf16");
    return;
  }
  FfnBench bench(threads, dtype, state.range(2));
  for (int warm = 0; warm < 2; ++warm) run_part(bench, Part::all_i64);
  double peak = peak_of(threads, dtype);
  for (auto _ : state) run_part(bench, kPart);
  peak = (peak + peak_of(threads, dtype)) / 2;
  const bool all = kPart == Part::all_i64 || kPart == Part::all_f32;
  const double flops =
      kFlopsPerRow * (all ? 3 : 1) * kExperts * static_cast<double>(state.range(2));
  state.counters["GFLOPs"] =
      benchmark::Counter(flops * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["share"] =
      benchmark::Counter(flops * 1e-9 / peak, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["peak"] = peak;
}

void arguments(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgNames({"threads", "bf16", "rows"});
  for (const int bf16 : {0, 1}) {
    for (const int rows : {128, 512}) {
      for (const int threads : {1, 2}) benchmark->Args({threads, bf16, rows});
    }
  }
  benchmark->UseRealTime()->Unit(benchmark::kMillisecond);
}
BENCHMARK(ffn<Part::forward>)->Apply(arguments);
BENCHMARK(ffn<Part::backward>)->Apply(arguments);
BENCHMARK(ffn<Part::wgrad_i64>)->Apply(arguments);
BENCHMARK(ffn<Part::wgrad_f32>)->Apply(arguments);
BENCHMARK(ffn<Part::all_i64>)->Apply(arguments);
BENCHMARK(ffn<Part::all_f32>)->Apply(arguments);

void peak(benchmark::State& state) {
  Stream stream(static_cast<int>(state.range(0)));
  double f32 = 0, triad = 0;
  for (auto _ : state) {
    f32 = measure_gemm_peak(stream, DType::f32);
    triad = measure_triad(stream);
  }
  state.counters["f32_GFLOPs"] = f32;
  state.counters["triad_GBs"] = triad;
}
BENCHMARK(peak)->Arg(1)->Arg(2)->UseRealTime()->Iterations(1);

void adamw_with_copy(benchmark::State& state) {
  const std::int64_t n = std::int64_t{1} << 22;
  Stream stream(static_cast<int>(state.range(0)));
  Arena arena("benchmark", 24 * n);
  const TensorView master = arena.allocate(DType::f32, 1, n), m = arena.allocate(DType::f32, 1, n),
                   v = arena.allocate(DType::f32, 1, n), g = arena.allocate(DType::f32, 1, n),
                   compute = arena.allocate(DType::bf16, 1, n);
  fill(g, 1e-2F);
  for (auto _ : state) {
    adamw(stream, {.master = master,
                   .m = m,
                   .v = v,
                   .sum = g,
                   .compute = compute,
                   .lr = 1e-3,
                   .beta1 = 0.9,
                   .beta2 = 0.95,
                   .eps = 1e-8,
                   .weight_decay = 0.1});
  }
  state.counters["GBs"] = benchmark::Counter(30e-9 * static_cast<double>(n),
                                             benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(adamw_with_copy)->Arg(1)->Arg(2)->UseRealTime();

}  // namespace
}  // namespace arcus

BENCHMARK_MAIN();
