#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "comm/communicator.hpp"

namespace arcus {

/// sum[i] = sum[i] op x[i]. Integer sums wrap (mod 2^64), as order-independent sums need.
template <class T>
void reduce_elements(ReduceOp op, T* sum, const T* x, std::int64_t n) {
  if (op == ReduceOp::max) {
    for (std::int64_t i = 0; i < n; ++i) sum[i] = std::max(sum[i], x[i]);
  } else if (op == ReduceOp::min) {
    for (std::int64_t i = 0; i < n; ++i) sum[i] = std::min(sum[i], x[i]);
  } else if constexpr (std::is_integral_v<T>) {
    using Unsigned = std::make_unsigned_t<T>;
    for (std::int64_t i = 0; i < n; ++i) {
      sum[i] = static_cast<T>(static_cast<Unsigned>(sum[i]) + static_cast<Unsigned>(x[i]));
    }
  } else {
    for (std::int64_t i = 0; i < n; ++i) sum[i] += x[i];
  }
}

/// The same for n elements of `dtype`; bf16 is refused at the front door.
inline void reduce_elements(DType dtype, ReduceOp op, void* sum, const void* x, std::int64_t n) {
  const auto run = [&]<class T>() {
    reduce_elements(op, static_cast<T*>(sum), static_cast<const T*>(x), n);
  };
  switch (dtype) {
    case DType::f32:
      return run.template operator()<float>();
    case DType::f64:
      return run.template operator()<double>();
    case DType::i32:
      return run.template operator()<std::int32_t>();
    case DType::i64:
      return run.template operator()<std::int64_t>();
    case DType::u8:
      return run.template operator()<std::uint8_t>();
    case DType::u16:
      return run.template operator()<std::uint16_t>();
    case DType::u32:
      return run.template operator()<std::uint32_t>();
    case DType::u64:
      return run.template operator()<std::uint64_t>();
    case DType::bf16:
      break;
  }
  ARCUS_FAIL(ExitCode::internal, "no reduction of {}", name_of(dtype));
}

}  // namespace arcus
