#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "src/data/sampler.hpp"
#include "src/train/batch.hpp"
#include "src/train/config.hpp"
#include "src/train/metrics.hpp"
#include "src/train/optimizer.hpp"
#include "src/train/schedule.hpp"

namespace arcus {

/// Everything a trainer needs to know; `model` is resolved.
struct TrainerOptions {
  ModelConfig model;
  RoutingConfig routing;
  std::vector<RoutingOverride> overrides;
  TrainConfig train;
  std::vector<ParamGroupConfig> groups;
  LoraConfig lora;
  std::uint64_t seed = 1;
  bool reproducible = true;
  DispatchPath dispatch_path = DispatchPath::automatic;
};
/// Options of the instance that trains them.
InstanceOptions instance_options(const TrainerOptions& options);

/// Requests that any rank may make and all ranks agree on at a step's end.
struct StepRequests {
  bool stop = false;     ///< a signal: save and end
  bool time_up = false;  ///< the run's wall-clock limit: save and end
  bool saving = false;   ///< out: some rank is still writing a checkpoint (set_saving)
};

/// One training run on this rank: micro-batches -> reduce -> clip -> AdamW. Collective calls, in
/// step with the other ranks.
class Trainer {
 public:
  using Heartbeat = std::function<void(std::int64_t step, std::int64_t layer, const char* what)>;

  Trainer(ModelInstance& instance, const TrainerOptions& options);

  /// One step on the next global batch; the result is valid until the next one. `requests` of any
  /// rank are seen by all afterwards.
  const StepMetrics& step(const BatchSampler& sampler, StepRequests& requests);
  /// Of the last step.
  const StepMetrics& metrics() const { return metrics_; }
  /// Starting values; not needed after loading a checkpoint.
  void initialize();
  /// Logical state for checkpoints: weights, moments, balancing state, counters. After reading into
  /// it call `finish_reading`.
  std::vector<StateView> state();
  void finish_reading();

  std::int64_t steps_done() const { return counters_[kStepsDone]; }
  /// Steps whose samples are passed by: step n takes those of number n + samples_ahead.
  std::int64_t samples_ahead() const { return counters_[kSamplesAhead]; }
  /// How often the run went back from a spike.
  std::int64_t times_back() const { return counters_[kTimesBack]; }
  void set_back(std::int64_t samples_ahead, std::int64_t times) {
    counters_[kSamplesAhead] = samples_ahead;
    counters_[kTimesBack] = times;
  }
  /// The last step was applied, and its loss was more than `factor` times the running average of
  /// those before (half of which the last 22 make up); never in the first 32.
  bool spiked(double factor) const;
  std::int64_t bad_steps_in_a_row() const { return counters_[kBadSteps]; }
  const TrainerOptions& options() const { return options_; }
  ModelInstance& instance() { return *instance_; }
  std::int64_t optimizer_bytes() const { return optimizer_.bytes(); }
  void set_observer(RoutingObserver observer) { observer_ = std::move(observer); }
  void set_heartbeat(Heartbeat heartbeat);
  /// Asked at a step's end: whether this rank is still writing a checkpoint.
  void set_saving(std::function<bool()> fn) { saving_ = std::move(fn); }
  /// `fn` is called in every step before anything that `state` names changes.
  void set_before_update(std::function<void()> fn) { before_update_ = std::move(fn); }
  /// The heartbeat for one layer of a pass, for evaluations between steps; may be empty.
  const std::function<void(std::int64_t layer, const char* what)>& layer_heartbeat() const {
    return layer_heartbeat_;
  }

 private:
  enum Counter : std::size_t {
    kStepsDone,
    kUpdates,
    kBadSteps,
    kSamplesAhead,
    kTimesBack,
    kNumCounters
  };

  void run_round(const BatchSampler& sampler, std::int64_t round);
  std::int64_t first_sample() const;
  std::int64_t count_targets(const BatchSampler& sampler) const;
  void start_metrics();
  void gather_scalars();
  void reduce_counts(std::int64_t sent_before, double comm_before);
  /// Agrees on the worst news; returns the key of the first bad leaf or kNoBadLeaf.
  std::int64_t agree(StepRequests& requests);
  void update(std::int64_t bad_leaf);
  void skip(const std::string& what, const std::string& where);
  void average_loss();
  std::int64_t record_size() const;
  std::size_t dropped_begin() const;

  ModelInstance* instance_;
  TrainerOptions options_;
  Optimizer optimizer_;
  MicroBatchSchedule schedule_;
  Transformer::Workspace workspace_;
  BatchBuffers buffers_;
  MicroBatchStats stats_;
  StepMetrics metrics_;
  std::vector<double> scalars_;       ///< [rank, round, record]
  std::vector<std::int64_t> counts_;  ///< [L * E] demand, [L * E] score counts, [L] dropped,
                                      ///< [ranks] rows, [ranks] communication in us, bytes sent
  std::vector<std::int64_t> gather_counts_, gather_offsets_;
  std::vector<std::int64_t> counters_ = std::vector<std::int64_t>(kNumCounters, 0);
  double loss_average_ = 0;    ///< of the steps applied, each weighing 1/32
  double average_before_ = 0;  ///< without the last one
  RoutingObserver observer_;
  Heartbeat heartbeat_;
  std::function<bool()> saving_;
  std::function<void()> before_update_;
  std::function<void(std::int64_t, const char*)> layer_heartbeat_;
};

}  // namespace arcus
