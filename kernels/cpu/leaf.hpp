#pragma once

#include <cstdint>

#include "kernels/gradient.hpp"

namespace arcus::cpu {

/// How a leaf reaches its sum: added to what is there, or in its place. `stream` writes past the
/// caches, for a sum that is not needed again soon: its lines are then not read first.
enum class LeafWrite { add, store, stream };

/// add_leaf on the calling thread: leaf [rows, cols] with rows `leaf_stride` apart into `target`,
/// rows `target_stride` apart. A is float for sums of i64 and f32, double for f64.
template <class A>
void add_leaf_rows(const GradientSum& target, std::int64_t target_stride, const A* leaf,
                   std::int64_t leaf_stride, std::int64_t rows, std::int64_t cols,
                   std::int64_t micro_batch, LeafWrite write = LeafWrite::add);

/// sum[i] += int64_rne(leaf[i] * 2^50) modulo 2^64 (= where `write` says so). False if a leaf is
/// not finite or |leaf| > limit; the sum is then meaningless.
bool add_quantized(std::int64_t* sum, const float* leaf, std::int64_t count, float limit,
                   LeafWrite write = LeafWrite::add);
/// The same without intrinsics, for processors without AVX512DQ: the same bits.
bool add_quantized_portable(std::int64_t* sum, const float* leaf, std::int64_t count, float limit,
                            LeafWrite write = LeafWrite::add);

}  // namespace arcus::cpu
