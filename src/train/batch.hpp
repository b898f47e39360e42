#pragma once

#include <cstdint>
#include <vector>

#include "src/data/sampler.hpp"
#include "src/model/pass.hpp"

namespace arcus {

/// Token buffers of one micro-batch, filled again and again without allocating.
class BatchBuffers {
 public:
  BatchBuffers(std::int64_t max_seqs, std::int64_t seq_len);

  /// Micro-batch `number` of a step: samples first_sample .. first_sample + num_seqs - 1.
  MicroBatch fill(const BatchSampler& sampler, std::int64_t number, std::int64_t num_seqs,
                  std::int64_t first_sample);
  /// The same from held-out windows; `target_bytes` is increased by the bytes they stand for, and
  /// `num_targets` by their tokens.
  MicroBatch fill(const EvalSampler& sampler, std::int64_t number, std::int64_t num_seqs,
                  std::int64_t first_window, std::int64_t& num_targets, std::int64_t& target_bytes);
  /// From given ids and targets [num_seqs, seq_len].
  MicroBatch fill(std::span<const std::int32_t> ids, std::span<const std::int32_t> targets,
                  std::int64_t number);
  /// A rank without a micro-batch in this round.
  MicroBatch idle();

 private:
  MicroBatch view(std::int64_t number, std::int64_t num_seqs);
  std::int64_t seq_len_;
  std::vector<std::int32_t> tokens_, ids_, targets_, position_, first_key_;
  std::vector<std::int64_t> sequence_offsets_;
};

}  // namespace arcus
