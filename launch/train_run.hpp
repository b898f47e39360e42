#pragma once

#include <chrono>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>

#include "checkpoints/checkpoint.hpp"
#include "checkpoints/run_lock.hpp"
#include "comm/watchdog.hpp"
#include "launch/metrics_file.hpp"
#include "launch/progress.hpp"
#include "launch/routing_trace.hpp"
#include "launch/run_config.hpp"
#include "launch/session.hpp"
#include "src/data/dataset.hpp"
#include "src/train/trainer.hpp"

namespace arcus {

/// `arcus train` on this rank: sets a run up in its folder, trains, evaluates, saves. All functions
/// are collective.
class TrainRun {
 public:
  /// Ready to train: folder locked, plan printed, weights initialised or loaded. `resume`: "auto",
  /// "none" or a checkpoint's path.
  TrainRun(Session& session, const Config& config, const std::string& resume);
  /// Trains to the last step or until the time is up or a signal asks to stop.
  ExitCode run();

 private:
  using Clock = std::chrono::steady_clock;

  void open_folder(const std::string& resume);
  void print_plan();
  void build();
  void restore(const std::string& resume);
  void check_resumed(const CheckpointInfo& info);
  void start_afresh();
  StepMetrics train_step(StepRequests& requests);
  void report(const StepMetrics& metrics);
  void evaluate_now();
  void save();
  void stop_if_diverging();
  bool is_due(std::int64_t every) const;
  bool time_is_up() const;
  bool is_traced(std::int64_t step) const;

  Session& session_;
  Config config_;  ///< vocab_size resolved
  std::filesystem::path dir_;
  std::unique_ptr<RunLock> lock_;
  TokenDataset dataset_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<ModelInstance> instance_;
  std::unique_ptr<Trainer> trainer_;
  std::unique_ptr<BatchSampler> sampler_;
  std::unique_ptr<Watchdog> watchdog_;
  std::unique_ptr<MetricsFile> metrics_;    ///< rank 0
  std::unique_ptr<ProgressLine> progress_;  ///< rank 0
  RoutingTrace trace_;
  std::string fingerprint_;
  std::string run_id_;
  std::int64_t saved_step_ = -1;
  std::int64_t evaluated_step_ = -1;
  Clock::time_point start_;
};

}  // namespace arcus
