#pragma once

#include <array>
#include <cstdint>
#include <type_traits>

#include "src/base/dtype.hpp"

namespace arcus::cpu {

/// y = value rounded to y's type. Through the bits for bf16: assigning the class keeps loops from
/// being vectorised.
template <class T, class A>
inline void store(T& y, A value) {
  if constexpr (std::is_same_v<T, bf16>) {
    y.bits = bf16(static_cast<float>(value)).bits;
  } else {
    y = static_cast<T>(value);
  }
}

/// Interleaved partial sums of a row reduction. A constant, not the width of a register: the order
/// of additions must not depend on the processor.
inline constexpr int kLanes = 32;

/// The lanes added in a tree of fixed shape.
template <class A>
inline A sum_lanes(std::array<A, kLanes>& lane) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lane[j] += lane[j + width];
  }
  return lane[0];
}

/// Sum of term(i), i = 0..n-1, in type A: element i goes to lane i mod 32, so the order of
/// additions depends on n alone.
template <class A, class Term>
inline A sum_terms(std::int64_t n, Term&& term) {
  std::array<A, kLanes> lane{};
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) lane[j] += term(i + j);
  }
  for (int j = 0; i + j < n; ++j) lane[j] += term(i + j);
  return sum_lanes(lane);
}

/// Largest of term(i) and `floor`; the order plays no part.
template <class A, class Term>
inline A max_terms(std::int64_t n, A floor, Term&& term) {
  std::array<A, kLanes> lane;
  lane.fill(floor);
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      const A value = term(i + j);
      lane[j] = value > lane[j] ? value : lane[j];
    }
  }
  for (int j = 0; i + j < n; ++j) {
    const A value = term(i + j);
    lane[j] = value > lane[j] ? value : lane[j];
  }
  for (int j = 1; j < kLanes; ++j) lane[0] = lane[j] > lane[0] ? lane[j] : lane[0];
  return lane[0];
}

/// <a, b> of rows of n elements of compute types, in type A.
template <class A, class T, class U>
inline A dot(const T* a, const U* b, std::int64_t n) {
  return sum_terms<A>(n,
                      [=](std::int64_t i) { return static_cast<A>(a[i]) * static_cast<A>(b[i]); });
}

}  // namespace arcus::cpu
