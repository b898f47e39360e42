#pragma once

#include <string>
#include <vector>

#include "src/train/trainer.hpp"

namespace arcus {

/// What a run will be like on a number of ranks, worked out without starting any.
struct SegmentPlan {
  std::int64_t first_layer = 0;  ///< the first that routes so
  std::int64_t rows = 0;         ///< T K / E: evenly loaded experts
  std::int64_t capacity = 0;     ///< rows per (expert, micro-batch); 0 = dropless
  bool padded = false;           ///< every segment has `capacity` rows

  bool same_rows(const SegmentPlan& other) const {
    return rows == other.rows && capacity == other.capacity && padded == other.padded;
  }
};

struct TrainPlan {
  int num_ranks = 1;
  int ep_size = 1;
  int threads_per_rank = 1;
  std::int64_t total_parameters = 0, active_parameters = 0, trained_parameters = 0;
  std::vector<std::int64_t> experts_per_rank;  ///< of the EP group's ranks
  std::int64_t tokens_per_step = 0;
  std::int64_t micro_batches = 0, rounds = 0;
  std::int64_t micro_batch_tokens = 0;
  std::vector<SegmentPlan> segments;  ///< one for each way in which layers route
  double training_flops_per_token = 0;
  std::vector<ByteRow> bytes;       ///< of rank 0
  std::int64_t state_bytes = 0;     ///< what rank 0 writes into a checkpoint
  std::vector<std::string> advice;  ///< sentences; what could be better

  std::int64_t even_bytes() const;   ///< of a rank, experts evenly loaded
  std::int64_t worst_bytes() const;  ///< of a rank, the most that can happen
};

/// `ep_size` 0 = auto; every `ranks_per_node` consecutive ranks share a node. Throws (usage) where
/// the layout is impossible.
TrainPlan make_plan(const TrainerOptions& options, int num_ranks, int ranks_per_node,
                    std::int64_t ep_size, int threads_per_rank);
/// A few lines and the byte table.
std::string to_text(const TrainPlan& plan);

/// "1,234,567" and "1.5 GiB", for people.
std::string grouped_digits(std::int64_t value);
std::string bytes_text(std::int64_t bytes);

}  // namespace arcus
