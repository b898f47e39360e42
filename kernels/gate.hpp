#pragma once

#include "kernels/gradient.hpp"

namespace arcus {

/// The gate's pieces, per micro-batch of T tokens; E experts, K choices, all numbers in the
/// accumulate type A (f32; f64 in gradient checks). The formulas, ties and orders are those of the
/// design's "Gate", "Capacity and drops", "Losses" and "Backward of the gate".

/// z = x W^T (+ bias), x widened to A first. Raises `flag` with `flag_key` on a non-finite z.
struct GateLogits {
  TensorView z;            ///< [T, E] A
  TensorView x_wide;       ///< [T, H] A scratch, kept for backward; unused (empty) when x is A
  ConstTensorView x;       ///< [T, H] compute type
  ConstTensorView weight;  ///< [E, H] A
  ConstTensorView bias;    ///< [1, E] A, or empty
  BadLeafFlag* flag = nullptr;
  std::int64_t flag_key = 0;
};
ARCUS_DECLARE_OP(gate_logits, GateLogits)

enum class Score { softmax, sigmoid };
/// s = softmax(z) (maximum subtracted) or sigmoid(z); lse = logsumexp(z).
struct GateScores {
  TensorView s;    ///< [T, E]
  TensorView lse;  ///< [T, 1]
  ConstTensorView z;
  Score score = Score::softmax;
};
ARCUS_DECLARE_OP(gate_scores, GateScores)

enum class GroupScore { top2_sum, max };
/// topk_idx = the K largest c = s + expert_bias, descending, ties to the lower expert id, -0 = +0;
/// with groups, inside the topk_group best groups only.
struct SelectTopk {
  TensorView topk_idx;          ///< [T, K] i32
  ConstTensorView s;            ///< [T, E]
  ConstTensorView expert_bias;  ///< [1, E] f32, or empty
  std::int64_t n_group = 1, topk_group = 1;
  GroupScore group_score = GroupScore::top2_sum;
};
ARCUS_DECLARE_OP(select_topk, SelectTopk)

enum class DropPolicy { position, probs };
/// Which assignments stay when more than `capacity` want an expert. expert_of_slot = topk_idx, or -1
/// where dropped. demand = tokens per expert before drops.
struct ApplyCapacity {
  TensorView expert_of_slot;  ///< [T, K] i32
  TensorView demand;          ///< [1, E] i64
  TensorView scratch;         ///< [1, max(T * K, E) * 2] i64
  ConstTensorView topk_idx;   ///< [T, K] i32
  ConstTensorView s;          ///< [T, E]
  std::int64_t num_experts = 0;
  std::int64_t capacity = 0;  ///< 0 = dropless
  DropPolicy policy = DropPolicy::position;
};
ARCUS_DECLARE_OP(apply_capacity, ApplyCapacity)

struct CombineWeights {
  TensorView weight;               ///< [T, K]: 0 where dropped
  ConstTensorView s;               ///< [T, E]
  ConstTensorView topk_idx;        ///< [T, K] i32
  ConstTensorView expert_of_slot;  ///< [T, K] i32
  bool renormalize = false;
  bool renormalize_after_drop = false;
  double scale = 1;                ///< routed_scaling_factor
};
ARCUS_DECLARE_OP(combine_weights, CombineWeights)

/// Numbers of one micro-batch, f64 in token order. aux = E sum_i f_i P_i without coefficient;
/// f_i from the K largest s (unbiased, ties to the lower id) over each `tokens_per_group`
/// consecutive tokens (T: scope micro_batch; seq_len: scope sequence, averaged T_seq-weighted).
struct GateStatistics {
  double* aux = nullptr;      ///< out: weighted so that coeff * T_m / sum T * aux is the loss
  double* z_loss = nullptr;   ///< out: mean_t lse^2
  double* entropy = nullptr;  ///< out: sum_t of -sum p ln p, p = s / sum s
  TensorView fraction;        ///< [groups, E] A: f, kept for backward
  TensorView scratch;         ///< [1, E * 2 + K] f64
  ConstTensorView s, lse;
  std::int64_t topk = 0;
  std::int64_t tokens_per_group = 0;
};
ARCUS_DECLARE_OP(gate_statistics, GateStatistics)

/// dz from dw (gradient of the combine weights), the aux loss and the z loss.
struct GateBackward {
  TensorView dz;                   ///< [T, E] A
  ConstTensorView dweight;         ///< [T, K] A
  ConstTensorView s, lse, z;
  ConstTensorView topk_idx, expert_of_slot;
  ConstTensorView fraction;        ///< [groups, E]
  Score score = Score::softmax;
  bool renormalize = false, renormalize_after_drop = false;
  double scale = 1;
  double aux_coeff = 0;            ///< coeff * T_m / sum T (already weighted); 0 = none
  double z_coeff = 0;              ///< coeff_z * T_m / sum T; 0 = none
  std::int64_t tokens_per_group = 0;
};
ARCUS_DECLARE_OP(gate_backward, GateBackward)

}  // namespace arcus
