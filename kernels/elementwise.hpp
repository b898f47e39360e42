#pragma once

#include "kernels/dispatch.hpp"
#include "src/base/tensor.hpp"

namespace arcus {

/// y = a + b, in the accumulate type, rounded once. y may be a or b.
struct Add {
  TensorView y;
  ConstTensorView a, b;
};
ARCUS_DECLARE_OP(add, Add)

/// y = x converted (f32 <-> bf16, same type: copy), rows may be strided differently.
struct Cast {
  TensorView y;
  ConstTensorView x;
};
ARCUS_DECLARE_OP(cast, Cast)

/// All bytes of the view (padding columns left alone) set to zero.
struct FillZero {
  TensorView y;
};
ARCUS_DECLARE_OP(fill_zero, FillZero)

/// Every element of y = value, rounded once (padding columns left alone).
struct FillValue {
  TensorView y;  ///< compute type
  double value = 0;
};
ARCUS_DECLARE_OP(fill_value, FillValue)

/// out[t] = sum over kept j, in choice-rank order, of w[t,j] * slot_rows[t,j], then + each addend
/// in the order given; accumulate type, rounded once. A null slot row is left out.
struct WeightedSum {
  TensorView out;                          ///< [T, H]
  const void* const* slot_rows = nullptr;  ///< [T, K] rows of H elements of out's type, or null
  ConstTensorView weight;                  ///< [T, K] accumulate type; empty: all 1
  std::int64_t slots_per_token = 0;        ///< K
  ConstTensorView addend1;                 ///< [T, H] compute or accumulate type, or empty
  ConstTensorView addend2;                 ///< [T, H], or empty
};
ARCUS_DECLARE_OP(weighted_sum, WeightedSum)

/// out = x * sigmoid(g_t), g one scalar a row (shared-expert gate); and its gradients.
struct ScaleRows {
  TensorView out;         ///< [T, H]
  ConstTensorView x;      ///< [T, H]
  ConstTensorView logit;  ///< [T, 1] accumulate type
};
ARCUS_DECLARE_OP(scale_rows_sigmoid, ScaleRows)
struct ScaleRowsBackward {
  TensorView dx;         ///< [T, H]
  TensorView dlogit;     ///< [T, 1] accumulate type
  ConstTensorView dout;  ///< [T, H]
  ConstTensorView x, logit;
};
ARCUS_DECLARE_OP(scale_rows_sigmoid_backward, ScaleRowsBackward)

}  // namespace arcus
