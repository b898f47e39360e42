#pragma once

#include <cstdint>
#include <span>

#include "kernels/ffn.hpp"

namespace arcus {

/// Low-rank adapters of a weight [out, in] that stays as it is [LoRA, 2106.09685]: the layer
/// computes x W^T + scale (x A^T) B^T, in two products of inner size r. `LowRankWeights` and what
/// they do inside a feed-forward stand in ffn.hpp.

/// u = scale x A^T; y += u B^T.
struct LowRankForward {
  TensorView y;       ///< [T, out] holds x W^T
  TensorView u;       ///< [T, r] out, dense, kept for backward
  ConstTensorView x;  ///< [T, in]
  LowRankWeights weights;
  bool few_rows = false;  ///< as Linear::few_rows
};
ARCUS_DECLARE_OP(low_rank_forward, LowRankForward)

/// v = scale dy B; dx += v A.
struct LowRankBackward {
  TensorView dx;       ///< [T, in] holds dy W
  TensorView v;        ///< [T, r] out, dense
  ConstTensorView dy;  ///< [T, out]
  LowRankWeights weights;
};
ARCUS_DECLARE_OP(low_rank_backward, LowRankBackward)

/// dA = v^T x and dB = dy^T u, a leaf each per segment.
struct LowRankWgrad {
  // Null where frozen.
  GradientSum da;                      ///< [r, in] of local expert 0
  GradientSum db;                      ///< [out, r] of local expert 0
  std::int64_t expert_stride = 0;      ///< elements between experts in the sums
  std::int64_t tensor_idx_stride = 0;  ///< step of tensor_idx from one expert to the next
  ConstTensorView x;                   ///< [R, in] or [Rp, in], its padding rows finite
  bool x_is_padded = false;            ///< which of the two
  ConstTensorView dy;                  ///< [Rp, out]
  TensorView u;                        ///< [Rp, r]; padding rows are zeroed here
  ConstTensorView v;                   ///< [Rp, r]
  std::span<const Segment> segments;   ///< sorted by local expert
};
ARCUS_DECLARE_OP(low_rank_wgrad, LowRankWgrad)

/// What an adapter's products are like, for build_primitives.
struct LowRankShape {
  std::int64_t out = 0, in = 0, rank = 0;
  std::int64_t x_stride = 0;  ///< of x, and of dx
  std::int64_t y_stride = 0;  ///< of y, and of dy
  DType compute = DType::f32;
  DType dx_type = DType::f32;  ///< compute or accumulate type
  std::int64_t min_rows = 1, max_rows = 0;
};
std::vector<GemmShape> low_rank_gemm_shapes(const LowRankShape& shape, bool training);

}  // namespace arcus
