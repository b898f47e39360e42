#pragma once

#include <cstdint>

namespace arcus::cpu {

inline constexpr double kTiny = 1e-20;  ///< keeps sums of scores from being 0

/// Sum of s over the chosen experts of a token, in choice-rank order; those choices count whose
/// `counted` is not -1. What renormalised weights are divided by.
template <class A>
A sum_of_chosen(const A* s, const std::int32_t* chosen, const std::int32_t* counted,
                std::int64_t topk) {
  A sum(0);
  for (std::int64_t j = 0; j < topk; ++j) {
    if (counted[j] >= 0) sum += s[chosen[j]];
  }
  return sum + static_cast<A>(kTiny);
}

}  // namespace arcus::cpu
