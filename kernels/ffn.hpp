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

/// swiglu: act = silu(gate) * up, two matrices before it; gelu_new (tanh form), gelu (exact): act =
/// gelu(up), one.
enum class Activation { swiglu, gelu_new, gelu };

/// Grouped feed-forward over segments (m-grouped: y_e = down_e(act), act = silu(gate_e x) * up_e x
/// or gelu(up_e x), each product with a bias or without). A dense layer or shared expert is one
/// segment and one expert. F = expert width, U = 2F (gate, then up) with a gate and F without,
/// R rows, Rp rows of the padded layout.
struct FfnShape {
  std::int64_t hidden_size = 0;  ///< H
  std::int64_t ff_size = 0;      ///< F
  Activation activation = Activation::swiglu;
  bool bias = false;

  bool gated() const { return activation == Activation::swiglu; }
  std::int64_t gate_up_size() const { return gated() ? 2 * ff_size : ff_size; }  ///< U
  std::int64_t up_begin() const { return gated() ? ff_size : 0; }  ///< up's first column of U
  /// Of one expert's matrices.
  std::int64_t weight_elements() const { return hidden_size * (gate_up_size() + ff_size); }
};
/// Weights of local expert e start at e * expert_stride elements, biases at e * bias_stride.
struct FfnWeights {
  ConstTensorView gate_up;         ///< [U, H] of expert 0: gate rows, then up rows
  ConstTensorView down;            ///< [H, F] of expert 0
  std::int64_t expert_stride = 0;  ///< elements between experts, same for both
  ConstTensorView gate_up_bias;    ///< [1, U] of expert 0, accumulate type; empty without bias
  ConstTensorView down_bias;       ///< [1, H] of expert 0
  std::int64_t bias_stride = 0;
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
  TensorView gate_up;  ///< [Rp, U] out, kept for backward; left alone with few_rows
  TensorView act;      ///< [Rp, F] out, kept for backward
  ConstTensorView x;   ///< [R, H]
  FfnWeights weights;
  FfnShape shape;
  std::span<const Segment> segments;
  bool few_rows = false;  ///< as Linear::few_rows
  FfnLowRank low_rank;    ///< added to the projections
};
ARCUS_DECLARE_OP(ffn_forward, FfnForward)

/// dy = weight * dout; dweight = <dout, y>; dact = dy W_down; dgate_up through the activation; dx.
/// Without row weights (dense, shared expert) dy = dout.
struct FfnBackward {
  TensorView dx;               ///< [R, H] out
  TensorView drow_weight;      ///< [1, R] accumulate type out, or empty
  TensorView dy;               ///< [Rp, H] out; padding rows zeroed
  TensorView dgate_up;         ///< [Rp, U] out; padding rows zeroed
  ConstTensorView dout;        ///< [R, H]
  ConstTensorView row_weight;  ///< [1, R] accumulate type, or empty
  ConstTensorView y;           ///< [R, H] of the forward pass, or empty
  ConstTensorView gate_up;     ///< [Rp, U]
  FfnWeights weights;
  FfnShape shape;
  std::span<const Segment> segments;
  FfnLowRank low_rank;
};
ARCUS_DECLARE_OP(ffn_backward, FfnBackward)

/// Weight gradients (k-grouped): a leaf per segment and tensor, dW tile in the outer loop, the
/// segments of its expert inside; of a bias the columns of dgate_up and dy summed over the segment
/// as by bias_grad. Segments are sorted by (local expert, micro-batch). `x` must have
/// 32 readable, finite rows behind row R.
struct FfnWgrad {
  // A tensor whose sum is null (frozen) is left out.
  GradientSum dgate, dup;              ///< [F, H] of local expert 0
  GradientSum ddown;                   ///< [H, F] of local expert 0
  std::int64_t expert_stride = 0;      ///< elements between experts in the sums
  std::int64_t tensor_idx_stride = 0;  ///< step of tensor_idx from one expert to the next
  GradientSum dgate_bias, dup_bias;    ///< [1, F] of local expert 0
  GradientSum ddown_bias;              ///< [1, H] of local expert 0
  std::int64_t bias_stride = 0;        ///< elements between experts in the sums of biases
  ConstTensorView x;                   ///< [R, H]
  TensorView act;                      ///< [Rp, F]; padding rows are zeroed here
  ConstTensorView dy;                  ///< [Rp, H]
  ConstTensorView dgate_up;            ///< [Rp, U]
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
