#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/gradient.hpp"

namespace arcus {

/// Matrix products whose bits depend on shapes alone. Every product is cut into row tiles (forward
/// and dgrad: up to 256 rows and an exact tail; under AMX one fixed, zero-padded height) or, for a
/// weight gradient, into row tiles of dW (wgrad_tile_rows, linear_wgrad_tile_rows) over K = all
/// rows of the leaf, zero-padded to a multiple of 32. Each tile runs on one thread; threads share
/// out tiles. f32, bf16 (f32 sums) and f64. Padded row strides of x, y, dx, dy are allowed and do
/// not change bits, but dense rows (stride = columns) save a copy of the tile.

/// y = x W^T [+ bias] (+ y where `accumulate`).
struct Linear {
  TensorView y;            ///< [T, out], compute type or accumulate type
  ConstTensorView x;       ///< [T, in], compute type
  ConstTensorView weight;  ///< [out, in], x's type, contiguous
  ConstTensorView bias;    ///< [1, out] accumulate type, or empty
  bool accumulate = false;
  /// T is small (decoding): the time goes into reading the weight, which is read once, and a row's
  /// bits differ from those of the usual products. Without `accumulate`.
  bool few_rows = false;
};
ARCUS_DECLARE_OP(linear_forward, Linear)

/// dx = dy W (+ dx where `accumulate`).
struct LinearDgrad {
  TensorView dx;           ///< [T, in], compute or accumulate type
  ConstTensorView dy;      ///< [T, out]
  ConstTensorView weight;  ///< [out, in], dy's type, contiguous
  bool accumulate = false;
};
ARCUS_DECLARE_OP(linear_dgrad, LinearDgrad)

/// leaf = dy^T x, added to `dweight`, one leaf of `micro_batch`. x's rows T..padded_rows(T) must be
/// readable and finite; dy's are not read.
struct LinearWgrad {
  GradientSum dweight;  ///< [out, in]
  ConstTensorView dy;   ///< [T, out]
  ConstTensorView x;    ///< [T, in], dy's type, padding rows behind it
  std::int64_t micro_batch = 0;
};
ARCUS_DECLARE_OP(linear_wgrad, LinearWgrad)

/// Rows to which K, the number of rows of a wgrad operand, is padded.
inline constexpr std::int64_t kWgradRowPadding = 32;
inline std::int64_t padded_rows(std::int64_t rows) {
  return (rows + kWgradRowPadding - 1) / kWgradRowPadding * kWgradRowPadding;
}
/// Rows of a dW tile, part of the definition of a leaf: 256, fewer where `in` is so large that the
/// tile (f32 leaf and integer sum) would leave the second-level cache.
inline std::int64_t wgrad_tile_rows(std::int64_t in) {
  std::int64_t rows = 256;
  while (rows > 64 && rows * in > (std::int64_t{1} << 19)) rows /= 2;
  return rows;
}

/// The same of a linear layer, whose few tiles are all the work there is: at least four of them
/// where that leaves 64 rows, so that threads find work.
inline std::int64_t linear_wgrad_tile_rows(std::int64_t out, std::int64_t in) {
  std::int64_t rows = wgrad_tile_rows(in);
  while (rows > 64 && out < 4 * rows) rows /= 2;
  return rows;
}

/// Leaf of a bias: dy's columns summed over tokens, f64 over blocks of 64 rows, blocks in order,
/// rounded once.
struct BiasGrad {
  GradientSum dbias;   ///< [1, out]
  ConstTensorView dy;  ///< [T, out] compute or accumulate type
  std::int64_t micro_batch = 0;
};
ARCUS_DECLARE_OP(bias_grad, BiasGrad)

/// One matrix product that may occur in a step, for building primitives before the first one.
enum class GemmKind { forward, dgrad, wgrad, ffn_wgrad };
struct GemmShape {
  GemmKind kind = GemmKind::forward;
  DType dtype = DType::f32;         ///< of the operands
  DType result_dtype = DType::f32;  ///< of y or dx (wgrad: always the accumulate type)
  std::int64_t out = 0, in = 0;     ///< the weight's shape
  std::int64_t x_stride = 0;        ///< row stride of x (forward, wgrad) or dx (dgrad)
  std::int64_t y_stride = 0;        ///< row stride of y (forward) or dy (dgrad, wgrad)
  std::int64_t min_rows = 1;        ///< every row count in min_rows..max_rows may occur
  std::int64_t max_rows = 0;
  bool bias = false;
  bool accumulate = false;  ///< forward, dgrad; wgrad is built both ways
};
/// The products of the gradients of the linear layer `forward`.
inline std::vector<GemmShape> gradient_shapes(GemmShape forward) {
  forward.bias = false;
  std::vector<GemmShape> shapes(2, forward);
  shapes[0].kind = GemmKind::dgrad;
  shapes[1].kind = GemmKind::wgrad;
  return shapes;
}
struct PrimitiveReport {
  std::int64_t primitives = 0;
  std::int64_t bytes = 0;  ///< scratch memory set aside
  double seconds = 0;
};
/// Builds whatever `shapes` need, for all threads of this stream; afterwards a missing primitive is
/// built on the spot and counted (late_primitives).
PrimitiveReport build_primitives(Stream& stream, std::span<const GemmShape> shapes);
/// For runs that need not repeat their bits on another layout: where tiles have a fixed height
/// (AMX), the last one of a product then gets only the zero rows that its kernel needs to be fast.
/// To be called before build_primitives.
void let_row_bits_differ(Stream& stream);
/// Primitives built outside build_primitives since the stream was made; 0 in a well-planned run.
std::int64_t late_primitives(Stream& stream);

}  // namespace arcus
