#pragma once

#include <cstdint>

#include "src/train/config.hpp"

namespace arcus {

/// Learning rate of step 0, 1, ...: linear warm-up, then cosine, WSD (constant, then linear decay
/// over the last decay_fraction of the steps) or constant. From the step number alone.
double learning_rate(const TrainConfig& config, std::int64_t step);

/// Micro-batches of a step, numbered globally, taken by ranks in rounds: rank r has number
/// round * num_ranks + r, or none in a last round that is not full.
struct MicroBatchSchedule {
  std::int64_t num_micro_batches = 0;
  std::int64_t num_ranks = 1;

  std::int64_t rounds() const { return (num_micro_batches + num_ranks - 1) / num_ranks; }
  /// -1: idle.
  std::int64_t number(std::int64_t round, std::int64_t rank) const {
    const std::int64_t n = round * num_ranks + rank;
    return n < num_micro_batches ? n : -1;
  }
};

/// Cross-field rules of [train]; throws (usage) naming the fields, values and a value that would
/// do.
void validate(const TrainConfig& config);

}  // namespace arcus
