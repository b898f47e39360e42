#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "src/train/trainer.hpp"

namespace arcus {

/// What a comparison of ranks found.
struct CrossCheckResult {
  std::int64_t round = 0;              ///< of the step: micro-batches round * ranks, ...
  std::vector<std::int64_t> suspects;  ///< ranks whose arithmetic others did not confirm, ascending
  bool majority = false;               ///< each suspect stands against two others that agree
  bool experts_too = false;            ///< experts were computed by other ranks as well (EDP > 1)
  bool compared = false;               ///< false on a single rank: there is nobody to compare with
};

/// Finds ranks whose machines compute wrongly: every rank computes a micro-batch's forward and
/// backward pass, then others do the same ones, and hashes of the gradients (before any reduction)
/// and of the losses are compared. Two ranks that differ are both suspect; with three ranks or more
/// a third opinion tells which. Nothing of the run changes. With EDP > 1 the others are those of
/// another expert-parallel group, so that experts are computed elsewhere too; with EDP = 1 they
/// stay on their rank, and only the dense part is checked.
class CrossCheck {
 public:
  /// `heartbeat` is called as the passes go on, with the layer; may be empty.
  CrossCheck(ModelInstance& instance, const TrainerOptions& options,
             std::function<void(std::int64_t layer, const char* what)> heartbeat = {});
  /// Of one round of the step after `steps_done`; a different one each time. Collective.
  CrossCheckResult run(const BatchSampler& sampler, std::int64_t steps_done);

 private:
  std::uint64_t digest_of_pass(const BatchSampler& sampler, std::int64_t steps_done,
                               std::int64_t number);

  ModelInstance* instance_;
  TrainerOptions options_;
  MicroBatchSchedule schedule_;
  Transformer::Workspace workspace_;
  BatchBuffers buffers_;
  MicroBatchStats stats_;
  std::function<void(std::int64_t, const char*)> heartbeat_;
};

/// One sentence on a result with suspects; `step` is the one about to be done.
std::string to_text(const CrossCheckResult& result, std::int64_t step);

}  // namespace arcus
