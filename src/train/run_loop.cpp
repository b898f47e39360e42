#include "src/train/run_loop.hpp"

#include <cerrno>
#include <chrono>
#include <fstream>
#include <optional>
#include <system_error>

#include "src/base/log.hpp"
#include "src/train/routing_trace.hpp"

namespace arcus {
namespace {

/// metrics.jsonl of rank 0; other ranks write nothing.
class MetricsLog {
 public:
  MetricsLog(const std::filesystem::path& dir, int rank, std::int64_t steps_done) {
    if (rank != 0 || dir.empty()) return;
    file_ = dir / "metrics.jsonl";
    kept_ = cut_metrics(file_.string(), steps_done);
    if (kept_.damaged_lines > 0) {
      spdlog::warn("dropped {} damaged line{} from {}", kept_.damaged_lines,
                   kept_.damaged_lines == 1 ? "" : "s", file_.string());
    }
    out_.open(file_, std::ios::app);
    ARCUS_REQUIRE(out_.is_open(), ExitCode::usage, "cannot write {}: {}", file_.string(),
                  std::generic_category().message(errno));
  }
  template <class Metrics>
  void write(const Metrics& metrics) {
    if (!out_.is_open()) return;
    // A line that met a full disk may stand there in part: the next one starts afresh.
    out_ << (broken_ ? "\n" : "") << to_json_line(metrics) << '\n' << std::flush;
    broken_ = !out_;
    if (!out_ && !warned_) {
      spdlog::warn("cannot write {} (is the disk full?); training goes on", file_.string());
      warned_ = true;
    }
    out_.clear();
  }

  const KeptMetrics& kept() const { return kept_; }

 private:
  std::filesystem::path file_;
  std::ofstream out_;
  KeptMetrics kept_;
  bool broken_ = false;
  bool warned_ = false;
};

class Run {
 public:
  Run(Trainer& trainer, const BatchSampler& sampler, const TokenDataset& dataset,
      const DataConfig& data, const RunOptions& options, const RunHooks& hooks)
      : trainer_(trainer),
        sampler_(sampler),
        dataset_(dataset),
        data_(data),
        options_(options),
        hooks_(hooks),
        log_(options.run_dir, trainer.instance().world().rank(), trainer.steps_done()),
        last_save_(trainer.steps_done()),
        last_eval_(agreed_last_eval()) {}

  RunEnd run() {
    const std::int64_t steps = trainer_.options().train.steps;
    RunEnd end = RunEnd::finished;
    while (trainer_.steps_done() < steps) {
      const StepRequests requests = step();
      if (requests.time_up) end = RunEnd::time_up;
      if (requests.stop) end = RunEnd::stopped;
      if (trainer_.bad_steps_in_a_row() >= options_.max_bad_steps) end = RunEnd::diverged;
      if (end != RunEnd::finished || trainer_.steps_done() >= steps) break;
      if (due(options_.checkpoint.every)) save(false);
      if (due(options_.eval.every)) evaluate_now();
    }
    // A signal leaves little time: save first, and leave the evaluation to the resumed run.
    if (trainer_.steps_done() != last_save_) save(true);
    if (end == RunEnd::finished && trainer_.steps_done() != last_eval_) evaluate_now();
    return end;
  }

 private:
  /// The last evaluation on record, which rank 0 alone has read.
  std::int64_t agreed_last_eval() {
    std::int64_t step = log_.kept().last_eval_step;
    Stream& stream = trainer_.instance().stream();
    stream.wait(
        trainer_.instance().world().broadcast(stream, {.buffer = {&step, DType::i64, 1, 1}}));
    return step;
  }

  bool due(std::int64_t every) const { return every > 0 && trainer_.steps_done() % every == 0; }

  StepRequests step() {
    StepRequests requests{.stop = hooks_.stop_requested && hooks_.stop_requested(),
                          .time_up = time_is_up()};
    const std::int64_t next = trainer_.steps_done() + 1;
    if (options_.trace_routing_every > 0 && next % options_.trace_routing_every == 0) trace(next);
    const StepMetrics metrics = trainer_.step(sampler_, requests);
    trainer_.set_observer({});
    trace_.reset();
    log_.write(metrics);
    if (hooks_.on_step) hooks_.on_step(metrics);
    return requests;
  }

  /// Traces the routing of the step to come.
  void trace(std::int64_t step) {
    const Communicator& world = trainer_.instance().world();
    try_to_trace([&] { trace_.emplace(options_.run_dir, step, world.rank(), world.size()); });
    trainer_.set_observer([this](std::int64_t layer, const MicroBatch& batch, const Routing& r) {
      if (trace_) try_to_trace([&] { trace_->add(layer, batch, r); });
    });
  }

  /// A trace that cannot be written (a full disk) is given up; training goes on.
  template <class Fn>
  void try_to_trace(Fn&& fn) {
    try {
      fn();
    } catch (const Error& error) {
      spdlog::warn("no more routing traces: {}; training goes on", error.what());
      trace_.reset();
      options_.trace_routing_every = 0;
    }
  }

  bool time_is_up() const {
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin_;
    return options_.max_minutes > 0 && spent.count() >= options_.max_minutes * 60;
  }

  void evaluate_now() {
    const EvalMetrics metrics =
        evaluate(trainer_.instance(), dataset_, data_, {}, options_.eval.batches,
                 trainer_.steps_done(), trainer_.layer_heartbeat());
    last_eval_ = trainer_.steps_done();
    log_.write(metrics);
    if (hooks_.on_eval) hooks_.on_eval(metrics);
  }

  void save(bool last) {
    if (!hooks_.save) return;
    try {
      hooks_.save();
      last_save_ = trainer_.steps_done();
    } catch (const Error& error) {
      if (last || error.code() != ExitCode::checkpoint) throw;
      if (trainer_.instance().world().rank() != 0) return;
      spdlog::error(
          "the checkpoint of step {} was not saved in {}: {}; training goes on, earlier "
          "checkpoints are as they were",
          trainer_.steps_done(), options_.run_dir.string(), error.what());
    }
  }

  Trainer& trainer_;
  const BatchSampler& sampler_;
  const TokenDataset& dataset_;
  const DataConfig& data_;
  RunOptions options_;
  const RunHooks& hooks_;
  MetricsLog log_;
  std::optional<RoutingTrace> trace_;
  std::int64_t last_save_;
  std::int64_t last_eval_;
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

}  // namespace

RunEnd run_training(Trainer& trainer, const BatchSampler& sampler, const TokenDataset& dataset,
                    const DataConfig& data, const RunOptions& options, const RunHooks& hooks) {
  return Run(trainer, sampler, dataset, data, options, hooks).run();
}

}  // namespace arcus
