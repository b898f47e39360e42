#pragma once

#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "src/base/tensor.hpp"

namespace arcus::testing {

/// A matrix with storage, rows `stride` apart, and `slack` rows of storage behind the last one.
template <class T>
struct Matrix {
  Matrix(std::int64_t rows, std::int64_t cols, std::int64_t stride = 0, std::int64_t slack = 0)
      : num_rows(rows),
        num_cols(cols),
        row_stride(stride == 0 ? cols : stride),
        values(static_cast<std::size_t>((rows + slack) * row_stride)) {}

  T& at(std::int64_t i, std::int64_t j) {
    return values[static_cast<std::size_t>(i * row_stride + j)];
  }
  const T& at(std::int64_t i, std::int64_t j) const {
    return values[static_cast<std::size_t>(i * row_stride + j)];
  }
  T* row(std::int64_t i) { return values.data() + i * row_stride; }
  TensorView view() { return {values.data(), dtype_of<T>(), num_rows, num_cols, row_stride}; }
  TensorView rows(std::int64_t begin, std::int64_t count) { return view().row_range(begin, count); }
  /// Everything, slack included, uniform in [-1, 1] * scale.
  Matrix& randomize(std::uint32_t seed, double scale = 1) {
    std::mt19937 generator(seed);
    std::uniform_real_distribution<double> uniform(-scale, scale);
    for (T& value : values) value = static_cast<T>(static_cast<Acc<T>>(uniform(generator)));
    return *this;
  }

  std::int64_t num_rows, num_cols, row_stride;
  std::vector<T> values;
};

template <class T>
bool same_bits(const T* a, const T* b, std::int64_t count) {
  return std::memcmp(a, b, static_cast<std::size_t>(count) * sizeof(T)) == 0;
}
template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && same_bits(a.data(), b.data(), std::ssize(a));
}

/// Relative rounding error of one operation in T.
template <class T>
constexpr double unit_roundoff() {
  if constexpr (std::is_same_v<T, double>) return 0x1p-53;
  return std::is_same_v<T, float> ? 0x1p-24 : 0x1p-9;
}

}  // namespace arcus::testing
