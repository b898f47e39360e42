#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "kernels/peak.hpp"
#include "launch/bench.hpp"
#include "launch/run_setup.hpp"
#include "launch/threads.hpp"
#include "src/train/generation.hpp"

namespace arcus {
namespace {

constexpr std::int64_t kNewTokens = 64;

/// Experts of a layer that at least one of `num_seqs` tokens goes to, on average, if all are
/// equally likely.
double expected_experts(const ModelConfig& model, std::int64_t num_seqs) {
  const auto experts = static_cast<double>(model.num_experts);
  const double missed = 1 - static_cast<double>(model.topk) / experts;
  return experts * (1 - std::pow(missed, static_cast<double>(num_seqs)));
}

/// Bytes that one new token of each of `num_seqs` sequences must read: every weight that is used,
/// once, and the keys and values so far.
double bytes_per_token(const ModelInstance& instance, std::int64_t num_seqs) {
  const ModelConfig& model = instance.options().model;
  const auto element = static_cast<double>(size_of(instance.options().compute));
  double elements = 0;
  for (const ParamRow& row : instance.registry().rows()) {
    if (row.name == "model.embed_tokens.weight" && !model.tie_embeddings) continue;
    const auto unit = static_cast<double>(row.unit_elements());
    elements += row.kind == ParamKind::expert ? unit * expected_experts(model, num_seqs) : unit;
  }
  const auto keys_and_values = static_cast<double>(2 * model.num_layers * model.num_kv_heads *
                                                   model.head_dim * num_seqs * kNewTokens) /
                               2;
  return element * (elements + keys_and_values);
}

void bench_batch(Session& session, Stream& stream, const BenchOptions& options,
                 const ModelConfig& model, std::int64_t num_seqs) {
  const Config& config = options.config;
  InstanceOptions instance_config =
      dropless_outside_training(instance_options(trainer_options(config, model)));
  instance_config.training = false;
  instance_config.micro_batch_seqs = num_seqs;
  instance_config.seq_len = 1;
  const int ep_size =
      resolve_ep_size(config.parallel.ep_size, session.comm().size(), config.model.num_experts);
  ModelInstance instance(make_process_groups(session.comm(), ep_size), stream, instance_config);
  instance.initialize_parameters();
  instance.build_primitives();
  std::vector<std::vector<std::int32_t>> prompts;
  for (std::int64_t b = 0; b < num_seqs; ++b) {
    prompts.push_back({static_cast<std::int32_t>(b % model.vocab_size)});
  }
  const SamplingOptions sampling{.max_new_tokens = kNewTokens, .temperature = 0};
  const double before = sum_over_ranks(session, measure_triad(stream));
  const Samples samples = measure(
      session, stream, options.repeats, [&] { generate(instance, prompts, sampling, {}); }, 1);
  const double gbytes = (before + sum_over_ranks(session, measure_triad(stream))) / 2;
  if (!session.is_root()) return;
  const double ms = samples.median() / static_cast<double>(kNewTokens);
  const double bytes = bytes_per_token(instance, num_seqs);
  const double limit_ms = bytes / gbytes / 1e6;
  fmt::print("{:>6} {:>12.3f} {:>12.0f} {:>12.1f} {:>8.1f} {:>12.3f} {:>8.2f}\n", num_seqs, ms,
             static_cast<double>(num_seqs) / ms * 1e3, bytes / 1e6, gbytes, limit_ms,
             ms / limit_ms);
}

}  // namespace

ExitCode bench_generate(Session& session, const BenchOptions& options) {
  std::optional<TokenDataset> dataset;
  if (!options.config.run.data.empty()) dataset = open_dataset(session, options.config.run.data);
  ModelConfig model;
  session.together([&] {
    model = resolve_model(options.config, dataset ? &*dataset : nullptr);
    resolve_ep_size(options.config.parallel.ep_size, session.comm().size(), model.num_experts);
  });
  Stream stream(set_up_threads(options.config.parallel, session.comm(), session.stream()));
  if (session.is_root()) {
    fmt::print(
        "{} new tokens a sequence, greedy, {}; {} ranks x {} threads, median of {}. Limit: every "
        "weight that\nis used and the keys and values read once, at the speed of STREAM triad\n",
        kNewTokens, options.config.train.dtype, session.comm().size(), stream.num_threads(),
        options.repeats);
    fmt::print("{:>6} {:>12} {:>12} {:>12} {:>8} {:>12} {:>8}\n", "batch", "ms a token", "tokens/s",
               "MB a token", "GB/s", "limit, ms", "x limit");
  }
  for (const std::int64_t num_seqs : {1, 16})
    bench_batch(session, stream, options, model, num_seqs);
  return ExitCode::ok;
}

}  // namespace arcus
