#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <numbers>

/// Transcendental functions of the CPU kernels. The float versions are polynomials without branches
/// or library calls: a loop over them vectorises, and main loop, tail, every vector width and every
/// libc give the same bits. The double versions serve gradient checks and call the C library.
namespace arcus::cpu {

/// e^x within about 1 ulp over the whole range; overflow gives infinity, underflow passes through
/// the subnormals to zero, NaN stays NaN.
inline float exp(float x) {
  // Beyond these bounds the result is infinity or zero anyway; a NaN fails both comparisons.
  x = x > 89.0F ? 89.0F : x;
  x = x < -104.0F ? -104.0F : x;
  // Adding 1.5 * 2^23 rounds x / ln 2 to the nearest integer n and leaves it in the low bits.
  constexpr float kRound = 12582912.0F;
  const float shifted = x * 1.44269504F + kRound;
  const float n = shifted - kRound;
  const auto n_bits = std::bit_cast<std::int32_t>(shifted) - std::bit_cast<std::int32_t>(kRound);
  // r = x - n ln 2, |r| <= ln 2 / 2, with ln 2 in two parts.
  float r = std::fma(n, -0.693145752F, x);
  r = std::fma(n, -1.42860677e-6F, r);
  float p = 1.39354519e-3F;
  p = std::fma(p, r, 8.36596917e-3F);
  p = std::fma(p, r, 4.16665211e-2F);
  p = std::fma(p, r, 0.166664705F);
  p = std::fma(p, r, 0.5F);
  p = std::fma(p, r, 1.0F);
  p = std::fma(p, r, 1.0F);
  // 2^n in two factors, so that neither leaves the normal range.
  const std::int32_t low = n_bits >> 1;
  const std::int32_t high = n_bits - low;
  return p * std::bit_cast<float>((low + 127) << 23) * std::bit_cast<float>((high + 127) << 23);
}
inline double exp(double x) { return std::exp(x); }

/// ln x of a positive, normal, finite x within 1 ulp.
inline float log(float x) {
  // x = 2^k m with m from sqrt(1/2) to sqrt(2).
  constexpr std::int32_t kSqrtHalf = 0x3f3504f3;
  const auto bits = std::bit_cast<std::int32_t>(x);
  const std::int32_t k = (bits - kSqrtHalf) >> 23;
  const float f = std::bit_cast<float>(bits - (k << 23)) - 1.0F;
  // ln m = f - f^2 / 2 + f^3 p(f), p fitted to the smallest largest error of the whole.
  float p = 0.0691760033F;
  p = std::fma(p, f, -0.117796846F);
  p = std::fma(p, f, 0.118662275F);
  p = std::fma(p, f, -0.123858064F);
  p = std::fma(p, f, 0.142198905F);
  p = std::fma(p, f, -0.166691959F);
  p = std::fma(p, f, 0.200021535F);
  p = std::fma(p, f, -0.249999866F);
  p = std::fma(p, f, 0.333333105F);
  const float square = f * f;
  // k ln 2 in two parts, the larger one exact.
  const auto k_float = static_cast<float>(k);
  float rest = p * f * square;
  rest = std::fma(k_float, -2.12194440e-4F, rest);
  rest = std::fma(-0.5F, square, rest);
  return std::fma(k_float, 0.693359375F, f + rest);
}
inline double log(double x) { return std::log(x); }

/// 1 / (1 + e^-x) without overflow on either side.
template <class A>
inline A sigmoid(A x) {
  const A e = exp(-std::abs(x));
  const A s = A(1) / (A(1) + e);
  return x >= A(0) ? s : e * s;
}

/// ln(1 + e^x) without overflow on either side.
template <class A>
inline A softplus(A x) {
  return (x > A(0) ? x : A(0)) + std::log1p(exp(-std::abs(x)));
}

/// P(X <= x) of a standard normal X, and its density there.
template <class A>
struct NormalAt {
  A probability, density;
};
/// Both within 8 ulp, the tail too.
inline NormalAt<float> normal_at(float x) {
  // Beyond, both the tail and the density are zero; a NaN comes back through `x` of the callers.
  const float t = std::abs(x) < 15.0F ? std::abs(x) : 15.0F;
  // e^(-t^2 / 2), with what rounding t^2 lost.
  const float square = t * t;
  float e = exp(-0.5F * square);
  e = std::fma(-0.5F * e, std::fma(t, t, -square), e);
  // The tail over e^(-t^2 / 2), in k = 1 / (1 + t / 4): the smallest largest relative error on
  // [0, 14.5], 1.6e-8.
  const float k = 1.0F / std::fma(0.25F, t, 1.0F);
  float p = 3.3425599e-2F;
  p = std::fma(p, k, -0.19337845F);
  p = std::fma(p, k, 0.38848978F);
  p = std::fma(p, k, -0.32487065F);
  p = std::fma(p, k, 0.29739648F);
  p = std::fma(p, k, -1.6603658e-2F);
  p = std::fma(p, k, 0.12026648F);
  p = std::fma(p, k, 9.5098913e-2F);
  p = std::fma(p, k, 0.10019535F);
  p = std::fma(p, k, -1.9854753e-5F);
  const float tail = e * p;
  return {x >= 0.0F ? 1.0F - tail : tail, e * 0.39894228F};
}
inline NormalAt<double> normal_at(double x) {
  return {0.5 * std::erfc(-x * std::numbers::sqrt2 / 2),
          std::exp(-0.5 * x * x) * std::numbers::inv_sqrtpi / std::numbers::sqrt2};
}

/// gelu(x) = x P(X <= x) and its derivative [1606.08415].
struct Gelu {
  template <class A>
  static A value(A x) {
    return x * normal_at(x).probability;
  }
  template <class A>
  static A derivative(A x) {
    const NormalAt<A> at = normal_at(x);
    return at.probability + x * at.density;
  }
};

/// The form of GPT-2, x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 = x sigmoid(2 sqrt(2 / pi)
/// (x + 0.044715 x^3)).
struct GeluTanh {
  template <class A>
  static A value(A x) {
    return x * gate(bounded(x));
  }
  template <class A>
  static A derivative(A x) {
    const A b = bounded(x);
    const A s = gate(b);
    return s + x * s * (A(1) - s) * (A(kTwice) * (A(1) + A(3 * kCubic) * b * b));
  }

 private:
  static constexpr double kTwice = 1.5957691216057308;  // 2 sqrt(2 / pi)
  static constexpr double kCubic = 0.044715;
  /// Beyond, the sigmoid is 0 or 1 and its slope 0, which an infinite cube would hide.
  template <class A>
  static A bounded(A x) {
    const A b = x < A(16) ? x : A(16);
    return b > A(-16) ? b : A(-16);
  }
  template <class A>
  static A gate(A b) {
    return sigmoid(A(kTwice) * b * (A(1) + A(kCubic) * b * b));
  }
};

}  // namespace arcus::cpu
