#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "src/train/model_instance.hpp"

namespace arcus {

struct SamplingOptions {
  std::int64_t max_new_tokens = 200;
  double temperature = 0.8;  ///< 0 = the most likely token
  std::int64_t top_k = 0;    ///< 0 = no limit
  double top_p = 1;          ///< smallest set of tokens whose probabilities add up to top_p
  std::uint64_t seed = 1;
  std::int32_t eos_id = -1;  ///< ends a sequence; -1 = never
};

/// Continues the prompts (token ids) together, one token at a time, with a KV cache. Rank 0 holds
/// the sequences, the other ranks their experts; random numbers are addressed by (prompt,
/// position), so the text is the same at any layout. `on_token(prompt, id)` is called on rank 0 as
/// tokens come. The instance must not be a training one, with micro_batch_seqs >= the number of
/// prompts and seq_len 1. Collective. Returns all ids of each sequence on rank 0.
std::vector<std::vector<std::int32_t>> generate(
    ModelInstance& instance, const std::vector<std::vector<std::int32_t>>& prompts,
    const SamplingOptions& options,
    const std::function<void(std::size_t prompt, std::int32_t id)>& on_token);

/// One draw from logits by the options; `uniform` in [0, 1). Ties go to the lower id.
std::int32_t sample_token(std::span<const float> logits, const SamplingOptions& options,
                          double uniform);

}  // namespace arcus
