#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "kernels/cpu/math.hpp"

namespace arcus {
namespace {

double ulps(float value, double exact) {
  const float at = std::abs(static_cast<float>(exact));
  const double ulp = std::nextafter(at, std::numeric_limits<float>::infinity()) - at;
  return std::abs(static_cast<double>(value) - exact) / ulp;
}

std::vector<float> positive_values() {
  std::vector<float> values{std::numeric_limits<float>::min(),
                            std::numeric_limits<float>::max(),
                            1.0F,
                            std::nextafter(1.0F, 0.0F),
                            std::nextafter(1.0F, 2.0F),
                            0x1p-126F,
                            0x1.6a09e6p-1F,
                            0x1.6a09e8p-1F,
                            0x1.6a09e6p+0F,
                            2.0F};
  std::mt19937 generator(1);
  std::uniform_real_distribution<float> exponent(-87, 88), near_one(0.5F, 2.0F);
  for (int i = 0; i < 200000; ++i) {
    values.push_back(std::exp(exponent(generator)));
    values.push_back(near_one(generator));
  }
  return values;
}

TEST(Math, LogIsWithinOneUlp) {
  for (const float x : positive_values()) {
    ASSERT_LE(ulps(cpu::log(x), std::log(static_cast<double>(x))), 1.0) << x;
  }
  EXPECT_EQ(cpu::log(1.0F), 0.0F);
}

TEST(Math, ExpIsWithinTwoUlps) {
  for (const float x : positive_values()) {
    const float argument = cpu::log(x);
    if (x < 0x1p-125F || x > 0x1p127F) continue;  // subnormal results, infinite ones
    ASSERT_LE(ulps(cpu::exp(argument), std::exp(static_cast<double>(argument))), 2.0) << argument;
  }
}

TEST(Math, ALoopHasTheBitsOfSingleValues) {
  const std::vector<float> x = positive_values();
  for (const std::size_t count : {std::size_t{1}, std::size_t{7}, std::size_t{16}, x.size()}) {
    std::vector<float> y(count);
    for (std::size_t i = 0; i < count; ++i) y[i] = cpu::log(x[i]);
    for (std::size_t i = 0; i < count; ++i) {
      volatile float alone = x[i];
      ASSERT_EQ(y[i], cpu::log(alone)) << x[i];
    }
  }
}

/// Arguments of activations: everywhere, dense near zero, and the ends.
std::vector<float> activation_arguments() {
  std::vector<float> values{0.0F,   -0.0F, 1e-30F, -1e-30F, 12.0F,
                            -12.0F, 15.0F, -15.0F, 1e20F,   -1e20F};
  std::mt19937 generator(2);
  std::uniform_real_distribution<float> wide(-13, 13), near(-1e-2F, 1e-2F);
  for (int i = 0; i < 100000; ++i) {
    values.push_back(wide(generator));
    values.push_back(near(generator));
  }
  return values;
}

// The tail, too, is right to some ulps, not just what is left of 1 - P.
TEST(Math, NormalProbabilitiesAreWithinEightUlps) {
  for (const float x : activation_arguments()) {
    const double exact = 0.5 * std::erfc(-static_cast<double>(x) / std::sqrt(2.0));
    if (exact < 0x1p-120) continue;
    ASSERT_LE(ulps(cpu::normal_at(x).probability, exact), 8.0) << x;
    const double density =
        std::exp(-0.5 * static_cast<double>(x) * x) / std::sqrt(2 * std::acos(-1.0));
    if (density < 0x1p-120) continue;
    ASSERT_LE(ulps(cpu::normal_at(x).density, density), 4.0) << x;
  }
  EXPECT_TRUE(std::isnan(cpu::Gelu::value(std::numeric_limits<float>::quiet_NaN())));
  EXPECT_TRUE(std::isnan(cpu::GeluTanh::value(std::numeric_limits<float>::quiet_NaN())));
}

double tanh_form(double x) {
  const double inner = std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x);
  return 0.5 * x * (1 + std::tanh(inner));
}
double exact_form(double x) { return 0.5 * x * std::erfc(-x / std::sqrt(2.0)); }

/// Float against the formula in double, and derivatives in double against 4-point differences.
template <class F>
void expect_activation(double (*formula)(double)) {
  const double h = 7e-4;  // eps^(1/5)
  for (const float x : activation_arguments()) {
    const double at = x;
    EXPECT_NEAR(F::value(x), formula(at), 6e-7 * std::max(1.0, std::abs(at))) << x;
    EXPECT_NEAR(F::derivative(x), F::derivative(at), 2e-6) << x;
    if (std::abs(x) > 12) continue;
    EXPECT_NEAR(F::value(at), formula(at), 1e-14 * std::max(1.0, std::abs(at))) << x;
    const double difference = (F::value(at - 2 * h) - 8 * F::value(at - h) + 8 * F::value(at + h) -
                               F::value(at + 2 * h)) /
                              (12 * h);
    ASSERT_NEAR(F::derivative(at), difference, 1e-11) << x;
  }
}
TEST(Math, GeluFollowsItsFormulas) {
  expect_activation<cpu::GeluTanh>(tanh_form);
  expect_activation<cpu::Gelu>(exact_form);
}

TEST(Math, ALoopOfActivationsHasTheBitsOfSingleValues) {
  const std::vector<float> x = activation_arguments();
  for (const std::size_t count : {std::size_t{1}, std::size_t{7}, std::size_t{16}, x.size()}) {
    std::vector<float> tanh(count), exact(count), slope(count);
    for (std::size_t i = 0; i < count; ++i) tanh[i] = cpu::GeluTanh::value(x[i]);
    for (std::size_t i = 0; i < count; ++i) exact[i] = cpu::Gelu::value(x[i]);
    for (std::size_t i = 0; i < count; ++i) slope[i] = cpu::Gelu::derivative(x[i]);
    for (std::size_t i = 0; i < count; ++i) {
      volatile float alone = x[i];
      ASSERT_EQ(tanh[i], cpu::GeluTanh::value(static_cast<float>(alone))) << x[i];
      ASSERT_EQ(exact[i], cpu::Gelu::value(static_cast<float>(alone))) << x[i];
      ASSERT_EQ(slope[i], cpu::Gelu::derivative(static_cast<float>(alone))) << x[i];
    }
  }
}

}  // namespace
}  // namespace arcus
