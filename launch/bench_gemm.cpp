#include <fmt/format.h>

#include <algorithm>
#include <vector>

#include "kernels/peak.hpp"
#include "launch/bench.hpp"
#include "launch/bench_experts.hpp"
#include "launch/threads.hpp"
#include "src/model/dense_ffn.hpp"

namespace arcus {
namespace {

/// Rows per segment to try: the configuration's own, half and twice as many.
std::vector<std::int64_t> segment_rows(const Config& config) {
  const std::int64_t even = config.train.micro_batch_seqs * config.train.seq_len *
                            config.model.topk / config.model.num_experts;
  return {std::max<std::int64_t>(1, even / 2), std::max<std::int64_t>(1, even), even * 2};
}

void bench_rows(Session& session, Stream& stream, const BenchOptions& options, DType dtype,
                std::int64_t rows) {
  const ModelConfig& model = options.config.model;
  BenchedExperts ffn(stream, ffn_shape(model, model.expert_ff_size), dtype, model.num_experts,
                     rows);
  // All passes once, so that each has the buffers that it reads.
  ffn.forward();
  ffn.backward();
  ffn.weight_gradient(DType::i64);
  struct Pass {
    const char* name;
    std::function<void()> run;
    double factor;
  };
  const std::vector<Pass> passes{
      {"forward", [&] { ffn.forward(); }, 1},
      {"backward, inputs", [&] { ffn.backward(); }, 1},
      {"backward, weights", [&] { ffn.weight_gradient(DType::i64); }, 1},
      {"backward, weights (f32 sums)", [&] { ffn.weight_gradient(DType::f32); }, 1},
      {"all three", [&] { ffn.forward(), ffn.backward(), ffn.weight_gradient(DType::i64); }, 3}};
  for (const Pass& pass : passes) {
    // Clocks wander: the peak is measured beside each figure, before and after.
    double peak = sum_over_ranks(session, measure_gemm_peak(stream, dtype));
    const Samples samples = measure(session, stream, options.repeats, pass.run);
    peak = (peak + sum_over_ranks(session, measure_gemm_peak(stream, dtype))) / 2;
    const double gflops =
        pass.factor * ffn.flops() * session.comm().size() / samples.median() / 1e6;
    if (!session.is_root()) continue;
    fmt::print("{:<5} {:>5} {:<30} {:>10.3f} {:>10.3f} {:>10.1f} {:>10.1f} {:>6.2f}\n",
               name_of(dtype), rows, pass.name, samples.median(), samples.most(), gflops, peak,
               gflops / peak);
  }
}

}  // namespace

ExitCode bench_gemm(Session& session, const BenchOptions& options) {
  Stream stream(set_up_threads(options.config.parallel, session.comm(), session.stream()));
  if (session.is_root()) {
    const ModelConfig& model = options.config.model;
    fmt::print(
        "grouped feed-forward, {} experts, hidden {}, width {}; {} ranks x {} threads, "
        "median of {}\n",
        model.num_experts, model.hidden_size, model.expert_ff_size, session.comm().size(),
        stream.num_threads(), options.repeats);
    fmt::print("{:<5} {:>5} {:<30} {:>10} {:>10} {:>10} {:>10} {:>6}\n", "type", "rows", "pass",
               "ms", "worst ms", "GFLOP/s", "peak", "share");
  }
  const DType dtype = dtype_from_name(options.config.train.dtype);
  for (const std::int64_t rows : segment_rows(options.config)) {
    bench_rows(session, stream, options, dtype, rows);
  }
  return ExitCode::ok;
}

}  // namespace arcus
