#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "comm/backends.hpp"
#include "src/base/rng.hpp"
#include "src/train/batch.hpp"
#include "src/train/model_instance.hpp"

namespace arcus::testing {

/// A small model whose every option can be changed, and synthetic batches for it.
struct SmallModel {
  ModelConfig model;
  RoutingConfig routing;
  std::int64_t micro_batch_seqs = 2;
  std::int64_t seq_len = 6;
  std::int64_t num_micro_batches = 2;
  bool recompute = false;
  LoraConfig lora;
  std::vector<ParamGroupConfig> groups;

  SmallModel() {
    model.vocab_size = 11;
    model.hidden_size = 8;
    model.num_layers = 2;
    model.num_heads = 4;
    model.num_kv_heads = 2;
    model.head_dim = 4;
    model.num_experts = 4;
    model.topk = 2;
    model.expert_ff_size = 6;
  }
  InstanceOptions options(DType compute, DType sums) const {
    return {.model = resolve(model, model.vocab_size),
            .routing = routing,
            .compute = compute,
            .sum_dtype = sums,
            .recompute = recompute,
            .micro_batch_seqs = micro_batch_seqs,
            .seq_len = seq_len,
            .num_micro_batches = num_micro_batches,
            .groups = groups,
            .lora = lora};
  }
};

/// Token number `index` of a reproducible random text.
inline std::int32_t synthetic_token(std::uint64_t index, std::int64_t vocab_size) {
  return static_cast<std::int32_t>(Rng(7, "text", "").words(0, index)[0] %
                                   static_cast<std::uint32_t>(vocab_size));
}

/// Fills micro-batch `number` of a synthetic step; a few targets are missing.
inline MicroBatch synthetic_batch(BatchBuffers& buffers, const InstanceOptions& o,
                                  std::int64_t number) {
  const std::int64_t tokens = o.micro_batch_seqs * o.seq_len;
  std::vector<std::int32_t> ids, targets;
  for (std::int64_t t = 0; t < tokens; ++t) {
    const auto index = static_cast<std::uint64_t>(number * tokens + t);
    ids.push_back(synthetic_token(index, o.model.vocab_size));
    targets.push_back(t % 7 == 5 ? -1 : synthetic_token(index + 1, o.model.vocab_size));
  }
  MicroBatch batch = buffers.fill(ids, targets, number);
  batch.loss_scale = 1.0 / static_cast<double>(tokens * o.num_micro_batches);
  batch.weight = 1.0 / static_cast<double>(o.num_micro_batches);
  return batch;
}

inline ProcessGroups self_groups(Communicator& world) { return make_process_groups(world, 1); }

}  // namespace arcus::testing
