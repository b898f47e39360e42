#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "kernels/cpu/parallel.hpp"
#include "src/base/tensor.hpp"

namespace arcus::cpu {

/// Unsigned integers in the order of the numbers they stand for: -0 = +0, not-a-number as
/// -infinity.
template <class A>
struct OrderedKey {
  using Bits = std::conditional_t<sizeof(A) == 4, std::uint32_t, std::uint64_t>;
  static constexpr int kBits = 8 * sizeof(A);
  static constexpr Bits kSign = Bits{1} << (kBits - 1);

  static Bits of(A value) {
    const A number = value == value ? value + A(0) : -std::numeric_limits<A>::infinity();
    const auto bits = std::bit_cast<Bits>(number);
    return (bits & kSign) != 0 ? static_cast<Bits>(~bits) : static_cast<Bits>(bits | kSign);
  }
  static A value(Bits key) {
    return std::bit_cast<A>((key & kSign) != 0 ? static_cast<Bits>(key ^ kSign)
                                               : static_cast<Bits>(~key));
  }
};

/// The `rank`-th largest of a column (1 = the largest) and how many are larger than it.
template <class A>
struct RankedKey {
  typename OrderedKey<A>::Bits key = 0;
  std::int64_t num_larger = 0;
};

/// Columns searched together: a cache line of float.
inline constexpr std::int64_t kRankedColumns = 16;

/// result[c] for columns begin..begin + count of x, count <= kRankedColumns, 1 <= rank <= x.rows.
/// Byte by byte from the top: a histogram of the values that agree with what is known tells the
/// next byte. It reads x as often as a value has bytes, and needs neither a copy nor an order of
/// rows.
template <class A>
void rank_columns(std::array<RankedKey<A>, kRankedColumns>& result, const ConstTensorView& x,
                  std::int64_t begin, std::int64_t count, std::int64_t rank) {
  using Key = OrderedKey<A>;
  using Bits = typename Key::Bits;
  result.fill({});
  Bits known = 0;  // bits of the key that are settled
  for (int shift = Key::kBits - 8; shift >= 0; shift -= 8) {
    std::array<std::array<std::uint32_t, 256>, kRankedColumns> histogram{};
    for (std::int64_t t = 0; t < x.rows; ++t) {
      const A* row = x.row<A>(t) + begin;
      for (std::int64_t c = 0; c < count; ++c) {
        const Bits key = Key::of(row[c]);
        if ((key & known) == result[c].key) ++histogram[c][(key >> shift) & 0xffU];
      }
    }
    for (std::int64_t c = 0; c < count; ++c) {
      std::size_t byte = 255;
      while (result[c].num_larger + histogram[c][byte] < rank) {
        result[c].num_larger += histogram[c][byte--];
      }
      result[c].key |= static_cast<Bits>(byte) << shift;
    }
    known |= static_cast<Bits>(0xffU) << shift;
  }
}

/// Calls fn(begin, count) for blocks of up to kRankedColumns of `cols` columns, blocks in parallel.
template <class Fn>
void parallel_column_blocks(Stream& stream, std::int64_t cols, Fn&& fn) {
  parallel_tasks(stream, (cols + kRankedColumns - 1) / kRankedColumns,
                 [&](std::int64_t block, int) {
                   const std::int64_t begin = block * kRankedColumns;
                   fn(begin, std::min(kRankedColumns, cols - begin));
                 });
}

}  // namespace arcus::cpu
