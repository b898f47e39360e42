#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "src/base/dtype.hpp"

namespace arcus::cpu {

/// Columns of a result that one task of a product of few rows works out: rows of the weight that
/// stay in the second-level cache while groups of rows go by.
inline constexpr std::int64_t kFewRowsCols = 64;
/// Rows whose results for that many columns stand on the stack at a time.
inline constexpr std::int64_t kFewRowsGroup = 16;
template <class A>
using FewRowsSums = std::array<A, kFewRowsGroup * kFewRowsCols>;

/// y[r][c] = <x row r, w row c> for r < rows, c < cols, in T's accumulate type; rows of x and of w
/// hold `in` elements, x_stride and w_stride apart. For decoding, where reading w is what
/// takes time: w is read once, and a row's bits depend on nothing but that row and w (16 sums,
/// added in a tree).
template <class T>
void few_rows_product(Acc<T>* y, std::int64_t y_stride, const T* x, std::int64_t x_stride,
                      std::int64_t rows, const T* w, std::int64_t w_stride, std::int64_t cols,
                      std::int64_t in);

/// Calls fn(row, sums) with the cols <= kFewRowsCols products of every row of x by rows of w, which
/// are dense.
template <class T, class Fn>
void for_few_rows(const T* x, std::int64_t x_stride, std::int64_t rows, const T* w,
                  std::int64_t cols, std::int64_t in, Fn&& fn) {
  FewRowsSums<Acc<T>> sums;
  for (std::int64_t row = 0; row < rows; row += kFewRowsGroup) {
    const std::int64_t count = std::min(kFewRowsGroup, rows - row);
    few_rows_product<T>(sums.data(), kFewRowsCols, x + row * x_stride, x_stride, count, w, in, cols,
                        in);
    for (std::int64_t r = 0; r < count; ++r) {
      fn(row + r, static_cast<const Acc<T>*>(sums.data()) + r * kFewRowsCols);
    }
  }
}

}  // namespace arcus::cpu
