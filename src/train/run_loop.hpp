#pragma once

#include <filesystem>
#include <functional>

#include "src/train/evaluation.hpp"
#include "src/train/trainer.hpp"

namespace arcus {

/// What a run does besides training steps.
struct RunOptions {
  EvalConfig eval;
  CheckpointConfig checkpoint;
  double max_minutes = 0;                ///< wall-clock limit, 0 = none
  std::int64_t max_bad_steps = 10;       ///< bad steps in a row before the run ends
  double spike_factor = 0;               ///< 0 = never go back (RunConfig)
  std::int64_t trace_routing_every = 0;  ///< 0 = never
  std::int64_t verify_every = 0;         ///< 0 = never
  std::filesystem::path run_dir;         ///< metrics.jsonl and traces go there
};

/// Saves checkpoints of a run. An Error from a save that is not the last one is a warning: the run
/// goes on and the previous checkpoint stands.
class RunSaver {
 public:
  virtual ~RunSaver() = default;
  /// Saves, and returns when the checkpoint is there. Collective.
  virtual void save() = 0;
  /// Begins a save and returns true, or saves at once and returns false. Collective.
  virtual bool start() = 0;
  /// This rank is still writing.
  virtual bool busy() = 0;
  /// To be called when no rank is; true when the checkpoint is there. Collective.
  virtual bool advance() = 0;
  /// Waits until it is. Collective.
  virtual void finish() = 0;
  /// Puts the trainer's state back to the newest checkpoint that may be used (by its step) and can
  /// be read; false, nothing done, where there is none. Collective.
  virtual bool restore(const std::function<bool(std::int64_t step)>& may_be_used) = 0;
  /// A checkpoint that must stay, however old; -1 = none.
  virtual void keep(std::int64_t step) = 0;
};

/// Calls back into the program that runs the trainer.
struct RunHooks {
  RunSaver* saver = nullptr;  ///< null: nothing is saved
  /// True once a signal has asked this rank to stop.
  std::function<bool()> stop_requested;
  std::function<void(const StepMetrics&)> on_step;  ///< on every rank
  std::function<void(const EvalMetrics&)> on_eval;  ///< on every rank
};

enum class RunEnd {
  finished,  ///< all steps done
  time_up,   ///< max_minutes reached; resuming goes on
  stopped,   ///< a signal; resuming goes on
  diverged,  ///< max_bad_steps bad steps in a row
};

/// Steps until the end, with evaluations, checkpoints and metrics.jsonl (written by rank 0).
/// However the run ends, everything is saved; but an Error (comm) where ranks compute differently
/// (verify_every), since the state may be wrong already. Collective.
RunEnd run_training(Trainer& trainer, const BatchSampler& sampler, const TokenDataset& dataset,
                    const DataConfig& data, const RunOptions& options, const RunHooks& hooks);

}  // namespace arcus
