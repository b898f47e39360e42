#pragma once

#include <cstdint>
#include <span>

#include "kernels/gemm.hpp"

namespace arcus {

/// The rows of one micro-batch for one expert.
struct Segment {
  std::int32_t local_expert_idx = 0;
  std::int64_t micro_batch = 0;   ///< global number
  std::int64_t row_begin = 0;     ///< in buffers that are exchanged: x, y, dout, dx
  std::int64_t padded_begin = 0;  ///< in local buffers (gate_up, act, dy, ...): multiples of 32
  std::int64_t rows = 0;
};

/// Grouped SwiGLU feed-forward over segments (m-grouped: y_e = down_e(silu(gate_e x) * up_e x)).
/// A dense layer or shared expert is one segment and one expert. F = expert width, R rows, Rp rows
/// of the padded layout.
struct FfnShape {
  std::int64_t hidden_size = 0;  ///< H
  std::int64_t ff_size = 0;      ///< F
};
/// Weights of local expert e start at e * expert_stride elements.
struct FfnWeights {
  ConstTensorView gate_up;         ///< [2F, H] of expert 0: gate rows, then up rows
  ConstTensorView down;            ///< [H, F] of expert 0
  std::int64_t expert_stride = 0;  ///< elements between experts, same for both
};

/// Low-rank adapters of a weight [out, in]: A [r, in] and B [out, r] of local expert 0
/// (low_rank.hpp says what they compute). Empty: there are none.
struct LowRankWeights {
  ConstTensorView a, b;
  std::int64_t expert_stride = 0;  ///< elements between experts, same for both
  double scale = 1;                ///< alpha / r

  bool empty() const { return a.empty(); }
};
/// The adapters of one projection, and where its inner rows go: u forward, v backward.
struct FfnLowRankPart {
  LowRankWeights weights;
  TensorView inner;  ///< [Rp, r] out, dense
};
struct FfnLowRank {
  FfnLowRankPart gate, up, down;
};

struct FfnForward {
  TensorView y;        ///< [R, H] out
  TensorView gate_up;  ///< [Rp, 2F] out, kept for backward; left alone with few_rows
  TensorView act;      ///< [Rp, F] out, kept for backward
  ConstTensorView x;   ///< [R, H]
  FfnWeights weights;
  FfnShape shape;
  std::span<const Segment> segments;
  bool few_rows = false;  ///< as Linear::few_rows
  FfnLowRank low_rank;    ///< added to the projections
};
ARCUS_DECLARE_OP(ffn_forward, FfnForward)

/// dy = weight * dout; dweight = <dout, y>; dact = dy W_down; dgate_up through SwiGLU; dx.
/// Without row weights (dense, shared expert) dy = dout.
struct FfnBackward {
  TensorView dx;               ///< [R, H] out
  TensorView drow_weight;      ///< [1, R] accumulate type out, or empty
  TensorView dy;               ///< [Rp, H] out; padding rows zeroed
  TensorView dgate_up;         ///< [Rp, 2F] out; padding rows zeroed
  ConstTensorView dout;        ///< [R, H]
  ConstTensorView row_weight;  ///< [1, R] accumulate type, or empty
  ConstTensorView y;           ///< [R, H] of the forward pass, or empty
  ConstTensorView gate_up;     ///< [Rp, 2F]
  FfnWeights weights;
  FfnShape shape;
  std::span<const Segment> segments;
  FfnLowRank low_rank;
};
ARCUS_DECLARE_OP(ffn_backward, FfnBackward)

/// Weight gradients (k-grouped): a leaf per segment and tensor, dW tile in the outer loop, the
/// segments of its expert inside. Segments are sorted by (local expert, micro-batch). `x` must have
/// 32 readable, finite rows behind row R.
struct FfnWgrad {
  // A tensor whose sum is null (frozen) is left out.
  GradientSum dgate, dup;              ///< [F, H] of local expert 0
  GradientSum ddown;                   ///< [H, F] of local expert 0
  std::int64_t expert_stride = 0;      ///< elements between experts in the sums
  std::int64_t tensor_idx_stride = 0;  ///< step of tensor_idx from one expert to the next
  ConstTensorView x;                   ///< [R, H]
  TensorView act;                      ///< [Rp, F]; padding rows are zeroed here
  ConstTensorView dy;                  ///< [Rp, H]
  ConstTensorView dgate_up;            ///< [Rp, 2F]
  FfnShape shape;
  std::span<const Segment> segments;
};
ARCUS_DECLARE_OP(ffn_wgrad, FfnWgrad)

/// The products above, for build_primitives. `max_rows` = rows of the largest segment.
std::vector<GemmShape> ffn_gemm_shapes(const FfnShape& shape, DType compute, std::int64_t max_rows,
                                       bool training);
/// Row stride (elements) of gate_up/dgate_up, act and dy buffers: the columns, as products on dense
/// rows run oneDNN's fastest kernel and give a row the same bits in any tile.
std::int64_t ffn_row_stride(std::int64_t cols);

}  // namespace arcus
