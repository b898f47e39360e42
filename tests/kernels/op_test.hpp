#pragma once

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "src/base/rng.hpp"
#include "src/base/tensor.hpp"

namespace arcus::test {

/// A matrix that owns its elements; rows may be padded, the padding holds a mark.
template <class T>
class Matrix {
 public:
  explicit Matrix(std::int64_t rows = 0, std::int64_t cols = 0, std::int64_t padding = 0)
      : rows_(rows), cols_(cols), stride_(cols + padding) {
    std::memset(static_cast<void*>(&mark_), 0x5a, sizeof(T));
    data_.assign(static_cast<std::size_t>(rows_ * stride_), mark_);
  }

  T& at(std::int64_t i, std::int64_t j) { return data_[static_cast<std::size_t>(i * stride_ + j)]; }
  const T& at(std::int64_t i, std::int64_t j) const {
    return data_[static_cast<std::size_t>(i * stride_ + j)];
  }
  TensorView view() { return {data_.data(), dtype_of<T>(), rows_, cols_, stride_}; }
  ConstTensorView view() const { return {data_.data(), dtype_of<T>(), rows_, cols_, stride_}; }
  operator TensorView() { return view(); }             // NOLINT(google-explicit-constructor)
  operator ConstTensorView() const { return view(); }  // NOLINT(google-explicit-constructor)

  std::int64_t rows() const { return rows_; }
  std::int64_t cols() const { return cols_; }
  bool padding_untouched() const {
    for (std::int64_t i = 0; i < rows_; ++i) {
      for (std::int64_t j = cols_; j < stride_; ++j) {
        if (std::memcmp(&at(i, j), &mark_, sizeof(T)) != 0) return false;
      }
    }
    return true;
  }
  bool same_bits(const Matrix& other) const {
    return data_.size() == other.data_.size() &&
           (data_.empty() ||
            std::memcmp(data_.data(), other.data_.data(), data_.size() * sizeof(T)) == 0);
  }
  std::vector<T>& data() { return data_; }
  const std::vector<T>& data() const { return data_; }

 private:
  std::int64_t rows_, cols_, stride_;
  T mark_;
  std::vector<T> data_;
};

using Doubles = Matrix<double>;
using Ints = Matrix<std::int32_t>;

template <class T>
T from_double(double value) {
  if constexpr (std::is_same_v<T, bf16>) {
    return bf16(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}
template <class T>
double to_double(T value) {
  return static_cast<double>(value);
}

/// The matrix in another type, rounded once.
template <class T>
Matrix<T> as(const Doubles& from, std::int64_t padding = 0) {
  Matrix<T> to(from.rows(), from.cols(), padding);
  for (std::int64_t i = 0; i < from.rows(); ++i) {
    for (std::int64_t j = 0; j < from.cols(); ++j) to.at(i, j) = from_double<T>(from.at(i, j));
  }
  return to;
}
template <class T>
Doubles widened(const Matrix<T>& from) {
  Doubles to(from.rows(), from.cols());
  for (std::int64_t i = 0; i < from.rows(); ++i) {
    for (std::int64_t j = 0; j < from.cols(); ++j) to.at(i, j) = to_double(from.at(i, j));
  }
  return to;
}
template <class T>
Matrix<T> filled(std::int64_t rows, std::int64_t cols, T value) {
  Matrix<T> m(rows, cols);
  std::fill(m.data().begin(), m.data().end(), value);
  return m;
}
/// Rows begin..begin + count.
template <class T>
Matrix<T> rows_of(const Matrix<T>& from, std::int64_t begin, std::int64_t count) {
  Matrix<T> to(count, from.cols());
  for (std::int64_t i = 0; i < count; ++i) {
    for (std::int64_t j = 0; j < from.cols(); ++j) to.at(i, j) = from.at(begin + i, j);
  }
  return to;
}

/// Normal numbers that bf16 holds exactly, so that every compute type gets the same input.
inline Doubles normals(std::int64_t rows, std::int64_t cols, std::uint64_t seed, double scale = 1) {
  Doubles m(rows, cols);
  const Rng rng(seed, "test", "normals");
  for (std::int64_t i = 0; i < rows * cols; ++i) {
    m.data()[static_cast<std::size_t>(i)] = to_double(
        from_double<bf16>(scale * static_cast<double>(rng.normal(static_cast<std::uint64_t>(i)))));
  }
  return m;
}
/// A whole number in [0, bound), addressed.
inline std::int64_t draw(std::uint64_t seed, std::uint64_t index, std::int64_t bound) {
  const Rng rng(seed, "test", "draw");
  return static_cast<std::int64_t>(rng.words(0, index)[0] % static_cast<std::uint64_t>(bound));
}

inline double inner(const Doubles& a, const Doubles& b) {
  double sum = 0;
  for (std::int64_t i = 0; i < a.rows(); ++i) {
    for (std::int64_t j = 0; j < a.cols(); ++j) sum += a.at(i, j) * b.at(i, j);
  }
  return sum;
}

/// Unit round-off of a compute type.
template <class T>
constexpr double unit_roundoff() {
  return std::is_same_v<T, double> ? 0x1p-53 : std::is_same_v<T, bf16> ? 0x1p-8 : 0x1p-24;
}

/// Largest |element|, the padding's marks left out.
inline double largest_magnitude(const Doubles& m) {
  double largest = 0;
  for (std::int64_t i = 0; i < m.rows(); ++i) {
    for (std::int64_t j = 0; j < m.cols(); ++j) largest = std::max(largest, std::abs(m.at(i, j)));
  }
  return largest;
}

/// |actual - expected| <= tolerance * (largest |expected| of the matrix, at least 1e-3).
template <class T>
void expect_near(const Matrix<T>& actual, const Doubles& expected, double tolerance,
                 const std::string& what) {
  ASSERT_EQ(actual.rows(), expected.rows()) << what;
  ASSERT_EQ(actual.cols(), expected.cols()) << what;
  const double scale = std::max(1e-3, largest_magnitude(expected));
  double worst = 0;
  for (std::int64_t i = 0; i < actual.rows(); ++i) {
    for (std::int64_t j = 0; j < actual.cols(); ++j) {
      const double error = std::abs(to_double(actual.at(i, j)) - expected.at(i, j));
      worst = std::isnan(error) ? error : std::max(worst, error);
      if (std::isnan(worst)) break;
    }
  }
  EXPECT_LE(worst, tolerance * scale) << what;
  EXPECT_TRUE(actual.padding_untouched()) << what;
}

/// Compares `gradient` with 4-point differences of loss() in every element of x. With h =
/// eps^(1/5) = 7e-4 the stencil's truncation, h^4 f''''' / 30, is about 1e-14 f''''' and its
/// rounding, 1.5 eps |f| / h, about 5e-13 |f|: 1e-9 of (gradient and loss) leaves room for steep
/// functions and none for a wrong term.
template <class Loss>
void expect_gradient(Doubles& x, const Doubles& gradient, Loss&& loss, const std::string& what) {
  ASSERT_EQ(x.rows(), gradient.rows()) << what;
  ASSERT_EQ(x.cols(), gradient.cols()) << what;
  const double h = std::pow(std::numeric_limits<double>::epsilon(), 0.2);
  const double scale = std::max(std::abs(loss()) + 1e-3, largest_magnitude(gradient));
  for (std::int64_t i = 0; i < x.rows(); ++i) {
    for (std::int64_t j = 0; j < x.cols(); ++j) {
      const double before = x.at(i, j);
      const auto at = [&](double step) {
        x.at(i, j) = before + step * h;
        return loss();
      };
      const double difference = (at(-2) - 8 * at(-1) + 8 * at(1) - at(2)) / (12 * h);
      x.at(i, j) = before;
      ASSERT_NEAR(gradient.at(i, j), difference, 1e-9 * scale)
          << what << " at (" << i << ", " << j << ")";
    }
  }
}

}  // namespace arcus::test
