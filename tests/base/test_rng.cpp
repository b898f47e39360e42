#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <vector>

#include "src/base/rng.hpp"

namespace arcus {
namespace {

using Words = std::array<std::uint32_t, 4>;

// Known answers of Philox4x32-10 published with Random123 [SC'11].
TEST(Philox, GivesTheKnownAnswers) {
  EXPECT_EQ(philox4x32({0, 0, 0, 0}, 0), (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox4x32({~0U, ~0U, ~0U, ~0U}, ~std::uint64_t{0}),
            (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0x299f31d0a4093822),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Rng, WordsAreAddressedByBothHalvesOfTheCounter) {
  const Rng rng(0x299f31d0a4093822);
  EXPECT_EQ(rng.words(0x0370734413198a2e, 0x85a308d3243f6a88),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Rng, KeysDependOnSeedPurposeAndName) {
  std::set<std::uint64_t> keys;
  for (const std::uint64_t seed : {1, 2}) {
    for (const char* purpose : {"init", "init2"}) {
      for (const char* name : {"", "2", "2x"}) keys.insert(Rng(seed, purpose, name).key());
    }
  }
  EXPECT_EQ(keys.size(), 12U);
  EXPECT_NE(Rng(1, "ab", "c").key(), Rng(1, "a", "bc").key());
}

TEST(Rng, UniformNumbersFillTheUnitInterval) {
  const Rng rng(3, "test", "uniform");
  constexpr int kCount = 100000;
  std::vector<int> buckets(10);
  for (std::uint64_t i = 0; i < kCount; ++i) {
    const float u = rng.uniform(1, i);
    ASSERT_TRUE(u >= 0 && u < 1);
    ++buckets[static_cast<std::size_t>(u * 10)];
  }
  // Binomial with p = 0.1: standard deviation 95; six of them.
  for (const int count : buckets) EXPECT_NEAR(count, kCount / 10, 570);
}

TEST(Rng, NormalNumbersHaveTheirMomentsAndAddresses) {
  const Rng rng(4, "test", "normal");
  constexpr std::uint64_t kCount = 200000;
  double sum = 0;
  double squares = 0;
  double fourth = 0;
  for (std::uint64_t i = 0; i < kCount; ++i) {
    const double x = rng.normal(i);
    EXPECT_EQ(static_cast<float>(x), rng.normals(i / 4)[i % 4]);
    sum += x;
    squares += x * x;
    fourth += x * x * x * x;
  }
  // Standard errors: mean 1/sqrt(n), variance sqrt(2/n), fourth moment sqrt(96/n); five of them.
  const double n = kCount;
  EXPECT_NEAR(sum / n, 0, 5 / std::sqrt(n));
  EXPECT_NEAR(squares / n, 1, 5 * std::sqrt(2 / n));
  EXPECT_NEAR(fourth / n, 3, 5 * std::sqrt(96 / n));
}

TEST(Rng, UniformsAreTheSameNumbersInARow) {
  const Rng rng(5, "test", "uniforms");
  // Across the carry into the counter's second word, and of every length up to a wide loop's.
  const std::uint64_t low = (std::uint64_t{1} << 32) - 20;
  for (std::size_t count = 0; count < 70; ++count) {
    std::vector<float> row(count, -1.0F);
    rng.uniforms(std::uint64_t{7} << 33, low, row);
    for (std::size_t i = 0; i < count; ++i) {
      ASSERT_EQ(row[i], rng.uniform(std::uint64_t{7} << 33, low + i)) << count << ' ' << i;
    }
  }
}

TEST(Rng, NormalsHaveACallSpacePerStep) {
  const Rng rng(6, "test", "normals");
  std::set<float> distinct;
  for (const std::uint64_t step : {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{1} << 40}) {
    for (std::uint64_t i = 0; i < 50; ++i) {
      distinct.insert(rng.normal(step, i));
      const auto w = rng.words(step, i / 4);
      const std::size_t pair = i % 4 / 2 * 2;
      // Box-Muller as published: radius from the first word, angle from the second.
      const double radius = std::sqrt(-2 * std::log((w[pair] + 1.0) / 4294967296.0));
      const double angle = 2 * std::acos(-1.0) * w[pair + 1] / 4294967296.0;
      const double x = i % 2 == 0 ? radius * std::cos(angle) : radius * std::sin(angle);
      EXPECT_NEAR(rng.normal(step, i), x, 1e-6);
    }
  }
  EXPECT_EQ(distinct.size(), 150U);
  EXPECT_EQ(rng.normal(3), rng.normal(0, 3));
}

TEST(KeyedPermutation, IsABijection) {
  for (const std::uint64_t size : {1, 2, 3, 4, 5, 7, 16, 17, 255, 256, 257, 1000, 65536, 65537}) {
    for (const std::uint64_t key : {0, 1, 99}) {
      const KeyedPermutation permutation(size, key);
      std::vector<bool> seen(size);
      for (std::uint64_t i = 0; i < size; ++i) {
        const std::uint64_t image = permutation(i);
        ASSERT_LT(image, size);
        ASSERT_FALSE(seen[image]) << size << ' ' << key;
        seen[image] = true;
      }
    }
  }
}

TEST(KeyedPermutation, KeysGiveOrdersWithoutPattern) {
  const KeyedPermutation one(1000, 1);
  const KeyedPermutation two(1000, 2);
  int fixed = 0;
  int equal = 0;
  int neighbours = 0;
  for (std::uint64_t i = 0; i + 1 < 1000; ++i) {
    fixed += one(i) == i ? 1 : 0;
    equal += one(i) == two(i) ? 1 : 0;
    neighbours += one(i) + 1 == one(i + 1) ? 1 : 0;
  }
  // Each count is near Poisson with mean 1.
  EXPECT_LT(fixed, 10);
  EXPECT_LT(equal, 10);
  EXPECT_LT(neighbours, 10);
}

TEST(KeyedPermutation, LargeSizesStayInRange) {
  const std::uint64_t size = (std::uint64_t{1} << 40) + 12345;
  const KeyedPermutation permutation(size, 5);
  std::set<std::uint64_t> images;
  for (std::uint64_t i = 0; i < 2000; ++i) {
    const std::uint64_t image = permutation(i * (size / 2000));
    EXPECT_LT(image, size);
    images.insert(image);
  }
  EXPECT_EQ(images.size(), 2000U);
}

}  // namespace
}  // namespace arcus
