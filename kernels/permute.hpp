#pragma once

#include "kernels/dispatch.hpp"
#include "src/base/tensor.hpp"

namespace arcus {

/// y[r] = x[index[r] / indices_per_row], bit by bit; zeros where the index is negative. With
/// `index` = the slots of rows in send order and indices_per_row = K, rows of tokens are laid out
/// for an exchange.
struct GatherRows {
  TensorView y;                      ///< [R, C]
  ConstTensorView x;                 ///< [T, C], y's type
  ConstTensorView index;             ///< [1, R] i32, index < T * indices_per_row
  std::int64_t indices_per_row = 1;  ///< consecutive indices that mean the same row of x
};
ARCUS_DECLARE_OP(gather_rows, GatherRows)

}  // namespace arcus
