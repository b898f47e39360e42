#pragma once

#include "kernels/gradient.hpp"

namespace arcus {

/// y = x * inv_rms * gain, inv_rms = 1 / sqrt(mean(x^2) + eps). Rows are `group` wide: a row of
/// x holds cols / group of them side by side, all with the same gain if gain has `group` elements
/// (QK-norm per head) or their own part of it (group = cols).
struct RmsNormForward {
  TensorView y;          ///< [T, C], may be x itself
  TensorView inv_rms;    ///< [T, C / group] accumulate type, out
  ConstTensorView x;     ///< [T, C] compute type
  ConstTensorView gain;  ///< [1, group] accumulate type
  double eps = 1e-6;
};
ARCUS_DECLARE_OP(rmsnorm_forward, RmsNormForward)

/// dx = gradient through the norm (+ residual), rounded once; leaf of the gain: f64 over blocks of
/// 64 rows (heads of a row in ascending order), rounded once.
struct RmsNormBackward {
  TensorView dx;             ///< [T, C], may be dy itself
  GradientSum dgain;         ///< [1, group]; sum == nullptr: not wanted
  ConstTensorView dy;        ///< [T, C] compute type
  ConstTensorView residual;  ///< [T, C] added to dx, or empty
  ConstTensorView x;         ///< [T, C]
  ConstTensorView inv_rms;   ///< [T, C / group]
  ConstTensorView gain;
  std::int64_t micro_batch = 0;
};
ARCUS_DECLARE_OP(rmsnorm_backward, RmsNormBackward)

/// y = (x - mean) * inv_std * gain + bias over whole rows, inv_std = 1 / sqrt(variance + eps), the
/// variance being the mean of (x - mean)^2.
struct LayerNormForward {
  TensorView y;              ///< [T, C], may be x itself
  TensorView mean, inv_std;  ///< [T, 1] accumulate type, out; rows may be strided
  ConstTensorView x;         ///< [T, C] compute type
  ConstTensorView gain;      ///< [1, C] accumulate type
  ConstTensorView bias;      ///< [1, C]
  double eps = 1e-5;
};
ARCUS_DECLARE_OP(layernorm_forward, LayerNormForward)

/// As rmsnorm_backward; the bias's leaf is summed as the gain's.
struct LayerNormBackward {
  TensorView dx;             ///< [T, C], may be dy itself
  GradientSum dgain, dbias;  ///< [1, C]; sum == nullptr: not wanted
  ConstTensorView dy;        ///< [T, C] compute type
  ConstTensorView residual;  ///< [T, C] added to dx, or empty
  ConstTensorView x;         ///< [T, C]
  ConstTensorView mean, inv_std;
  ConstTensorView gain;
  std::int64_t micro_batch = 0;
};
ARCUS_DECLARE_OP(layernorm_backward, LayerNormBackward)

}  // namespace arcus
