#pragma once

#include "src/model/config.hpp"

namespace arcus::testing {

/// The block of GPT-2 for sequences of up to `max_positions` tokens; experts stay where they are.
inline void use_gpt2_blocks(ModelConfig& model, std::int64_t max_positions) {
  model.norm = "layer";
  model.norm_eps = 1e-5;
  model.activation = "gelu_new";
  model.qk_norm = "none";
  model.num_kv_heads = model.num_heads;
  model.qkv_bias = model.o_bias = model.mlp_bias = true;
  model.position = "learned";
  model.max_positions = max_positions;
  model.tie_embeddings = true;
}

}  // namespace arcus::testing
