#pragma once

#include <cstdint>
#include <cstring>

namespace arcus::cpu {

/// A 16 x 16 block of elements of type U (an unsigned integer or double) transposed in registers:
/// four rounds of interleaving row i with row i + 8 bring element (i, j) to (j, i).
template <class U>
struct TransposeBlock {
  static constexpr int kSize = 16;
  using Row [[gnu::vector_size(kSize * sizeof(U))]] = U;

  /// The lower, and the upper halves of two rows, element by element in turn.
  static Row low(Row a, Row b) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  }
  static Row high(Row a, Row b) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                   31);
  }

  static void run(U* to, std::int64_t to_stride, const U* from, std::int64_t from_stride) {
    Row rows[kSize];
    Row mixed[kSize];
    for (int i = 0; i < kSize; ++i) std::memcpy(&rows[i], from + i * from_stride, sizeof(Row));
#pragma GCC unroll 4
    for (int round = 0; round < 4; ++round) {
#pragma GCC unroll 8
      for (int i = 0; i < kSize / 2; ++i) {
        mixed[2 * i] = low(rows[i], rows[i + kSize / 2]);
        mixed[2 * i + 1] = high(rows[i], rows[i + kSize / 2]);
      }
#pragma GCC unroll 16
      for (int i = 0; i < kSize; ++i) rows[i] = mixed[i];
    }
    for (int i = 0; i < kSize; ++i) std::memcpy(to + i * to_stride, &rows[i], sizeof(Row));
  }
};

/// to[cols, padded] = transpose of from[rows, cols], its columns rows..padded-1 set to zero.
template <class U>
void transpose_padded(U* to, std::int64_t padded, const U* from, std::int64_t from_stride,
                      std::int64_t rows, std::int64_t cols) {
  constexpr std::int64_t kBlock = TransposeBlock<U>::kSize;
  const std::int64_t whole_rows = rows / kBlock * kBlock;
  const std::int64_t whole_cols = cols / kBlock * kBlock;
  // Along rows first: 16 rows side by side are read as 16 streams, which the processor fetches
  // ahead; down a column every row would be another page.
  for (std::int64_t row = 0; row < whole_rows; row += kBlock) {
    for (std::int64_t col = 0; col < whole_cols; col += kBlock) {
      TransposeBlock<U>::run(to + col * padded + row, padded, from + row * from_stride + col,
                             from_stride);
    }
  }
  for (std::int64_t col = 0; col < cols; ++col) {
    for (std::int64_t row = col < whole_cols ? whole_rows : 0; row < rows; ++row) {
      to[col * padded + row] = from[row * from_stride + col];
    }
    std::memset(to + col * padded + rows, 0, static_cast<std::size_t>(padded - rows) * sizeof(U));
  }
}

}  // namespace arcus::cpu
