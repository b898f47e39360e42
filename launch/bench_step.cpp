#include <fmt/format.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "kernels/peak.hpp"
#include "launch/account.hpp"
#include "launch/bench.hpp"
#include "launch/run_setup.hpp"
#include "launch/threads.hpp"
#include "src/base/error.hpp"
#include "src/base/rng.hpp"
#include "src/data/prepare.hpp"
#include "src/train/evaluation.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;

/// A data set of made-up text in a temporary folder on every node's first rank, for runs without
/// run.data: what the text says does not matter for speed.
class MadeUpData {
 public:
  explicit MadeUpData(Session& session) : owner_(session.comm().node_local_rank() == 0) {
    // Ranks of one node share the folder, whose first rank names it; nodes may share a disk.
    const auto node = session.comm().split_by_node();
    const std::string name = broadcast_text(
        *node, session.stream(), fmt::format("arcus-bench-{}-{}", session.rank(), getpid()));
    dir_ = fs::temp_directory_path() / name;
    session.together([&] {
      if (owner_) write();
    });
  }
  ~MadeUpData() {
    std::error_code ignored;
    if (owner_) fs::remove_all(dir_, ignored);
  }
  MadeUpData(const MadeUpData&) = delete;
  MadeUpData& operator=(const MadeUpData&) = delete;

  fs::path tokens() const { return dir_ / "tokens"; }

 private:
  void write() const {
    fs::create_directories(dir_ / "text");
    const Rng rng(1, "bench", "text");
    for (std::uint64_t document = 0; document < 64; ++document) {
      std::ofstream file(dir_ / "text" / fmt::format("{}.txt", document));
      for (std::uint64_t word = 0; word < 4000; ++word) {
        file << rng.words(document, word)[0] % 100000 << (word % 12 == 11 ? '\n' : ' ');
      }
    }
    PrepareOptions options{.out = dir_ / "tokens", .force = true};
    options.domains = {{.name = "numbers", .paths = {(dir_ / "text").string()}}};
    prepare(options);
  }

  bool owner_;
  fs::path dir_;
};

/// Bytes that one step must move between memory and a rank's cores, apart from what stays in
/// caches: weights read forward and backward and sums read and written once per micro-batch,
/// activations written and read, the optimizer's state read and written.
double bytes_per_step(ModelInstance& instance, const Trainer& trainer) {
  double weights = 0;
  double sums = 0;
  double activations = 0;
  for (const ByteRow& row : instance.byte_rows()) {
    const auto bytes = static_cast<double>(row.balanced);
    if (row.purpose == "parameters") weights = bytes;
    if (row.purpose == "gradient sums") sums = bytes;
    if (row.purpose == "saved activations") activations = bytes;
  }
  const double rounds = static_cast<double>(
      MicroBatchSchedule{instance.options().num_micro_batches, instance.world().size()}.rounds());
  return rounds * (2 * weights + 2 * sums + 2 * activations) +
         2 * static_cast<double>(trainer.optimizer_bytes());
}

struct StepFigures {
  Samples samples;
  Samples forward;              ///< evaluation, of as many tokens as a step has
  double profiled_seconds = 0;  ///< of options.repeats steps with a profile
  double flops = 0;             ///< of all ranks, per step
  double bytes = 0;             ///< of all ranks, per step
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

/// Times whole steps of the Trainer that `arcus train` uses.
StepFigures time_steps(Session& session, Stream& stream, const Config& config,
                       const TokenDataset& dataset, const BenchOptions& options, bool with_forward,
                       Profile* profile, const std::string& trace) {
  const TrainerOptions trainer_config = trainer_options(config, resolve_model(config, &dataset));
  const int ep_size =
      resolve_ep_size(config.parallel.ep_size, session.comm().size(), config.model.num_experts);
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
  if (with_forward) time_forward(session, stream, config, instance, dataset, options, figures);
  if (profile != nullptr) {
    stream.set_profile(profile);
    const auto steps = [&](std::int64_t count, bool with_events) {
      session.comm().barrier(stream);
      profile->start(with_events);
      const auto begin = std::chrono::steady_clock::now();
      for (std::int64_t i = 0; i < count; ++i) {
        const Span span(stream, "step");
        StepRequests requests;
        trainer.step(sampler, requests);
      }
      return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    };
    if (!trace.empty()) {
      steps(1, true);
      write_trace(session, *profile, trace);
    }
    figures.profiled_seconds = steps(options.repeats, false);
    stream.set_profile(nullptr);
  }
  const double tokens = static_cast<double>(config.train.global_batch_seqs * config.train.seq_len);
  figures.flops = tokens * instance.transformer().training_flops_per_token(config.train.seq_len);
  figures.bytes = sum_over_ranks(session, bytes_per_step(instance, trainer));
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

void print_table(const Config& config, const StepFigures& exact, const StepFigures& plain,
                 const Machine& machine) {
  const double tokens = static_cast<double>(config.train.global_batch_seqs * config.train.seq_len);
  const double compute_ms = exact.flops / machine.gflops / 1e6;
  const double memory_ms = exact.bytes / machine.gbytes / 1e6;
  const double roofline_ms = compute_ms + memory_ms;
  const auto line = [&](const char* what, double ms, const std::string& note) {
    fmt::print("{:<44} {:>10.2f} {:>12.0f}  {}\n", what, ms, tokens / ms * 1e3, note);
  };
  fmt::print("{:<44} {:>10} {:>12}\n", "", "ms a step", "tokens/s");
  line("step", exact.samples.median(),
       fmt::format("{:.0f} % of the measured peak; {:.2f} to {:.2f} ms",
                   100 * compute_ms / exact.samples.median(), exact.samples.least(),
                   exact.samples.most()));
  line("step with plain f32 sums", plain.samples.median(),
       fmt::format("order-independent sums cost {:+.1f} %",
                   100 * (exact.samples.median() / plain.samples.median() - 1)));
  if (!exact.forward.ms.empty()) {
    // Backward is twice the forward pass.
    line("forward alone (evaluation)", exact.forward.median(),
         fmt::format("{:.0f} % of the measured peak",
                     100 * compute_ms / 3 / exact.forward.median()));
  }
  line("roofline", roofline_ms,
       fmt::format("{:.0f} % of it is reached", 100 * roofline_ms / exact.samples.median()));
  line("  operations at the measured peak", compute_ms,
       fmt::format("{:.2f} GFLOP at {:.1f} GFLOP/s", exact.flops / 1e9, machine.gflops));
  line("  bytes at the measured memory speed", memory_ms,
       fmt::format("{:.3f} GB at {:.1f} GB/s", exact.bytes / 1e9, machine.gbytes));
}

}  // namespace

ExitCode bench_step(Session& session, const BenchOptions& options) {
  std::unique_ptr<MadeUpData> made_up;
  Config config = options.config;
  if (config.run.data.empty()) {
    made_up = std::make_unique<MadeUpData>(session);
    config.run.data = made_up->tokens().string();
  }
  const TokenDataset dataset = open_dataset(session, config.run.data);
  session.together([&] {
    resolve_model(config, &dataset);
    resolve_ep_size(config.parallel.ep_size, session.comm().size(), config.model.num_experts);
  });
  Stream stream(threads_per_rank(config.parallel, session.comm(), session.stream()));
  const DType dtype = dtype_from_name(config.train.dtype);
  if (session.is_root()) {
    fmt::print(
        "{} layers, hidden {}, {} experts of {}, top {}; {} x {} tokens a step; {}; {} ranks "
        "x {} threads, median of {}\n",
        config.model.num_layers, config.model.hidden_size, config.model.num_experts,
        config.model.expert_ff_size, config.model.topk, config.train.global_batch_seqs,
        config.train.seq_len, config.train.dtype, session.comm().size(), stream.num_threads(),
        options.repeats);
  }
  const Machine before = measure_machine(session, stream, dtype);
  config.run.reproducible = true;
  Profile profile(stream.num_threads(), true);
  const bool profiled = options.account || !options.trace.empty();
  const StepFigures exact = time_steps(session, stream, config, dataset, options, true,
                                       profiled ? &profile : nullptr, options.trace);
  config.run.reproducible = false;
  const StepFigures plain =
      time_steps(session, stream, config, dataset, options, false, nullptr, "");
  const Machine after = measure_machine(session, stream, dtype);
  // Clocks wander: the machine is measured on both sides.
  const Machine machine{(before.gflops + after.gflops) / 2, (before.gbytes + after.gbytes) / 2};
  if (session.is_root()) print_table(config, exact, plain, machine);
  if (options.account) {
    print_account(session,
                  account_of(profile, exact.profiled_seconds, options.repeats,
                             machine.gflops / session.comm().size(), stream.num_threads()));
  }
  return ExitCode::ok;
}

}  // namespace arcus
