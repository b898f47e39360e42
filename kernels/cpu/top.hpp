#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>

namespace arcus::cpu {

/// Not-a-number sorts below everything, so that choices stay valid until the step is called off.
template <class A>
inline A ordered(A value) {
  return value == value ? value : -std::numeric_limits<A>::infinity();
}

/// Values looked at together by select_largest.
inline constexpr std::int64_t kSelectBlock = 32;

/// The largest values of a scan in ascending index order, descending, equal ones in index order.
template <class A>
class Largest {
 public:
  static constexpr int kMost = 32;
  explicit Largest(int count) : count_(count) {}

  void offer(A value, std::int64_t i) {
    if (size_ == count_ && !(value > value_[size_ - 1])) return;
    int at = size_ < count_ ? size_++ : size_ - 1;
    for (; at > 0 && value > value_[at - 1]; --at) {
      value_[at] = value_[at - 1];
      index_[at] = index_[at - 1];
    }
    value_[at] = value;
    index_[at] = i;
  }
  /// What is not above the last value of a full list is not taken.
  bool full() const { return size_ == count_; }
  int size() const { return size_; }
  A value(int rank) const { return value_[rank]; }
  std::int64_t index(int rank) const { return index_[rank]; }

 private:
  int count_;
  int size_ = 0;
  std::array<A, kMost> value_;
  std::array<std::int64_t, kMost> index_;
};

/// Whether value(i) > bound for some begin <= i < end; a NaN is not.
template <class A, class Value>
inline bool any_above(std::int64_t begin, std::int64_t end, A bound, Value&& value) {
  int above = 0;
#pragma omp simd reduction(| : above)
  for (std::int64_t i = begin; i < end; ++i) above |= value(i) > bound ? 1 : 0;
  return above != 0;
}

/// Calls take(rank, i) for the `count` largest value(i) among 0 <= i < n with allowed(i), in
/// descending order, ties to the lower i (-0 = +0). At least `count` must be allowed. One pass
/// finds up to 32; the next looks at what comes behind them.
template <class Value, class Allowed, class Take>
inline void select_largest(std::int64_t n, std::int64_t count, Value&& value, Allowed&& allowed,
                           Take&& take) {
  using A = decltype(ordered(value(std::int64_t{0})));
  A last = std::numeric_limits<A>::infinity();
  std::int64_t last_i = -1;
  for (std::int64_t rank = 0; rank < count;) {
    Largest<A> largest(static_cast<int>(std::min<std::int64_t>(count - rank, Largest<A>::kMost)));
    for (std::int64_t begin = 0; begin < n; begin += kSelectBlock) {
      const std::int64_t end = std::min(n, begin + kSelectBlock);
      // Most blocks of a long row hold nothing for the list.
      if (largest.full() && !any_above(begin, end, largest.value(largest.size() - 1), value)) {
        continue;
      }
      for (std::int64_t i = begin; i < end; ++i) {
        const A v = ordered(value(i));
        const bool behind_last = v < last || (v == last && i > last_i);
        if (behind_last && allowed(i)) largest.offer(v, i);
      }
    }
    for (int k = 0; k < largest.size(); ++k) take(rank + k, largest.index(k));
    rank += largest.size();
    last = largest.value(largest.size() - 1);
    last_i = largest.index(largest.size() - 1);
  }
}

/// A place in the order of select_largest.
template <class A>
struct Rank {
  A value;
  std::int64_t i;
  /// True for what stands there or before it.
  bool covers(A other, std::int64_t other_i) const {
    const A v = ordered(other);
    return v > value || (v == value && other_i <= i);
  }
};

/// The `count`-th of value(0..n-1), 1 <= count <= n.
template <class Value>
inline auto nth_largest(std::int64_t n, std::int64_t count, Value&& value) {
  using A = decltype(ordered(value(std::int64_t{0})));
  Rank<A> nth{};
  select_largest(
      n, count, value, [](std::int64_t) { return true; },
      [&](std::int64_t rank, std::int64_t i) {
        if (rank + 1 == count) nth = {ordered(value(i)), i};
      });
  return nth;
}

}  // namespace arcus::cpu
