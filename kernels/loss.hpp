#pragma once

#include "kernels/dispatch.hpp"
#include "src/base/tensor.hpp"

namespace arcus {

/// Softmax cross-entropy of rows. token_loss[t] = logsumexp(z_t) - z_t[target_t]; 0 where the
/// target is negative. With `dlogits`, dlogits[t] = (softmax(z_t) - onehot) * scale (zero row for
/// no target), rounded to its type.
struct CrossEntropy {
  TensorView token_loss;    ///< [1, T] accumulate type
  TensorView dlogits;       ///< [T, V] compute type, or empty
  ConstTensorView logits;   ///< [T, V] accumulate type
  ConstTensorView targets;  ///< [1, T] i32, -1 = none
  double scale = 1;         ///< 1 / target tokens of the whole step
};
ARCUS_DECLARE_OP(cross_entropy, CrossEntropy)

}  // namespace arcus
