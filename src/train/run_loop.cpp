#include "src/train/run_loop.hpp"

#include <cerrno>
#include <chrono>
#include <fstream>
#include <optional>
#include <set>
#include <system_error>
#include <utility>

#include "src/base/log.hpp"
#include "src/train/cross_check.hpp"
#include "src/train/routing_trace.hpp"

namespace arcus {
namespace {

/// metrics.jsonl of rank 0; other ranks write nothing.
class MetricsLog {
 public:
  MetricsLog(const std::filesystem::path& dir, int rank, std::int64_t steps_done) {
    if (rank != 0 || dir.empty()) return;
    file_ = dir / "metrics.jsonl";
    go_back(steps_done);
  }
  /// Cuts the file behind a step.
  void go_back(std::int64_t steps_done) {
    if (file_.empty()) return;
    out_.close();
    kept_ = cut_metrics(file_.string(), steps_done);
    if (kept_.damaged_lines > 0) {
      spdlog::warn("dropped {} damaged line{} from {}", kept_.damaged_lines,
                   kept_.damaged_lines == 1 ? "" : "s", file_.string());
    }
    broken_ = kept_.unterminated;
    out_.clear();
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
        first_step_(trainer.steps_done()),
        last_save_(trainer.steps_done()),
        last_eval_(agreed_last_eval()) {
    if (hooks.saver == nullptr) return;
    trainer.set_saving([&hooks] { return hooks.saver->busy(); });
    if (options.spike_factor > 0) {
      hooks.saver->keep(first_step_ - first_step_ % options.checkpoint.every);
    }
  }
  ~Run() { trainer_.set_saving({}); }
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;

  RunEnd run() {
    const std::int64_t steps = trainer_.options().train.steps;
    RunEnd end = RunEnd::finished;
    // One that was due when the run was cut short, and only saved.
    if (trainer_.steps_done() > 0 && trainer_.steps_done() < steps && due(options_.eval.every) &&
        trainer_.steps_done() != last_eval_) {
      evaluate_now();
    }
    while (trainer_.steps_done() < steps) {
      const StepRequests requests = step();
      if (options_.spike_factor > 0 && trainer_.spiked(options_.spike_factor)) go_back();
      if (requests.time_up) end = RunEnd::time_up;
      if (requests.stop) end = RunEnd::stopped;
      if (trainer_.bad_steps_in_a_row() >= options_.max_bad_steps) end = RunEnd::diverged;
      if (saving_ && !requests.saving) advance_save();
      if (end != RunEnd::finished || trainer_.steps_done() >= steps) break;
      if (due(options_.checkpoint.every) && trainer_.steps_done() != last_save_) start_save();
      if (due(options_.eval.every) && trainer_.steps_done() != last_eval_) evaluate_now();
    }
    // A signal leaves little time: save first, and leave the evaluation to the resumed run.
    finish_save();
    if (trainer_.steps_done() != last_save_ && hooks_.saver != nullptr) save_at_the_end();
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
    if (options_.verify_every > 0 && next % options_.verify_every == 0) cross_check(next);
    if (options_.trace_routing_every > 0 && next % options_.trace_routing_every == 0) trace(next);
    const StepMetrics metrics = trainer_.step(sampler_, requests);
    trainer_.set_observer({});
    trace_.reset();
    log_.write(metrics);
    if (hooks_.on_step) hooks_.on_step(metrics);
    return requests;
  }

  /// To the checkpoint before a spike of the loss; the samples since are passed by. Only multiples
  /// of checkpoint.every count, not what a stop saved between them, and behind the step where this
  /// process began only what it saved itself, not what another branch left: so the same one is
  /// taken however often the run was stopped, on any ranks.
  void go_back() {
    constexpr std::int64_t kMostTimes = 3;
    const std::int64_t spike = trainer_.steps_done();
    const std::int64_t samples = spike + trainer_.samples_ahead();
    const std::int64_t times = trainer_.times_back();
    const double loss = trainer_.metrics().loss;
    if (hooks_.saver == nullptr || (times >= kMostTimes && told_enough_)) return;
    finish_save();
    const bool back = times < kMostTimes && hooks_.saver->restore([&](std::int64_t step) {
      return step < spike && step % options_.checkpoint.every == 0 &&
             (step <= first_step_ || saved_.contains(step));
    });
    told_enough_ = times >= kMostTimes;
    if (is_root()) {
      spdlog::warn(
          "step {}: the loss, {:.4f}, is more than {} times its average "
          "(run.spike_factor); {}",
          spike, loss, options_.spike_factor,
          back ? fmt::format("back to step {}, past the samples since", trainer_.steps_done())
          : told_enough_ ? "training goes on, having gone back 3 times"
                         : "training goes on, since no checkpoint before it can be used");
    }
    if (!back) return;
    trainer_.set_back(samples - trainer_.steps_done(), times + 1);
    saved_.erase(saved_.upper_bound(trainer_.steps_done()), saved_.end());
    log_.go_back(trainer_.steps_done());
    last_eval_ = agreed_last_eval();
    // A run that is cut short now must not meet the same samples again.
    saved_step_ = trainer_.steps_done();
    try_to_save([&] {
      hooks_.saver->save();
      saved(saved_step_);
    });
  }

  void saved(std::int64_t step) {
    last_save_ = step;
    saved_.insert(step);
    if (options_.spike_factor > 0 && step % options_.checkpoint.every == 0) {
      hooks_.saver->keep(step);
    }
  }

  void cross_check(std::int64_t next) {
    if (!cross_check_)
      cross_check_.emplace(trainer_.instance(), trainer_.options(), trainer_.layer_heartbeat());
    const CrossCheckResult result = cross_check_->run(sampler_, trainer_.steps_done());
    if (!result.compared && !std::exchange(told_alone_, true)) {
      spdlog::warn("run.verify_every: one rank has nobody to be compared with");
    }
    ARCUS_REQUIRE(result.suspects.empty(), ExitCode::comm, "{}", to_text(result, next));
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

  void start_save() {
    if (hooks_.saver == nullptr) return;
    const std::int64_t keep_every = options_.checkpoint.keep_every;
    const bool milestone = keep_every > 0 && trainer_.steps_done() % keep_every == 0;
    // What a spike goes back to must not depend on how fast the disk is.
    if (saving_ && (milestone || options_.spike_factor > 0)) finish_save();
    if (saving_) {
      if (is_root() && !std::exchange(told_left_out_, true)) {
        spdlog::warn(
            "step {}: no checkpoint, since that of step {} is still being written; saves take "
            "longer "
            "than checkpoint.every ({}) steps, so some will be left out",
            trainer_.steps_done(), saved_step_, options_.checkpoint.every);
      }
      return;
    }
    saved_step_ = trainer_.steps_done();
    try_to_save([&] {
      saving_ = hooks_.saver->start();
      if (!saving_) saved(saved_step_);
    });
  }

  void advance_save() {
    try_to_save([&] {
      if (!hooks_.saver->advance()) return;
      saving_ = false;
      saved(saved_step_);
    });
  }

  void finish_save() {
    if (!saving_) return;
    try_to_save([&] {
      hooks_.saver->finish();
      saving_ = false;
      saved(saved_step_);
    });
  }

  /// The last save is what the run was for: where it fails the run fails.
  void save_at_the_end() {
    try {
      hooks_.saver->save();
    } catch (const Error& error) {
      if (error.code() != ExitCode::checkpoint) throw;
      throw Error(error.code(),
                  fmt::format("step {} is done but could not be saved: {}; earlier checkpoints are "
                              "as they were, and the same command goes on from the latest",
                              trainer_.steps_done(), error.what()),
                  error.file(), error.line());
    }
  }

  /// A save that fails is none; the run goes on.
  template <class Fn>
  void try_to_save(Fn&& fn) {
    try {
      fn();
    } catch (const Error& error) {
      saving_ = false;
      if (error.code() != ExitCode::checkpoint) throw;
      if (!is_root()) return;
      spdlog::error(
          "the checkpoint of step {} was not saved in {}: {}; training goes on, earlier "
          "checkpoints are as they were",
          saved_step_, options_.run_dir.string(), error.what());
    }
  }

  bool is_root() { return trainer_.instance().world().rank() == 0; }

  Trainer& trainer_;
  const BatchSampler& sampler_;
  const TokenDataset& dataset_;
  const DataConfig& data_;
  RunOptions options_;
  const RunHooks& hooks_;
  MetricsLog log_;
  std::optional<RoutingTrace> trace_;
  std::optional<CrossCheck> cross_check_;
  bool told_alone_ = false;
  bool told_enough_ = false;
  std::int64_t first_step_;       ///< where this process began
  std::set<std::int64_t> saved_;  ///< steps whose checkpoints this process saved
  std::int64_t last_save_;        ///< step of the last complete checkpoint
  bool saving_ = false;           ///< one is under way, of saved_step_
  bool told_left_out_ = false;
  std::int64_t saved_step_ = 0;  ///< where the last save began
  std::int64_t last_eval_;
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

}  // namespace

RunEnd run_training(Trainer& trainer, const BatchSampler& sampler, const TokenDataset& dataset,
                    const DataConfig& data, const RunOptions& options, const RunHooks& hooks) {
  return Run(trainer, sampler, dataset, data, options, hooks).run();
}

}  // namespace arcus
