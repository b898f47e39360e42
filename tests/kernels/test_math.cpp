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

}  // namespace
}  // namespace arcus
