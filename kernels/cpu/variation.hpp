#pragma once

#include <algorithm>
#include <cstdint>

namespace arcus::cpu {

/// CV2(u), the squared coefficient of variation of u[0..n-1], 0 where the mean is 0; leaves
/// d CV2 / d u in u's place.
inline double take_variation(double* u, std::int64_t n) {
  double mean = 0;
  double squares = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    mean += u[i];
    squares += u[i] * u[i];
  }
  mean /= static_cast<double>(n);
  squares /= static_cast<double>(n);
  if (mean == 0) {
    std::fill_n(u, n, 0.0);
    return 0;
  }
  const double factor = 2 / (static_cast<double>(n) * mean * mean);
  for (std::int64_t i = 0; i < n; ++i) u[i] = factor * (u[i] - squares / mean);
  return squares / (mean * mean) - 1;
}

}  // namespace arcus::cpu
