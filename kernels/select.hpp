#pragma once

#include "kernels/dispatch.hpp"
#include "src/base/tensor.hpp"

namespace arcus {

/// Which experts a token goes to, and which of these assignments stay: T tokens of one micro-batch,
/// E experts, K choices. src/model/ROUTING.md defines formulas, ties and orders. A is the type of
/// the scores (f32; f64 in gradient checks).

enum class GroupScore { top2_sum, max };
/// topk_idx = the K largest c = s + expert_bias, descending, ties to the lower expert id, -0 = +0;
/// with groups, inside the topk_group best groups only.
struct SelectTopk {
  TensorView topk_idx;          ///< [T, K] i32
  ConstTensorView s;            ///< [T, E] A
  ConstTensorView expert_bias;  ///< [1, E] f32, or empty
  std::int64_t n_group = 1, topk_group = 1;
  GroupScore group_score = GroupScore::top2_sum;
};
ARCUS_DECLARE_OP(select_topk, SelectTopk)

/// Random numbers of tokens: number (step, first_token + t) of the stream `key`.
struct TokenDraws {
  std::uint64_t key = 0;
  std::int64_t step = 0;
  std::int64_t first_token = 0;  ///< global index of the micro-batch's first token
};

/// wanted = topk_idx, the second choice -1 where a draw u >= 2 s_2 / (s_1 + s_2 + 1e-20).
struct SampleSecond {
  TensorView wanted;         ///< [T, 2] i32
  ConstTensorView topk_idx;  ///< [T, 2] i32
  ConstTensorView s;         ///< [T, E] A
  TokenDraws draws;
};
ARCUS_DECLARE_OP(sample_second, SampleSecond)

/// topk_idx = K experts that follow from token id and key alone, ascending.
struct SelectByHash {
  TensorView topk_idx;  ///< [T, K] i32
  ConstTensorView ids;  ///< [1, T] i32
  std::int64_t num_experts = 0;
  std::uint64_t key = 0;
};
ARCUS_DECLARE_OP(select_by_hash, SelectByHash)

/// topk_idx = the K largest z + ln q, q the experts' scaling after `iterations` of Sinkhorn's
/// algorithm over the T tokens, in f64; descending, ties to the lower id.
struct SelectSinkhorn {
  TensorView topk_idx;  ///< [T, K] i32
  ConstTensorView z;    ///< [T, E] A
  std::int64_t iterations = 0;
  TensorView scratch;  ///< [1, T * E + E + T] f64
};
ARCUS_DECLARE_OP(select_sinkhorn, SelectSinkhorn)
/// f64 numbers of its scratch.
inline std::int64_t sinkhorn_scratch(std::int64_t tokens, std::int64_t num_experts) {
  return tokens * num_experts + num_experts + tokens;
}

/// Each expert takes its `capacity` largest s, ties to the lower token. topk_idx[t] = the experts
/// that took t, ascending, then -1.
struct SelectByExperts {
  TensorView topk_idx;  ///< [T, E] i32
  ConstTensorView s;    ///< [T, E] A
  std::int64_t capacity = 0;
  TensorView scratch;  ///< [1, 2 * E] i64
};
ARCUS_DECLARE_OP(select_by_experts, SelectByExperts)

/// topk_idx[t] = the experts with p > threshold, ascending, then -1.
struct SelectAbove {
  TensorView topk_idx;  ///< [T, E] i32
  ConstTensorView p;    ///< [T, E] A
  double threshold = 0;
};
ARCUS_DECLARE_OP(select_above, SelectAbove)

/// index = the tokens with a choice (>= 0), ascending; `count` of them.
struct ListChosen {
  TensorView index;  ///< [1, T] i32
  std::int64_t* count = nullptr;
  ConstTensorView chosen;  ///< [T, 1] i32
};
ARCUS_DECLARE_OP(list_chosen, ListChosen)

enum class DropPolicy { position, probs };
/// Which assignments stay when more than `capacity` want an expert. expert_of_slot = what is
/// wanted, or -1 where dropped. demand = tokens per expert before drops.
struct ApplyCapacity {
  TensorView expert_of_slot;  ///< [T, K] i32
  TensorView demand;          ///< [1, E] i64
  TensorView scratch;         ///< [1, max(T * K, E) * 2] i64
  ConstTensorView wanted;     ///< [T, K] i32: topk_idx, or that with -1 for what is not asked for
  ConstTensorView s;          ///< [T, E]
  std::int64_t num_experts = 0;
  std::int64_t capacity = 0;  ///< 0 = dropless
  DropPolicy policy = DropPolicy::position;
};
ARCUS_DECLARE_OP(apply_capacity, ApplyCapacity)

}  // namespace arcus
