#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>

#include "src/base/error.hpp"

namespace arcus {

/// Upper half of an IEEE binary32; arithmetic goes through float.
struct bf16 {
  std::uint16_t bits = 0;

  bf16() = default;
  /// Round to nearest, ties to even; NaN stays NaN.
  explicit bf16(float value) {
    const auto u = std::bit_cast<std::uint32_t>(value);
    bits = (u & 0x7fffffffU) > 0x7f800000U
               ? static_cast<std::uint16_t>((u >> 16) | 0x40U)
               : static_cast<std::uint16_t>((u + 0x7fffU + ((u >> 16) & 1U)) >> 16);
  }
  explicit operator float() const {
    return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
  }
  explicit operator double() const { return static_cast<double>(static_cast<float>(*this)); }
  friend bool operator==(bf16 a, bf16 b) { return static_cast<float>(a) == static_cast<float>(b); }
};

/// Element types of tensors in memory and on disk.
enum class DType : std::uint8_t { f32, f64, bf16, i32, i64, u8, u16, u32, u64 };

std::size_t size_of(DType dtype);
std::string_view name_of(DType dtype);
/// The type whose name_of is `name`; throws (usage) for an unknown one.
DType dtype_from_name(std::string_view name);

template <class T>
constexpr DType dtype_of();
template <>
constexpr DType dtype_of<float>() {
  return DType::f32;
}
template <>
constexpr DType dtype_of<double>() {
  return DType::f64;
}
template <>
constexpr DType dtype_of<bf16>() {
  return DType::bf16;
}
template <>
constexpr DType dtype_of<std::int32_t>() {
  return DType::i32;
}
template <>
constexpr DType dtype_of<std::int64_t>() {
  return DType::i64;
}
template <>
constexpr DType dtype_of<std::uint8_t>() {
  return DType::u8;
}
template <>
constexpr DType dtype_of<std::uint16_t>() {
  return DType::u16;
}
template <>
constexpr DType dtype_of<std::uint32_t>() {
  return DType::u32;
}
template <>
constexpr DType dtype_of<std::uint64_t>() {
  return DType::u64;
}

/// The type in which sums, norms, gate values and statistics of a compute type are kept:
/// double for double (gradient checks), float for float and bf16.
constexpr DType accumulate_dtype(DType compute) {
  return compute == DType::f64 ? DType::f64 : DType::f32;
}

template <class T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
/// accumulate_dtype for C++ types.
template <class T>
using Acc = typename AccumulateType<T>::type;

/// Calls `fn.template operator()<T>()` for the compute type `dtype` (f32, f64 or bf16).
template <class Fn>
decltype(auto) dispatch_compute(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::f32:
      return fn.template operator()<float>();
    case DType::f64:
      return fn.template operator()<double>();
    case DType::bf16:
      return fn.template operator()<bf16>();
    default:
      ARCUS_FAIL(ExitCode::internal, "{} is no compute type", name_of(dtype));
  }
}

/// The same for accumulate types (f32, f64).
template <class Fn>
decltype(auto) dispatch_accumulate(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::f32:
      return fn.template operator()<float>();
    case DType::f64:
      return fn.template operator()<double>();
    default:
      ARCUS_FAIL(ExitCode::internal, "{} is no accumulate type", name_of(dtype));
  }
}

}  // namespace arcus
