#pragma once

#include <cstdint>
#include <span>
#include <type_traits>

#include "src/base/dtype.hpp"

namespace arcus {

/// Non-owning view of a row-major matrix; a vector of n elements is [1, n]. Rows may be padded:
/// element (i, j) stands at i * stride + j. `Void` is void or const void.
template <class Void>
struct BasicTensorView {
  Void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t stride = 0;  ///< elements from one row to the next, >= cols

  BasicTensorView() = default;
  BasicTensorView(Void* first, DType type, std::int64_t num_rows, std::int64_t num_cols,
                  std::int64_t row_stride)
      : data(first), dtype(type), rows(num_rows), cols(num_cols), stride(row_stride) {}
  BasicTensorView(Void* first, DType type, std::int64_t num_rows, std::int64_t num_cols)
      : BasicTensorView(first, type, num_rows, num_cols, num_cols) {}
  /// A mutable view serves where a const one is asked for.
  template <class Other>
  requires(std::is_const_v<Void> && !std::is_const_v<Other>)
      BasicTensorView(const BasicTensorView<Other>& other)  // NOLINT(google-explicit-constructor)
      : BasicTensorView(other.data, other.dtype, other.rows, other.cols, other.stride) {}

  template <class T>
  using Element = std::conditional_t<std::is_const_v<Void>, const T, T>;
  using Byte = Element<char>;

  bool empty() const { return rows == 0 || cols == 0; }
  bool contiguous() const { return stride == cols || rows <= 1; }
  std::int64_t size() const { return rows * cols; }

  /// The first element; the type must be the view's.
  template <class T>
  Element<T>* as() const {
    ARCUS_CHECK(dtype_of<T>() == dtype, "tensor holds {}, asked for {}", name_of(dtype),
                name_of(dtype_of<T>()));
    return static_cast<Element<T>*>(data);
  }
  template <class T>
  Element<T>* row(std::int64_t i) const {
    return as<T>() + i * stride;
  }
  /// All elements of a contiguous view.
  template <class T>
  std::span<Element<T>> span() const {
    ARCUS_CHECK(contiguous(), "view of {} x {} has padded rows (stride {})", rows, cols, stride);
    return {as<T>(), static_cast<std::size_t>(size())};
  }
  BasicTensorView row_range(std::int64_t begin, std::int64_t count) const {
    return {offset(begin * stride), dtype, count, cols, stride};
  }
  BasicTensorView col_range(std::int64_t begin, std::int64_t count) const {
    return {offset(begin), dtype, rows, count, stride};
  }

 private:
  Void* offset(std::int64_t elements) const {
    return data == nullptr
               ? nullptr
               : static_cast<Byte*>(data) + elements * static_cast<std::int64_t>(size_of(dtype));
  }
};

using TensorView = BasicTensorView<void>;
using ConstTensorView = BasicTensorView<const void>;

}  // namespace arcus
