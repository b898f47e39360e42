#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "kernels/peak.hpp"
#include "launch/account.hpp"
#include "launch/bench.hpp"
#include "launch/made_up_data.hpp"
#include "launch/memory_check.hpp"
#include "launch/run_setup.hpp"
#include "launch/threads.hpp"
#include "src/base/error.hpp"
#include "src/base/memory.hpp"
#include "src/train/evaluation.hpp"
#include "src/train/plan.hpp"

namespace arcus {
namespace {

/// Bytes that one step must move between memory and a rank's cores, apart from what stays in
/// caches.
struct MovedBytes {
  double weights = 0;      ///< read forward and backward, once per micro-batch
  double sums = 0;         ///< gradients read and written once per micro-batch
  double activations = 0;  ///< written and read once per micro-batch
  double optimizer = 0;    ///< its state and weights read and written, sums read twice, per step
  double sum() const { return weights + sums + activations + optimizer; }
};

MovedBytes bytes_per_step(ModelInstance& instance, const Trainer& trainer) {
  const double rounds = static_cast<double>(
      MicroBatchSchedule{instance.options().num_micro_batches, instance.world().size()}.rounds());
  MovedBytes moved;
  for (const ByteRow& row : instance.byte_rows()) {
    const double bytes = 2 * rounds * static_cast<double>(row.balanced);
    if (row.purpose == "parameters") moved.weights = bytes;
    if (row.purpose == "gradient sums") moved.sums = bytes - static_cast<double>(row.balanced);
    if (row.purpose == "saved activations") moved.activations = bytes;
  }
  moved.optimizer = 2 * static_cast<double>(trainer.optimizer_bytes()) + moved.weights / rounds +
                    2 * moved.sums / (2 * rounds - 1);
  return moved;
}

/// Memory of the rank that took most: what was planned for it and what it took, in bytes.
struct MemoryFigures {
  double planned_even = 0, planned_worst = 0, measured = 0;
};

MemoryFigures memory_figures(Session& session, ModelInstance& instance, const Trainer& trainer,
                             std::int64_t before) {
  auto planned_even = static_cast<double>(trainer.optimizer_bytes());
  double planned_worst = planned_even;
  for (const ByteRow& row : instance.byte_rows()) {
    planned_even += static_cast<double>(row.balanced);
    planned_worst += static_cast<double>(row.worst);
  }
  const auto measured = gather(session, static_cast<double>(peak_memory() - before));
  const auto even = gather(session, planned_even);
  const auto worst = gather(session, planned_worst);
  const auto largest = static_cast<std::size_t>(std::max_element(measured.begin(), measured.end()) -
                                                measured.begin());
  return {even[largest], worst[largest], measured[largest]};
}

struct StepFigures {
  Samples samples;
  Samples forward;                    ///< evaluation, of as many tokens as a step has
  std::vector<StepAccount> accounts;  ///< of every rank, if asked for
  MemoryFigures memory;
  double load = 0;   ///< of the last step: tokens of the busiest expert / mean, worst layer
  double flops = 0;  ///< of all ranks, per step
  MovedBytes bytes;  ///< of all ranks, per step
};

/// Times the evaluation that `arcus train` and `arcus eval` use.
void time_forward(Session& session, Stream& stream, const Config& config, ModelInstance& instance,
                  const TokenDataset& dataset, const BenchOptions& options, StepFigures& figures) {
  const std::int64_t batches = config.train.global_batch_seqs / config.train.micro_batch_seqs;
  std::int64_t tokens = 0;
  figures.forward = measure(session, stream, options.repeats, [&] {
    const EvalMetrics eval = evaluate(instance, dataset, config.data, {}, batches, 0);
    tokens = 0;
    for (const DomainEval& domain : eval.domains) tokens += domain.tokens;
  });
  if (tokens == 0) figures.forward.ms.clear();  // no held-out text
  const auto wanted = static_cast<double>(config.train.global_batch_seqs * config.train.seq_len);
  for (double& ms : figures.forward.ms) ms *= wanted / static_cast<double>(tokens);
}

/// Where the time of `steps` steps goes, on every rank.
struct ProfiledSteps {
  Profile profile;
  double seconds = 0;
};

/// Steps with a profile; the spans of one go to options.trace if that is set.
void profile_steps(Session& session, Stream& stream, Trainer& trainer, const BatchSampler& sampler,
                   const BenchOptions& options, ProfiledSteps& result) {
  const auto steps = [&](std::int64_t count, bool with_events) {
    session.comm().barrier(stream);
    result.profile.start(with_events);
    const auto begin = std::chrono::steady_clock::now();
    for (std::int64_t i = 0; i < count; ++i) {
      const Span span(stream, "step");
      StepRequests requests;
      trainer.step(sampler, requests);
    }
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  };
  stream.set_profile(&result.profile);
  if (!options.trace.empty()) {
    steps(1, true);
    write_trace(session, result.profile, options.trace);
  }
  result.seconds = steps(options.repeats, false);
  stream.set_profile(nullptr);
}

/// Times whole steps of the Trainer that `arcus train` uses, with plain sums only those.
StepFigures time_steps(Session& session, Stream& stream, const Config& config,
                       const TokenDataset& dataset, const BenchOptions& options,
                       ProfiledSteps* profiled) {
  const TrainerOptions trainer_config = trainer_options(config, resolve_model(config, &dataset));
  const int ep_size =
      resolve_ep_size(config.parallel.ep_size, session.comm().size(), config.model.num_experts);
  reset_peak_memory();
  const std::int64_t memory_before = resident_memory();
  ModelInstance instance(make_process_groups(session.comm(), ep_size), stream,
                         instance_options(trainer_config));
  Trainer trainer(instance, trainer_config);
  instance.build_primitives();
  trainer.initialize();
  const BatchSampler sampler(dataset, config.data, config.train.seq_len, config.run.seed);
  StepFigures figures;
  figures.samples = measure(session, stream, options.repeats, [&] {
    StepRequests requests;
    trainer.step(sampler, requests);
  });
  figures.memory = memory_figures(session, instance, trainer, memory_before);
  for (const LayerMetrics& layer : trainer.metrics().layers) {
    figures.load = std::max(figures.load, layer.max_mean_load);
  }
  const double tokens = static_cast<double>(config.train.global_batch_seqs * config.train.seq_len);
  figures.flops = tokens * instance.transformer().training_flops_per_token(config.train.seq_len);
  const MovedBytes own = bytes_per_step(instance, trainer);
  figures.bytes = {sum_over_ranks(session, own.weights), sum_over_ranks(session, own.sums),
                   sum_over_ranks(session, own.activations),
                   sum_over_ranks(session, own.optimizer)};
  if (!config.run.reproducible) return figures;
  time_forward(session, stream, config, instance, dataset, options, figures);
  if (profiled != nullptr) {
    profile_steps(session, stream, trainer, sampler, options, *profiled);
  }
  return figures;
}

struct Machine {
  double gflops = 0;  ///< of all ranks together
  double gbytes = 0;  ///< GB/s of all ranks together
};

Machine measure_machine(Session& session, Stream& stream, DType dtype) {
  session.comm().barrier(stream);
  Machine machine;
  machine.gflops = sum_over_ranks(session, measure_gemm_peak(stream, dtype));
  session.comm().barrier(stream);
  machine.gbytes = sum_over_ranks(session, measure_triad(stream));
  return machine;
}

/// All that one run of the benchmark found.
struct StepReport {
  StepFigures exact;  ///< with sums as the configuration has them: order-independent
  StepFigures plain;  ///< with plain f32 sums
  Machine machine;
  int num_ranks = 1, num_threads = 1;

  double compute_ms() const { return exact.flops / machine.gflops / 1e6; }
  double memory_ms() const { return exact.bytes.sum() / machine.gbytes / 1e6; }
  double roofline_ms() const { return compute_ms() + memory_ms(); }
  double share_of_peak() const { return compute_ms() / exact.samples.median(); }
  /// Backward is twice the forward pass.
  double forward_share_of_peak() const { return compute_ms() / 3 / exact.forward.median(); }
};

void print_table(const Config& config, const StepReport& report) {
  const double tokens = static_cast<double>(config.train.global_batch_seqs * config.train.seq_len);
  const auto line = [&](const char* what, double ms, const std::string& note) {
    fmt::print("{:<44} {:>10.2f} {:>12.0f}  {}\n", what, ms, tokens / ms * 1e3, note);
  };
  const StepFigures& exact = report.exact;
  fmt::print("{:<44} {:>10} {:>12}\n", "", "ms a step", "tokens/s");
  line("step", exact.samples.median(),
       fmt::format("{:.0f} % of the measured peak; {:.2f} to {:.2f} ms; load {:.2f}x",
                   100 * report.share_of_peak(), exact.samples.least(), exact.samples.most(),
                   exact.load));
  line("step with plain f32 sums", report.plain.samples.median(),
       fmt::format("order-independent sums cost {:+.1f} %",
                   100 * (exact.samples.median() / report.plain.samples.median() - 1)));
  if (!exact.forward.ms.empty()) {
    line("forward alone (evaluation)", exact.forward.median(),
         fmt::format("{:.0f} % of the measured peak", 100 * report.forward_share_of_peak()));
  }
  line("roofline", report.roofline_ms(),
       fmt::format("{:.0f} % of it is reached",
                   100 * report.roofline_ms() / exact.samples.median()));
  line("  operations at the measured peak", report.compute_ms(),
       fmt::format("{:.2f} GFLOP at {:.1f} GFLOP/s", exact.flops / 1e9, report.machine.gflops));
  line("  bytes at the measured memory speed", report.memory_ms(),
       fmt::format("{:.3f} GB at {:.1f} GB/s", exact.bytes.sum() / 1e9, report.machine.gbytes));
  const auto text = [](double bytes) { return bytes_text(static_cast<std::int64_t>(bytes)); };
  fmt::print(
      "memory of the rank that took most: {} measured; planned {} with even load, {} at worst\n",
      text(exact.memory.measured), text(exact.memory.planned_even),
      text(exact.memory.planned_worst));
}

nlohmann::json to_json(const Samples& samples) {
  if (samples.ms.empty()) return nullptr;
  return {{"median", samples.median()}, {"least", samples.least()}, {"most", samples.most()}};
}

nlohmann::json to_json(const Config& config, const StepReport& report) {
  const StepFigures& exact = report.exact;
  nlohmann::json json = {
      {"ranks", report.num_ranks},
      {"threads", report.num_threads},
      {"dtype", config.train.dtype},
      {"num_experts", config.model.num_experts},
      {"hidden_size", config.model.hidden_size},
      {"vocab_size", config.model.vocab_size},
      {"seq_len", config.train.seq_len},
      {"micro_batch_tokens", config.train.micro_batch_seqs * config.train.seq_len},
      {"tokens", config.train.global_batch_seqs * config.train.seq_len},
      {"step_ms", to_json(exact.samples)},
      {"plain_sums_step_ms", to_json(report.plain.samples)},
      {"forward_ms", to_json(exact.forward)},
      {"load", exact.load},
      {"flop", exact.flops},
      {"peak_gflop_per_s", report.machine.gflops},
      {"triad_gb_per_s", report.machine.gbytes},
      {"share_of_peak", report.share_of_peak()},
      {"share_of_roofline", report.roofline_ms() / exact.samples.median()},
      {"bytes",
       {{"weights", exact.bytes.weights},
        {"sums", exact.bytes.sums},
        {"activations", exact.bytes.activations},
        {"optimizer", exact.bytes.optimizer}}},
      {"memory",
       {{"measured", exact.memory.measured},
        {"planned_even", exact.memory.planned_even},
        {"planned_worst", exact.memory.planned_worst}}}};
  if (!exact.forward.ms.empty()) json["forward_share_of_peak"] = report.forward_share_of_peak();
  if (exact.accounts.empty()) return json;
  const StepAccount mean = mean_account(exact.accounts);
  for (std::size_t row = 0; row < StepAccount::kNumRows; ++row) {
    json["account_ms"][StepAccount::names()[row]] = mean.ms[row];
  }
  json["account_ms"]["step"] = mean.step_ms;
  return json;
}

void write_json(const nlohmann::json& json, const std::string& file) {
  std::ofstream out(file, std::ios::trunc);
  out << json.dump(2) << '\n';
  out.close();
  ARCUS_REQUIRE(out.good(), ExitCode::usage, "cannot write {}: is the folder there?", file);
}

}  // namespace

ExitCode bench_step(Session& session, const BenchOptions& options) {
  std::unique_ptr<MadeUpData> made_up;
  Config config = options.config;
  session.together([&] {
    if (session.is_root() && !options.json.empty()) write_json(nullptr, options.json);
    ARCUS_REQUIRE(config.run.data.empty() || options.repeated == 0, ExitCode::usage,
                  "--repeated {} is about made-up text, but run.data is {}; leave one of them out",
                  options.repeated, config.run.data);
  });
  if (config.run.data.empty()) {
    made_up = std::make_unique<MadeUpData>(session, options.repeated);
    config.run.data = made_up->tokens().string();
  }
  const TokenDataset dataset = open_dataset(session, config.run.data);
  session.together([&] {
    config.model = resolve_model(config, &dataset);
    resolve_ep_size(config.parallel.ep_size, session.comm().size(), config.model.num_experts);
  });
  Stream stream(threads_per_rank(config.parallel, session.comm(), session.stream()));
  const DType dtype = dtype_from_name(config.train.dtype);
  checked_plan(session, config, trainer_options(config, config.model), stream.num_threads());
  if (session.is_root()) {
    fmt::print(
        "{} layers, hidden {}, {} experts of {}, top {}; {} x {} tokens a step; {}; {} ranks "
        "x {} threads, median of {}\n",
        config.model.num_layers, config.model.hidden_size, config.model.num_experts,
        config.model.expert_ff_size, config.model.topk, config.train.global_batch_seqs,
        config.train.seq_len, config.train.dtype, session.comm().size(), stream.num_threads(),
        options.repeats);
  }
  StepReport report{.num_ranks = session.comm().size(), .num_threads = stream.num_threads()};
  const Machine before = measure_machine(session, stream, dtype);
  config.run.reproducible = true;
  ProfiledSteps profiled{Profile(stream.num_threads(), true)};
  const bool profiles = options.account || !options.trace.empty();
  report.exact =
      time_steps(session, stream, config, dataset, options, profiles ? &profiled : nullptr);
  config.run.reproducible = false;
  report.plain = time_steps(session, stream, config, dataset, options, nullptr);
  const Machine after = measure_machine(session, stream, dtype);
  // Clocks wander: the machine is measured on both sides.
  report.machine = {(before.gflops + after.gflops) / 2, (before.gbytes + after.gbytes) / 2};
  if (options.account) {
    const StepAccount own =
        account_of(profiled.profile, profiled.seconds, options.repeats,
                   report.machine.gflops / session.comm().size(), stream.num_threads());
    report.exact.accounts = gather_accounts(session, own);
  }
  if (session.is_root()) {
    print_table(config, report);
    if (options.account) print_accounts(report.exact.accounts);
  }
  session.together([&] {
    if (session.is_root() && !options.json.empty()) {
      write_json(to_json(config, report), options.json);
    }
  });
  return ExitCode::ok;
}

}  // namespace arcus
