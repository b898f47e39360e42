#pragma once

#include <atomic>
#include <cstdint>
#include <limits>
#include <span>

#include "kernels/dispatch.hpp"
#include "src/base/tensor.hpp"

namespace arcus {

/// Order-independent sums (reproducible runs): a leaf enters as int64_rne(leaf * 2^50), sums are
/// integers, so which rank or thread adds what, and when, is free.
inline constexpr int kLeafScaleBits = 50;

/// The first bad leaf of a step: key = tensor index * 2^32 + global micro-batch number, the lowest
/// wins; kNoBadLeaf when all were good.
inline constexpr std::int64_t kNoBadLeaf = std::numeric_limits<std::int64_t>::max();
inline std::int64_t bad_leaf_key(std::int64_t tensor_idx, std::int64_t micro_batch) {
  return (tensor_idx << 32) | micro_batch;
}
using BadLeafFlag = std::atomic<std::int64_t>;
/// Lowers `flag` to `key`.
void raise_bad_leaf(BadLeafFlag& flag, std::int64_t key);

/// Where the leaves of one logical tensor are added up.
struct GradientSum {
  void* sum = nullptr;       ///< as large as the tensor
  DType dtype = DType::i64;  ///< i64: order-independent; f32: plain sums; f64: gradient checks
  float limit = 0;           ///< i64: |leaf| above it, or not finite, raises the flag
  std::int64_t tensor_idx = 0;
  BadLeafFlag* flag = nullptr;
  /// Not null: 1 while the memory holds what an earlier step left, so that the first leaf is stored
  /// instead of added. Only ops whose leaves cover the whole tensor take it (linear_wgrad,
  /// ffn_wgrad: one mark a tensor, `tensor_idx` apart); they set it to 0.
  std::uint8_t* stale = nullptr;

  /// The same tensor from element `offset` on.
  GradientSum at(std::int64_t offset) const {
    GradientSum part = *this;
    part.sum = static_cast<char*>(sum) + offset * static_cast<std::int64_t>(size_of(dtype));
    return part;
  }
};
/// 2^(62-S) / most_leaves: no subset of that many leaves can overflow.
float leaf_limit(std::int64_t most_leaves);

/// sum += leaf, [rows, cols] into rows `target_stride` apart; the leaf is f32 (f64 for an f64 sum).
/// Also used inside other ops.
struct AddLeaf {
  GradientSum target;
  std::int64_t target_stride = 0;
  ConstTensorView leaf;
  std::int64_t micro_batch = 0;
};
ARCUS_DECLARE_OP(add_leaf, AddLeaf)

/// Elements begin..begin + count of a flat array.
struct ElementRange {
  std::int64_t begin = 0, count = 0;
};

/// sums_of_squares[b] of the gradient of blocks[b], as 8 interleaved f64 sums (a block's element i
/// to sum i mod 8), added 0..7: it depends on the block's elements alone, not on its place or
/// neighbours. The gradient is the sum as f32 (f64 for f64): q to g by one rounding and an exact
/// product.
struct GradientSquares {
  ConstTensorView sum;                   ///< [1, n] i64 | f32 | f64
  TensorView sums_of_squares;            ///< [1, B] f64
  std::span<const ElementRange> blocks;  ///< [B], inside sum
};
ARCUS_DECLARE_OP(gradient_squares, GradientSquares)

/// AdamW [1711.05101] on n elements in place. g, from its sum as above, is multiplied by
/// clip_factor first.
struct AdamW {
  TensorView master;    ///< [1, n] f32 | f64
  TensorView m, v;      ///< [1, n], master's type
  ConstTensorView sum;  ///< [1, n] i64 (f32 master) | master's type
  TensorView compute;   ///< [1, n] bf16 copy to write, or empty
  double clip_factor = 1;
  double lr = 0, beta1 = 0, beta2 = 0, eps = 0, weight_decay = 0;
  double bias_correction1 = 1;  ///< 1 - beta1^t
  double bias_correction2 = 1;  ///< 1 - beta2^t
};
ARCUS_DECLARE_OP(adamw, AdamW)

}  // namespace arcus
