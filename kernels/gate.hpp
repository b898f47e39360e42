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

struct CombineWeights {
  TensorView weight;               ///< [T, K]: 0 where dropped
  ConstTensorView s;               ///< [T, E]
  ConstTensorView topk_idx;        ///< [T, K] i32
  ConstTensorView expert_of_slot;  ///< [T, K] i32
  bool renormalize = false;
  bool renormalize_after_drop = false;
  double scale = 1;  ///< routed_scaling_factor
};
ARCUS_DECLARE_OP(combine_weights, CombineWeights)

/// ds from dw (gradient of the combine weights). Losses on the scores add their part afterwards.
struct CombineWeightsBackward {
  TensorView ds;                   ///< [T, E] A
  ConstTensorView dweight;         ///< [T, K] A
  ConstTensorView s;               ///< [T, E] A
  ConstTensorView topk_idx;        ///< [T, K] i32
  ConstTensorView expert_of_slot;  ///< [T, K] i32
  bool renormalize = false, renormalize_after_drop = false;
  double scale = 1;
};
ARCUS_DECLARE_OP(combine_weights_backward, CombineWeightsBackward)

/// ds to dz in place, through the score; adds the z loss.
struct GateScoresBackward {
  TensorView dz;  ///< [T, E] A: ds in, dz out
  ConstTensorView s, lse, z;
  Score score = Score::softmax;
  double z_coeff = 0;  ///< coeff_z * T_m / sum T; 0 = none
};
ARCUS_DECLARE_OP(gate_scores_backward, GateScoresBackward)

}  // namespace arcus
