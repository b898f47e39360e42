#include "kernels/cpu/few_rows.hpp"

#include <cmath>
#include <cstring>
#include <type_traits>

// Compiled with contraction of products and sums (kernels/CMakeLists.txt): where the processor has
// them, fused operations add every product, in all shapes of block below.
namespace arcus::cpu {
namespace {

constexpr int kLanes = 16;
constexpr int kBlock = 4;  ///< rows of x, and of w, whose sums stay in registers together

template <class A>
using Lanes [[gnu::vector_size(kLanes * sizeof(A))]] = A;

/// Elements of a row that are taken at a time, as kParts vectors: two bf16 fit into one f32, the
/// even ones' bits above, the odd ones' below.
template <class T>
inline constexpr int kParts = std::is_same_v<T, bf16> ? 2 : 1;
template <class T>
inline constexpr std::int64_t kStep = kLanes* kParts<T>;

template <class A, class T>
struct Step {
  explicit Step(const T* from) {
    if constexpr (std::is_same_v<T, bf16>) {
      using Words [[gnu::vector_size(kLanes * 4)]] = std::uint32_t;
      Words pairs;
      std::memcpy(&pairs, from, sizeof(pairs));
      const Words even = pairs << 16;
      const Words odd = pairs & 0xffff0000U;
      std::memcpy(&part[0], &even, sizeof(even));
      std::memcpy(&part[1], &odd, sizeof(odd));
    } else {
      std::memcpy(&part[0], from, sizeof(part[0]));
    }
  }
  Lanes<A> part[kParts<T>];
};

/// The lanes added in a tree: lane i and lane i + 8, then + 4, + 2, + 1.
template <class A>
A sum_of(const Lanes<A>& all) {
  const auto eight = __builtin_shufflevector(all, all, 0, 1, 2, 3, 4, 5, 6, 7) +
                     __builtin_shufflevector(all, all, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) +
                    __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  const auto two =
      __builtin_shufflevector(four, four, 0, 1) + __builtin_shufflevector(four, four, 2, 3);
  return two[0] + two[1];
}

/// The sum of the lanes and of what is left of the rows.
template <class A, class T>
A finish(Lanes<A> lanes, const T* x, const T* w, std::int64_t rest) {
  for (std::int64_t i = 0; i < rest; ++i) {
    lanes[i % kLanes] = std::fma(static_cast<A>(x[i]), static_cast<A>(w[i]), lanes[i % kLanes]);
  }
  return sum_of<A>(lanes);
}

/// kRows rows of x by kCols rows of w.
template <int kRows, int kCols, class T, class A = Acc<T>>
void block(A* y, std::int64_t y_stride, const T* x, std::int64_t x_stride, const T* w,
           std::int64_t w_stride, std::int64_t in) {
  Lanes<A> sums[kRows][kCols] = {};
  const std::int64_t whole = in / kStep<T> * kStep<T>;
  for (std::int64_t i = 0; i < whole; i += kStep<T>) {
#pragma GCC unroll 4
    for (int c = 0; c < kCols; ++c) {
      __builtin_prefetch(w + (kCols + c) * w_stride + i);
      const Step<A, T> from_w(w + c * w_stride + i);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Step<A, T> from_x(x + r * x_stride + i);
#pragma GCC unroll 2
        for (int part = 0; part < kParts<T>; ++part) {
          sums[r][c] += from_x.part[part] * from_w.part[part];
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kCols; ++c) {
      y[r * y_stride + c] =
          finish<A>(sums[r][c], x + r * x_stride + whole, w + c * w_stride + whole, in - whole);
    }
  }
}

template <int kRows, class T, class A = Acc<T>>
void row_group(A* y, std::int64_t y_stride, const T* x, std::int64_t x_stride, const T* w,
               std::int64_t w_stride, std::int64_t cols, std::int64_t in) {
  std::int64_t c = 0;
  for (; c + kBlock <= cols; c += kBlock) {
    block<kRows, kBlock>(y + c, y_stride, x, x_stride, w + c * w_stride, w_stride, in);
  }
  for (; c < cols; ++c)
    block<kRows, 1>(y + c, y_stride, x, x_stride, w + c * w_stride, w_stride, in);
}

}  // namespace

template <class T>
void few_rows_product(Acc<T>* y, std::int64_t y_stride, const T* x, std::int64_t x_stride,
                      std::int64_t rows, const T* w, std::int64_t w_stride, std::int64_t cols,
                      std::int64_t in) {
  for (std::int64_t r = 0; r < rows; r += kBlock) {
    Acc<T>* to = y + r * y_stride;
    const T* from = x + r * x_stride;
    switch (rows - r) {
      case 1:
        row_group<1>(to, y_stride, from, x_stride, w, w_stride, cols, in);
        break;
      case 2:
        row_group<2>(to, y_stride, from, x_stride, w, w_stride, cols, in);
        break;
      case 3:
        row_group<3>(to, y_stride, from, x_stride, w, w_stride, cols, in);
        break;
      default:
        row_group<kBlock>(to, y_stride, from, x_stride, w, w_stride, cols, in);
    }
  }
}

template void few_rows_product<float>(float*, std::int64_t, const float*, std::int64_t,
                                      std::int64_t, const float*, std::int64_t, std::int64_t,
                                      std::int64_t);
template void few_rows_product<bf16>(float*, std::int64_t, const bf16*, std::int64_t, std::int64_t,
                                     const bf16*, std::int64_t, std::int64_t, std::int64_t);
template void few_rows_product<double>(double*, std::int64_t, const double*, std::int64_t,
                                       std::int64_t, const double*, std::int64_t, std::int64_t,
                                       std::int64_t);

}  // namespace arcus::cpu
