#pragma once

#include <filesystem>
#include <memory>
#include <string>

#include "checkpoints/checkpoint.hpp"
#include "checkpoints/run_lock.hpp"
#include "comm/watchdog.hpp"
#include "launch/digest_log.hpp"
#include "launch/init_source.hpp"
#include "launch/memory_check.hpp"
#include "launch/progress.hpp"
#include "launch/run_config.hpp"
#include "launch/run_setup.hpp"
#include "launch/session.hpp"
#include "src/data/dataset.hpp"
#include "src/train/run_loop.hpp"

namespace arcus {

/// `arcus train` on this rank: sets a run up in its folder, trains, evaluates, saves. All functions
/// are collective.
class TrainRun {
 public:
  /// Ready to train: folder locked, plan printed, weights initialised or loaded.
  TrainRun(Session& session, const Config& config, const RunStart& start);
  ~TrainRun();
  /// Trains to the last step, or until the time is up or a signal asks to stop.
  ExitCode run();

 private:
  void check_start();
  void open_folder();
  void start_afresh();
  void print_plan(const CheckedPlan& checked) const;
  void build();
  void restore();
  void begin();
  void read_first_weights();
  void watch();
  void open_digests();
  void check_before_reading();
  void check_tokenizer(const CheckpointInfo& info) const;
  void check_resumed(const CheckpointInfo& info);
  void write_config() const;
  RunOptions run_options() const;
  RunHooks hooks();
  void on_step(const StepMetrics& metrics);
  void on_eval(const EvalMetrics& metrics);
  CheckpointInfo checkpoint_info() const;
  SaveOptions save_options() const;
  ExitCode finish(RunEnd end);

  Session& session_;
  Config config_;  ///< vocab_size resolved
  RunStart start_;
  std::filesystem::path dir_;
  std::unique_ptr<RunLock> lock_;  ///< rank 0
  TokenDataset dataset_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<ModelInstance> instance_;
  std::unique_ptr<Trainer> trainer_;
  std::unique_ptr<BatchSampler> sampler_;
  std::unique_ptr<Watchdog> watchdog_;
  class Saver;
  std::unique_ptr<Saver> saver_;
  std::unique_ptr<ProgressLine> progress_;  ///< rank 0
  std::unique_ptr<DigestLog> digests_;      ///< rank 0, with run.digest_every
  std::int64_t first_step_ = 0;             ///< steps done when this process began
  std::string fingerprint_;
  std::string run_id_;
  std::string init_from_;  ///< what --init named when the run began
};

}  // namespace arcus
