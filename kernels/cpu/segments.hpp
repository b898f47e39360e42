#pragma once

#include <cstring>

#include "kernels/ffn.hpp"

namespace arcus::cpu {

/// Zeros rows [rows, padded_rows(rows)) of a segment's part of a local buffer.
inline void zero_padding(TensorView buffer, const Segment& segment) {
  const std::size_t bytes = static_cast<std::size_t>(buffer.cols) * size_of(buffer.dtype);
  for (std::int64_t row = segment.rows; row < padded_rows(segment.rows); ++row) {
    std::memset(buffer.row_range(segment.padded_begin + row, 1).data, 0, bytes);
  }
}

}  // namespace arcus::cpu
