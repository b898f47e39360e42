#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <functional>
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

/// The Trainer that `arcus train` uses, ready for its first step.
class BenchedModel {
 public:
  BenchedModel(Session& session, int num_threads, const Config& config, const TokenDataset& dataset)
      : stream_(num_threads),
        config_(config),
        dataset_(dataset),
        options_(trainer_options(config_, config_.model)),
        instance_(make_process_groups(session.comm(), resolve_ep_size(config.parallel.ep_size,
                                                                      session.comm().size(),
                                                                      config.model.num_experts)),
                  stream_, instance_options(options_)),
        trainer_(instance_, options_),
        sampler_(dataset, config_.data, config_.train.seq_len, config_.run.seed) {
    instance_.build_primitives();
    trainer_.initialize();
  }

  Stream& stream() { return stream_; }
  ModelInstance& instance() { return instance_; }
  const Trainer& trainer() const { return trainer_; }

  void step() {
    const Span span(stream_, "step");
    StepRequests requests;
    trainer_.step(sampler_, requests);
  }
  /// The evaluation of `arcus train` and `arcus eval` on about as many tokens as a step has;
  /// returns how many they were, 0 without held-out text.
  std::int64_t forward() {
    const std::int64_t batches = config_.train.global_batch_seqs / config_.train.micro_batch_seqs;
    const EvalMetrics eval = evaluate(instance_, dataset_, config_.data, {}, batches, 0);
    std::int64_t tokens = 0;
    for (const DomainEval& domain : eval.domains) tokens += domain.tokens;
    return tokens;
  }
  /// Of the last step: tokens of the busiest expert / mean, worst layer.
  double load() const {
    double load = 0;
    for (const LayerMetrics& layer : trainer_.metrics().layers) {
      load = std::max(load, layer.max_mean_load);
    }
    return load;
  }

 private:
  Stream stream_;
  Config config_;
  const TokenDataset& dataset_;
  TrainerOptions options_;
  ModelInstance instance_;
  Trainer trainer_;
  BatchSampler sampler_;
};

/// What was measured of the run with order-independent sums, of the one with plain sums and of the
/// machine, in turn, so that a busy moment hits all of them.
struct StepReport {
  Samples step;        ///< with order-independent sums
  Samples plain_step;  ///< with plain f32 sums; none where two models do not fit
  Samples forward;     ///< evaluation, of as many tokens as a step has; none without held-out text
  std::vector<StepAccount> accounts;  ///< of every rank, if asked for
  MemoryFigures memory;
  double load = 0;
  double flops = 0;   ///< of all ranks, per step
  MovedBytes bytes;   ///< of all ranks, per step
  double gflops = 0;  ///< of all ranks together, as measured of the machine
  double gbytes = 0;  ///< GB/s of all ranks together
  int num_ranks = 1, num_threads = 1;

  double compute_ms() const { return flops / gflops / 1e6; }
  double memory_ms() const { return bytes.sum() / gbytes / 1e6; }
  double roofline_ms() const { return compute_ms() + memory_ms(); }
  double share_of_peak() const { return compute_ms() / step.median(); }
  /// Backward is twice the forward pass.
  double forward_share_of_peak() const { return compute_ms() / 3 / forward.median(); }
};

/// Steps with a profile; the spans of one go to options.trace if that is set.
std::vector<StepAccount> profile_steps(Session& session, BenchedModel& model,
                                       const BenchOptions& options, double gflops) {
  Stream& stream = model.stream();
  Profile profile(stream.num_threads(), true);
  const auto seconds_of = [&](std::int64_t steps, bool with_events) {
    session.comm().barrier(stream);
    profile.start(with_events);
    const auto begin = std::chrono::steady_clock::now();
    for (std::int64_t i = 0; i < steps; ++i) model.step();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  };
  stream.set_profile(&profile);
  if (!options.trace.empty()) {
    seconds_of(1, true);
    write_trace(session, profile, options.trace);
  }
  std::vector<StepAccount> accounts;
  if (options.account) {
    const double seconds = seconds_of(options.repeats, false);
    accounts =
        gather_accounts(session, account_of(profile, seconds, options.repeats,
                                            gflops / session.comm().size(), stream.num_threads()));
  }
  stream.set_profile(nullptr);
  return accounts;
}

/// Whether this machine has room for a second model as large as the first. Collective.
bool another_fits(Session& session, const BenchedModel& model, ModelInstance& instance) {
  std::int64_t bytes = model.trainer().optimizer_bytes();
  for (const ByteRow& row : instance.byte_rows()) bytes += row.worst;
  const std::int64_t free = memory_per_rank(session.comm().node_size());
  return sum_over_ranks(session, free > 0 && free < bytes ? 1 : 0) == 0;
}

StepReport measure_steps(Session& session, Stream& stream, Config config,
                         const TokenDataset& dataset, const BenchOptions& options) {
  constexpr int kWarmUp = 2;
  StepReport report{.num_ranks = session.comm().size(), .num_threads = stream.num_threads()};
  reset_peak_memory();
  const std::int64_t memory_before = resident_memory();
  config.run.reproducible = true;
  BenchedModel exact(session, stream.num_threads(), config, dataset);
  for (int i = 0; i < kWarmUp; ++i) exact.step();
  report.memory = memory_figures(session, exact.instance(), exact.trainer(), memory_before);
  config.run.reproducible = false;
  std::unique_ptr<BenchedModel> plain;
  if (another_fits(session, exact, exact.instance())) {
    plain = std::make_unique<BenchedModel>(session, stream.num_threads(), config, dataset);
  }
  std::int64_t evaluated = 0;
  std::vector<double> gflops;
  std::vector<std::function<void()>> things = {
      [&] { exact.step(); },
      [&] { gflops.push_back(measure_gemm_peak(stream, dtype_from_name(config.train.dtype))); },
      [&] { evaluated = exact.forward(); }};
  if (plain) things.emplace_back([&] { plain->step(); });
  const auto samples = measure_in_turn(session, stream, options.repeats, things, kWarmUp);
  report.step = samples[0];
  report.gflops = sum_over_ranks(session, Samples{gflops}.median());
  report.gbytes = sum_over_ranks(session, measure_triad(stream));
  const auto wanted = static_cast<double>(config.train.global_batch_seqs * config.train.seq_len);
  if (evaluated > 0) report.forward = samples[2];
  for (double& ms : report.forward.ms) ms *= wanted / static_cast<double>(evaluated);
  if (plain) report.plain_step = samples[3];
  report.load = exact.load();
  report.flops =
      wanted * exact.instance().transformer().training_flops_per_token(config.train.seq_len);
  const MovedBytes own = bytes_per_step(exact.instance(), exact.trainer());
  report.bytes = {sum_over_ranks(session, own.weights), sum_over_ranks(session, own.sums),
                  sum_over_ranks(session, own.activations), sum_over_ranks(session, own.optimizer)};
  report.accounts = profile_steps(session, exact, options, report.gflops);
  return report;
}

void print_table(const Config& config, const StepReport& report) {
  const double tokens = static_cast<double>(config.train.global_batch_seqs * config.train.seq_len);
  const auto line = [&](const char* what, double ms, const std::string& note) {
    fmt::print("{:<44} {:>10.2f} {:>12.0f}  {}\n", what, ms, tokens / ms * 1e3, note);
  };
  fmt::print("{:<44} {:>10} {:>12}\n", "", "ms a step", "tokens/s");
  line("step", report.step.median(),
       fmt::format("{:.0f} % of the measured peak; {:.2f} to {:.2f} ms; load {:.2f}x",
                   100 * report.share_of_peak(), report.step.least(), report.step.most(),
                   report.load));
  if (report.plain_step.ms.empty()) {
    fmt::print("step with plain f32 sums: not measured, a second model does not fit\n");
  } else {
    line("step with plain f32 sums", report.plain_step.median(),
         fmt::format("order-independent sums cost {:+.1f} %",
                     100 * (report.step.median() / report.plain_step.median() - 1)));
  }
  if (!report.forward.ms.empty()) {
    line("forward alone (evaluation)", report.forward.median(),
         fmt::format("{:.0f} % of the measured peak", 100 * report.forward_share_of_peak()));
  }
  line("roofline", report.roofline_ms(),
       fmt::format("{:.0f} % of it is reached", 100 * report.roofline_ms() / report.step.median()));
  line("  operations at the measured peak", report.compute_ms(),
       fmt::format("{:.2f} GFLOP at {:.1f} GFLOP/s", report.flops / 1e9, report.gflops));
  line("  bytes at the measured memory speed", report.memory_ms(),
       fmt::format("{:.3f} GB at {:.1f} GB/s", report.bytes.sum() / 1e9, report.gbytes));
  const auto text = [](double bytes) { return bytes_text(static_cast<std::int64_t>(bytes)); };
  fmt::print(
      "memory of the rank that took most: {} measured; planned {} with even load, {} at worst\n",
      text(report.memory.measured), text(report.memory.planned_even),
      text(report.memory.planned_worst));
}

nlohmann::json to_json(const Samples& samples) {
  if (samples.ms.empty()) return nullptr;
  return {{"median", samples.median()}, {"least", samples.least()}, {"most", samples.most()}};
}

nlohmann::json to_json(const Config& config, const StepReport& report) {
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
      {"step_ms", to_json(report.step)},
      {"plain_sums_step_ms", to_json(report.plain_step)},
      {"forward_ms", to_json(report.forward)},
      {"load", report.load},
      {"flop", report.flops},
      {"peak_gflop_per_s", report.gflops},
      {"triad_gb_per_s", report.gbytes},
      {"share_of_peak", report.share_of_peak()},
      {"share_of_roofline", report.roofline_ms() / report.step.median()},
      {"bytes",
       {{"weights", report.bytes.weights},
        {"sums", report.bytes.sums},
        {"activations", report.bytes.activations},
        {"optimizer", report.bytes.optimizer}}},
      {"memory",
       {{"measured", report.memory.measured},
        {"planned_even", report.memory.planned_even},
        {"planned_worst", report.memory.planned_worst}}}};
  if (!report.forward.ms.empty()) json["forward_share_of_peak"] = report.forward_share_of_peak();
  if (report.accounts.empty()) return json;
  const StepAccount mean = mean_account(report.accounts);
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
  Stream stream(set_up_threads(config.parallel, session.comm(), session.stream()));
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
  const StepReport report = measure_steps(session, stream, config, dataset, options);
  if (session.is_root()) {
    print_table(config, report);
    if (options.account) print_accounts(report.accounts);
  }
  session.together([&] {
    if (session.is_root() && !options.json.empty()) {
      write_json(to_json(config, report), options.json);
    }
  });
  return ExitCode::ok;
}

}  // namespace arcus
