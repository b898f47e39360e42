#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "kernels/cpu/leaf.hpp"
#include "src/base/tensor.hpp"

namespace arcus::cpu {

/// Leaves of gains and biases: sums over rows in f64, by blocks of 64 rows, blocks in order,
/// rounded once.
inline constexpr std::int64_t kColumnBlockRows = 64;
inline constexpr std::int64_t kColumnChunk = 256;  ///< columns whose leaf stands on the stack

/// One leaf of `cols` elements from sums over its blocks, [blocks, cols] with rows `stride` apart.
template <class A>
void add_block_sums(const GradientSum& target, const double* sums, std::int64_t stride,
                    std::int64_t blocks, std::int64_t cols, std::int64_t micro_batch) {
  for (std::int64_t begin = 0; begin < cols; begin += kColumnChunk) {
    const std::int64_t count = std::min(kColumnChunk, cols - begin);
    std::array<double, kColumnChunk> total{};
    std::array<A, kColumnChunk> leaf;
    for (std::int64_t block = 0; block < blocks; ++block) {
      const double* part = sums + block * stride + begin;
      for (std::int64_t c = 0; c < count; ++c) total[static_cast<std::size_t>(c)] += part[c];
    }
    std::transform(total.begin(), total.begin() + count, leaf.begin(),
                   [](double value) { return static_cast<A>(value); });
    add_leaf_rows(target.at(begin), count, leaf.data(), count, 1, count, micro_batch);
  }
}

/// The leaf of columns [begin, begin + cols) of a bias, cols <= kColumnChunk: those of dy, summed.
template <class T>
void add_column_leaf(const GradientSum& bias, ConstTensorView dy, std::int64_t begin,
                     std::int64_t cols, std::int64_t micro_batch) {
  std::array<double, kColumnChunk> total{};
  for (std::int64_t block = 0; block < dy.rows; block += kColumnBlockRows) {
    std::array<double, kColumnChunk> sums{};
    for (std::int64_t row = block; row < std::min(dy.rows, block + kColumnBlockRows); ++row) {
      const T* values = dy.row<T>(row) + begin;
      for (std::int64_t j = 0; j < cols; ++j) {
        sums[static_cast<std::size_t>(j)] += static_cast<double>(values[j]);
      }
    }
    for (std::size_t j = 0; j < kColumnChunk; ++j) total[j] += sums[j];
  }
  add_block_sums<Acc<T>>(bias.at(begin), total.data(), cols, 1, cols, micro_batch);
}

}  // namespace arcus::cpu
