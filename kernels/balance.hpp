#pragma once

#include "kernels/dispatch.hpp"
#include "kernels/select.hpp"
#include "src/base/tensor.hpp"

namespace arcus {

/// How evenly one micro-batch of T tokens was spread over E experts, and the losses that follow
/// from it. src/model/ROUTING.md defines them; A is the type of the scores.

/// Numbers of one micro-batch, f64 in token order: entropy, z loss, and the counts that aux losses
/// stand on.
struct GateStatistics {
  double* z_loss = nullptr;   ///< out: mean_t lse^2
  double* entropy = nullptr;  ///< out: sum_t of -sum p ln p, p = s / sum s
  TensorView counts;  ///< [1, E] i64 out: tokens whose K largest s (unbiased, ties to the lower id)
                      ///< hold the expert
  ConstTensorView s, lse;
  std::int64_t topk = 0;
};
ARCUS_DECLARE_OP(gate_statistics, GateStatistics)

/// aux = E sum_i f_i P_i over each group of consecutive tokens, added up with the groups' weights.
/// f is computed from the group's own K largest s and kept for backward, or given.
struct AuxLoss {
  double* aux = nullptr;                        ///< out, without coefficient
  TensorView fraction;                          ///< [groups, E] A: f, out unless `given`
  bool given = false;                           ///< `fraction` is input
  TensorView scratch;                           ///< [1, 2 * E] f64
  ConstTensorView s;                            ///< [T, E] A
  std::span<const std::int64_t> group_offsets;  ///< [groups + 1] tokens, ascending from 0 to T
  std::span<const double> group_weights;        ///< [groups]; empty: the groups' shares of T
  std::int64_t topk = 0;
};
ARCUS_DECLARE_OP(aux_loss, AuxLoss)

/// ds += coeff w (E / n) (f - sum_n f_n s_n / R) / R for every token, f, weight w and number of
/// tokens n of its group, R = sum s + 1e-20.
struct AuxLossBackward {
  TensorView ds;             ///< [T, E] A, in and out
  ConstTensorView s;         ///< [T, E] A
  ConstTensorView fraction;  ///< [groups, E] A
  std::span<const std::int64_t> group_offsets;
  std::span<const double> group_weights;
  double coeff = 0;  ///< the micro-batch's weight included
};
ARCUS_DECLARE_OP(aux_loss_backward, AuxLossBackward)

/// CV2(I), I_i = sum of v over the choices of expert i, v = s[idx] (/ sum of the chosen s + 1e-20
/// with renormalize); I and its derivative are kept for backward.
struct ImportanceLoss {
  double* cv2 = nullptr;     ///< out, without coefficient
  TensorView derivative;     ///< [1, E] f64 out: d CV2 / d I
  ConstTensorView s;         ///< [T, E] A
  ConstTensorView topk_idx;  ///< [T, K] i32, -1 = no choice
  bool renormalize = false;
};
ARCUS_DECLARE_OP(importance_loss, ImportanceLoss)

/// ds += coeff dCV2 through v.
struct ImportanceLossBackward {
  TensorView ds;               ///< [T, E] A, in and out
  ConstTensorView derivative;  ///< [1, E] f64
  ConstTensorView s;
  ConstTensorView topk_idx;
  bool renormalize = false;
  double coeff = 0;
};
ARCUS_DECLARE_OP(importance_loss_backward, ImportanceLossBackward)

/// CV2(L), L_i = sum_t Phi((z_ti - h_ti) / (amount softplus(n_ti))), h_ti = the K-th largest z' of
/// the token among the other experts.
struct LoadLoss {
  double* cv2 = nullptr;    ///< out, without coefficient
  TensorView derivative;    ///< [1, E] f64 out: d CV2 / d L
  ConstTensorView z_clean;  ///< [T, E] A
  ConstTensorView z_noisy;  ///< [T, E] A
  ConstTensorView n;        ///< [T, E] A
  double amount = 0;
  std::int64_t topk = 0;  ///< < E
};
ARCUS_DECLARE_OP(load_loss, LoadLoss)

/// dz += and dn += coeff dCV2, through z, the threshold and the width of the noise.
struct LoadLossBackward {
  TensorView dz;               ///< [T, E] A, in and out
  TensorView dn;               ///< [T, E] A, in and out
  ConstTensorView derivative;  ///< [1, E] f64
  ConstTensorView z_clean, z_noisy, n;
  double amount = 0;
  std::int64_t topk = 0;
  double coeff = 0;
  TokenDraws draws;  ///< those of gate_noise
};
ARCUS_DECLARE_OP(load_loss_backward, LoadLossBackward)

/// u = s - alpha_t, alpha_t = the (K+1)-th largest s + expert_bias of the token.
struct QuantileScores {
  TensorView u;                 ///< [T, E] f32
  ConstTensorView s;            ///< [T, E] A
  ConstTensorView expert_bias;  ///< [1, E] f32
  std::int64_t topk = 0;        ///< < E
};
ARCUS_DECLARE_OP(quantile_scores, QuantileScores)

/// q_i = the `rank`-th largest (1 = largest) of column i.
struct ColumnQuantiles {
  TensorView q;           ///< [1, E] f32
  ConstTensorView u;      ///< [N, E] f32
  std::int64_t rank = 1;  ///< 1..N
};
ARCUS_DECLARE_OP(column_quantiles, ColumnQuantiles)

/// Loss of a predictor of who is chosen: mean over (t, e) of the binary cross-entropy between
/// sigmoid(logits) and [t is chosen by e]; dlogits = coeff (sigmoid(logits) - chosen) / (T E).
struct PredictorLoss {
  double* loss = nullptr;    ///< out, without coefficient; null: not wanted
  TensorView dlogits;        ///< [T, E] A, or empty
  ConstTensorView logits;    ///< [T, E] A
  ConstTensorView topk_idx;  ///< [T, S] i32, -1 = no choice
  double coeff = 0;
};
ARCUS_DECLARE_OP(predictor_loss, PredictorLoss)

/// Mean of the values of a column, f64 in token order; 0 of none.
struct ColumnMean {
  double* mean = nullptr;  ///< out
  ConstTensorView x;       ///< [T, 1] A
};
ARCUS_DECLARE_OP(column_mean, ColumnMean)

/// Gradient of a decision layer's logits: dd_t = dd_chosen_i where t = index_i, else 0; to that
/// dmean / T g_t (1 - g_t) + dshift / T, the gradients of what was made of the means of g and d.
struct DecisionBackward {
  TensorView dd;              ///< [T, 1] A
  ConstTensorView dd_chosen;  ///< [T', 1] A
  ConstTensorView index;      ///< [1, T'] i32, ascending
  ConstTensorView g;          ///< [T, 1] A
  double dmean = 0, dshift = 0;
};
ARCUS_DECLARE_OP(decision_backward, DecisionBackward)

}  // namespace arcus
