#pragma once

#include "kernels/gradient.hpp"
#include "kernels/select.hpp"

namespace arcus {

/// What may happen to a gate's input and logits before they are scored: noise in training, and the
/// cosine form. src/model/ROUTING.md defines the formulas; A is the accumulate type.

/// y = x u, u = U(1 - amount, 1 + amount), uniform number (step, (first_token + t) * H + h) of the
/// stream. The gradient goes through the same op: dx = dy u.
struct Jitter {
  TensorView y;       ///< [T, H] A; may be x
  ConstTensorView x;  ///< [T, H] compute or accumulate type
  double amount = 0;
  TokenDraws draws;
};
ARCUS_DECLARE_OP(jitter, Jitter)

/// z += amount eps softplus(n), eps = normal number (first_token + t) * E + i of the stream, calls
/// (step, .).
struct GateNoise {
  TensorView z;       ///< [T, E] A, in and out
  ConstTensorView n;  ///< [T, E] A
  double amount = 0;
  TokenDraws draws;
};
ARCUS_DECLARE_OP(gate_noise, GateNoise)

/// dn += dz amount eps sigmoid(n). dn may hold gradients of other terms.
struct GateNoiseBackward {
  TensorView dn;       ///< [T, E] A, in and out
  ConstTensorView dz;  ///< [T, E] A
  ConstTensorView n;   ///< [T, E] A
  double amount = 0;
  TokenDraws draws;
};
ARCUS_DECLARE_OP(gate_noise_backward, GateNoiseBackward)

/// y = x / max(|x|, 1e-12) row by row; inv_norm = 1 / max(|x|, 1e-12).
struct NormalizeRows {
  TensorView y;         ///< [R, H] A
  TensorView inv_norm;  ///< [R, 1] A
  ConstTensorView x;    ///< [R, H] compute or accumulate type
};
ARCUS_DECLARE_OP(normalize_rows, NormalizeRows)

/// dx = (dy - y <dy, y>) inv_norm.
struct NormalizeRowsBackward {
  TensorView dx;             ///< [R, H] A; may be dy
  ConstTensorView dy;        ///< [R, H] A
  ConstTensorView y;         ///< [R, H] A
  ConstTensorView inv_norm;  ///< [R, 1] A
};
ARCUS_DECLARE_OP(normalize_rows_backward, NormalizeRowsBackward)

/// The logits of the cosine gate, z = a c (+ bias) with a = exp(min(temperature, ln 100)), from
/// c = <x^, W^>; z in and out. `cosine` keeps c for backward.
struct CosineLogits {
  TensorView z;                 ///< [T, E] A: c in, z out
  TensorView cosine;            ///< [T, E] A: c out
  ConstTensorView temperature;  ///< [1, 1] A
  ConstTensorView bias;         ///< [1, E] A, or empty
};
ARCUS_DECLARE_OP(cosine_logits, CosineLogits)

/// Turns dz into e = a dz (in place, for the gradient of x^) and e_scaled = e / |W_i| (for the
/// first piece of W's leaf); adds the leaves of the temperature and the second piece of W's leaf,
/// - W^_i (sum_t e_ti c_ti) / |W_i|.
struct CosineLogitsBackward {
  TensorView dz;                ///< [T, E] A: dz in, e out
  TensorView e_scaled;          ///< [T, E] A
  GradientSum dtemperature;     ///< sum null: frozen
  GradientSum dweight;          ///< [E, H], sum null: frozen
  ConstTensorView cosine;       ///< [T, E] A
  ConstTensorView temperature;  ///< [1, 1] A
  ConstTensorView w_hat;        ///< [E, H] A
  ConstTensorView w_inv_norm;   ///< [E, 1] A
  TensorView scratch;           ///< [1, E] f64
  std::int64_t micro_batch = 0;
};
ARCUS_DECLARE_OP(cosine_logits_backward, CosineLogitsBackward)

}  // namespace arcus
