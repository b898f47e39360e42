#pragma once

#include <cstdint>
#include <limits>

namespace arcus::cpu {

/// Not-a-number sorts below everything, so that choices stay valid until the step is called off.
template <class A>
inline A ordered(A value) {
  return value == value ? value : -std::numeric_limits<A>::infinity();
}

/// Calls take(rank, i) for the `count` largest value(i) among 0 <= i < n with allowed(i), in
/// descending order, ties to the lower i (-0 = +0). Each round looks for what comes behind the last
/// one taken, so nothing is marked or moved.
template <class Value, class Allowed, class Take>
inline void select_largest(std::int64_t n, std::int64_t count, Value&& value, Allowed&& allowed,
                           Take&& take) {
  using A = decltype(ordered(value(std::int64_t{0})));
  A last = std::numeric_limits<A>::infinity();
  std::int64_t last_i = -1;
  for (std::int64_t rank = 0; rank < count; ++rank) {
    A best = -std::numeric_limits<A>::infinity();
    std::int64_t best_i = -1;
    for (std::int64_t i = 0; i < n; ++i) {
      if (!allowed(i)) continue;
      const A v = ordered(value(i));
      const bool behind_last = v < last || (v == last && i > last_i);
      if (behind_last && (best_i < 0 || v > best)) {
        best = v;
        best_i = i;
      }
    }
    take(rank, best_i);
    last = best;
    last_i = best_i;
  }
}

}  // namespace arcus::cpu
