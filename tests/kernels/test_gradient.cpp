#include "kernels/gradient.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/leaf.hpp"
#include "tests/kernels/gemm_support.hpp"

namespace arcus {
namespace {

using testing::Matrix;
using testing::same_bits;

__extension__ using Wide = __int128;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

/// x * 2^50 rounded to nearest even, by integer arithmetic on the bits of x.
std::int64_t quantize_exactly(float x) {
  if (x == 0) return 0;
  int exponent;
  const auto mantissa = static_cast<std::int64_t>(std::ldexp(std::frexp(x, &exponent), 24));
  const int shift = exponent - 24 + kLeafScaleBits;  // x * 2^50 = mantissa * 2^shift
  if (shift >= 0) return mantissa * (std::int64_t{1} << shift);
  if (shift < -40) return 0;
  const std::int64_t unit = std::int64_t{1} << -shift;
  const std::int64_t magnitude = std::abs(mantissa);
  std::int64_t quotient = magnitude / unit;
  const std::int64_t rest = 2 * (magnitude % unit);
  if (rest > unit || (rest == unit && quotient % 2 == 1)) ++quotient;
  return mantissa < 0 ? -quotient : quotient;
}

std::vector<float> special_values() {
  const float denormal = std::numeric_limits<float>::denorm_min();
  std::vector<float> values = {
      0.0F,     -0.0F,     denormal, -denormal, 0x1p-126F,       0x1p-127F,       0x1p-50F,
      0x1p-51F, -0x1p-51F, 0x3p-51F, 0x5p-51F,  -0x3p-51F,       0x1.000002p-51F, 0x7p-52F,
      1.0F,     -1.0F,     4095.5F,  -4095.5F,  0x1.fffffep-27F, 0x1.fffffep-26F, 0x1.fffffep11F};
  std::mt19937 generator(3);
  std::uniform_real_distribution<float> exponent(-60, 11);
  for (int i = 0; i < 4000; ++i) {
    const float sign = i % 2 == 0 ? 1.0F : -1.0F;
    values.push_back(sign * std::exp2(exponent(generator)));
  }
  return values;
}

TEST(AddLeaf, RoundsToNearestEvenOnEveryPath) {
  const std::vector<float> leaf = special_values();
  const auto n = std::ssize(leaf);
  std::vector<std::int64_t> fast(leaf.size(), 7), portable(leaf.size(), 7);
  EXPECT_TRUE(cpu::add_quantized(fast.data(), leaf.data(), n, 4096.0F));
  EXPECT_TRUE(cpu::add_quantized_portable(portable.data(), leaf.data(), n, 4096.0F));
  for (std::size_t i = 0; i < leaf.size(); ++i) {
    ASSERT_EQ(fast[i], 7 + quantize_exactly(leaf[i])) << leaf[i];
    ASSERT_EQ(portable[i], fast[i]) << leaf[i];
  }
  // Ties: an odd number of half quanta goes to the even neighbour.
  EXPECT_EQ(quantize_exactly(0x1p-51F), 0);
  EXPECT_EQ(quantize_exactly(0x3p-51F), 2);
}

TEST(AddLeaf, IsStoredOrAddedOnEveryPath) {
  const std::vector<float> leaf = special_values();
  for (const std::int64_t offset : {0, 1, 8, 13}) {
    for (const cpu::LeafWrite write : {cpu::LeafWrite::store, cpu::LeafWrite::stream}) {
      const auto n = std::ssize(leaf) - offset;
      std::vector<std::int64_t> fast(leaf.size(), 7), portable(leaf.size(), 7);
      EXPECT_TRUE(cpu::add_quantized(fast.data() + offset, leaf.data(), n, 4096.0F, write));
      EXPECT_TRUE(
          cpu::add_quantized_portable(portable.data() + offset, leaf.data(), n, 4096.0F, write));
      EXPECT_EQ(fast, portable);
      for (std::int64_t i = 0; i < n; ++i) {
        ASSERT_EQ(fast[static_cast<std::size_t>(offset + i)],
                  quantize_exactly(leaf[static_cast<std::size_t>(i)]));
      }
    }
  }
}

TEST(AddLeaf, SumsWrapModulo2To64) {
  const std::int64_t top = std::numeric_limits<std::int64_t>::max();
  std::vector<std::int64_t> sum(9, top);
  const std::vector<float> leaf(9, 0x1p-50F);
  const std::vector<float> back(9, -0x1p-50F);
  cpu::add_quantized(sum.data(), leaf.data(), 9, 1.0F);
  for (const auto value : sum) EXPECT_EQ(value, std::numeric_limits<std::int64_t>::min());
  cpu::add_quantized(sum.data(), back.data(), 9, 1.0F);
  for (const auto value : sum) EXPECT_EQ(value, top);
}

TEST(AddLeaf, LimitLeavesRoomForEveryLeaf) {
  for (const std::int64_t leaves : {1, 2, 3, 7, 64, 1000, 999983}) {
    const float limit = leaf_limit(leaves);
    const auto total = static_cast<Wide>(quantize_exactly(limit)) * leaves;
    EXPECT_LE(total, static_cast<Wide>(1) << 62);
    const float above = std::nextafter(limit, kInf);
    EXPECT_GT(static_cast<double>(above) * static_cast<double>(leaves), 0x1p12);
  }
}

TEST(AddLeaf, ABadLeafIsSeenAtEveryPlace) {
  const float limit = leaf_limit(3);
  for (const std::int64_t n : {1, 7, 8, 9, 40}) {
    for (std::int64_t at = 0; at < n; ++at) {
      for (const float bad : {kNan, -kNan, kInf, -kInf, std::nextafter(limit, kInf),
                              -std::nextafter(limit, kInf), 3e38F}) {
        std::vector<float> leaf(static_cast<std::size_t>(n), limit);
        std::vector<std::int64_t> sum(leaf.size());
        EXPECT_TRUE(cpu::add_quantized(sum.data(), leaf.data(), n, limit));
        leaf[static_cast<std::size_t>(at)] = bad;
        std::vector<std::int64_t> other(leaf.size());
        std::fill(sum.begin(), sum.end(), 0);
        EXPECT_FALSE(cpu::add_quantized(sum.data(), leaf.data(), n, limit)) << bad << " at " << at;
        EXPECT_FALSE(cpu::add_quantized_portable(other.data(), leaf.data(), n, limit));
        EXPECT_EQ(sum, other);
      }
    }
  }
}

TEST(AddLeaf, TheLowestKeyIsReported) {
  Stream stream(2);
  BadLeafFlag flag{kNoBadLeaf};
  Matrix<float> leaf(40, 20, 24);
  std::vector<std::int64_t> sum(40 * 20);
  const auto add = [&](std::int64_t tensor, std::int64_t micro_batch) {
    add_leaf(stream,
             {.target = {.sum = sum.data(), .limit = 1, .tensor_idx = tensor, .flag = &flag},
              .target_stride = 20,
              .leaf = leaf.view(),
              .micro_batch = micro_batch});
  };
  add(1, 1);
  EXPECT_EQ(flag, kNoBadLeaf);
  leaf.at(31, 19) = kNan;
  add(5, 9);
  EXPECT_EQ(flag, bad_leaf_key(5, 9));
  add(7, 2);
  EXPECT_EQ(flag, bad_leaf_key(5, 9));
  add(5, 3);
  add(5, 4);
  EXPECT_EQ(flag, bad_leaf_key(5, 3));
  leaf.at(31, 19) = 0;
  leaf.at(3, 20) = kNan;  // a padding column
  flag = kNoBadLeaf;
  add(1, 1);
  EXPECT_EQ(flag, kNoBadLeaf);
}

TEST(AddLeaf, OrderDoesNotMatter) {
  const std::int64_t n = 1003;
  std::vector<std::vector<float>> leaves;
  for (std::uint32_t seed = 0; seed < 40; ++seed) {
    leaves.push_back(
        Matrix<float>(1, n).randomize(seed, std::exp2(-static_cast<double>(seed))).values);
  }
  std::mt19937 generator(1);
  std::vector<std::vector<std::int64_t>> sums;
  for (int shuffle = 0; shuffle < 5; ++shuffle) {
    std::vector<std::int64_t> sum(static_cast<std::size_t>(n));
    for (const auto& leaf : leaves) cpu::add_quantized(sum.data(), leaf.data(), n, 64);
    sums.push_back(sum);
    std::shuffle(leaves.begin(), leaves.end(), generator);
  }
  for (const auto& sum : sums) EXPECT_EQ(sum, sums.front());
}

TEST(AddLeaf, PlainSumsAddAsTheyCome) {
  Stream stream(2);
  Matrix<float> leaf(3, 5), sum(3, 5);
  leaf.randomize(1), sum.randomize(2);
  const Matrix<float> before = sum;
  add_leaf(stream, {.target = {.sum = sum.values.data(), .dtype = DType::f32},
                    .target_stride = 5,
                    .leaf = leaf.view()});
  for (std::size_t i = 0; i < 15; ++i) EXPECT_EQ(sum.values[i], before.values[i] + leaf.values[i]);
}

/// q * 2^-50 rounded once, from the bits of q.
float gradient_exactly(std::int64_t q) {
  const bool negative = q < 0;
  const std::uint64_t value =
      negative ? -static_cast<std::uint64_t>(q) : static_cast<std::uint64_t>(q);
  int shift = 0;
  while (value >> shift >= (std::uint64_t{1} << 24)) ++shift;
  std::uint64_t kept = value >> shift;
  const std::uint64_t rest = value - (kept << shift);
  const std::uint64_t half = shift == 0 ? 0 : std::uint64_t{1} << (shift - 1);
  if (shift > 0 && (rest > half || (rest == half && kept % 2 == 1))) ++kept;
  const auto result =
      static_cast<float>(std::ldexp(static_cast<double>(kept), shift - kLeafScaleBits));
  return negative ? -result : result;
}

/// The gradients that AdamW makes of sums: m = g where nothing else is left in it.
template <class S, class A>
std::vector<A> gradients_of(Stream& stream, std::vector<S> sums) {
  const auto n = std::ssize(sums);
  Matrix<A> master(1, n), m(1, n), v(1, n);
  adamw(stream, {.master = master.view(),
                 .m = m.view(),
                 .v = v.view(),
                 .sum = ConstTensorView(sums.data(), dtype_of<S>(), 1, n),
                 .beta1 = 0,
                 .eps = 1});
  return m.values;
}

TEST(GradientOfSum, RoundsOnce) {
  std::vector<std::int64_t> q = {0,
                                 1,
                                 -1,
                                 (1 << 24) + 1,
                                 (1 << 24) + 3,
                                 std::numeric_limits<std::int64_t>::max(),
                                 std::numeric_limits<std::int64_t>::min()};
  std::mt19937_64 generator(5);
  for (int i = 0; i < 5000; ++i) {
    const auto value = static_cast<std::int64_t>(generator()) >> (i % 60);
    q.push_back(value);
    // Just above a tie of the float, below the precision of a double: rounding by way of double
    // would take the even neighbour.
    const std::int64_t odd =
        (static_cast<std::int64_t>(generator() >> 41) | (std::int64_t{1} << 23)) | 1;
    q.push_back((odd << 38) + (std::int64_t{1} << 37) + (i % 3) - 1);
  }
  Stream stream(2);
  const std::vector<float> gradient = gradients_of<std::int64_t, float>(stream, q);
  std::int64_t double_rounding_differs = 0;
  for (std::size_t i = 0; i < q.size(); ++i) {
    ASSERT_EQ(gradient[i], gradient_exactly(q[i])) << q[i];
    double_rounding_differs +=
        gradient[i] != static_cast<float>(static_cast<double>(q[i]) * 0x1p-50);
    // The norm takes the same gradient.
    const ElementRange one{static_cast<std::int64_t>(i), 1};
    double square = -1;
    gradient_squares(stream, {.sum = ConstTensorView(q.data(), DType::i64, 1, std::ssize(q)),
                              .sums_of_squares = {&square, DType::f64, 1, 1},
                              .blocks = {&one, 1}});
    ASSERT_EQ(square, std::pow(static_cast<double>(gradient[i]), 2)) << q[i];
  }
  EXPECT_GT(double_rounding_differs, 100) << "the cases do not tell one rounding from two";
}

TEST(GradientOfSum, PlainSumsAreTakenAsTheyAre) {
  Stream stream(1);
  Matrix<double> sum(1, 33);
  sum.randomize(1);
  EXPECT_EQ((gradients_of<double, double>(stream, sum.values)), sum.values);
}

/// Blocks of many sizes, one after the other with gaps between them.
std::vector<ElementRange> blocks_of_many_sizes() {
  std::vector<ElementRange> blocks;
  std::int64_t begin = 0;
  for (const std::int64_t count : {0, 1, 7, 8, 9, 1000, 65536, 70001}) {
    blocks.push_back({begin, count});
    begin += count + count % 5;
  }
  return blocks;
}

template <class A>
std::vector<double> sums_of_squares(int threads, Matrix<A>& gradient,
                                    std::span<const ElementRange> blocks) {
  Stream stream(threads);
  std::vector<double> result(blocks.size(), -1);
  gradient_squares(stream, {.sum = gradient.view(),
                            .sums_of_squares = {result.data(), DType::f64, 1, std::ssize(result)},
                            .blocks = blocks});
  return result;
}

template <class A>
void expect_eight_interleaved_sums() {
  const std::vector<ElementRange> blocks = blocks_of_many_sizes();
  Matrix<A> gradient(1, blocks.back().begin + blocks.back().count);
  gradient.randomize(1);
  const std::vector<double> result = sums_of_squares(1, gradient, blocks);
  for (std::size_t b = 0; b < blocks.size(); ++b) {
    double sums[8] = {};
    for (std::int64_t i = 0; i < blocks[b].count; ++i) {
      const double value = gradient.at(0, blocks[b].begin + i);
      sums[i % 8] += value * value;
    }
    double expected = 0;
    for (const double sum : sums) expected += sum;
    EXPECT_EQ(result[b], expected) << blocks[b].count;
  }
}
TEST(BlockSumsOfSquares, AddEightInterleavedSums) {
  expect_eight_interleaved_sums<float>();
  expect_eight_interleaved_sums<double>();
}

TEST(BlockSumsOfSquares, DependNeitherOnNeighboursNorThreads) {
  const std::vector<ElementRange> blocks = blocks_of_many_sizes();
  Matrix<float> gradient(1, blocks.back().begin + blocks.back().count);
  gradient.randomize(1);
  const std::vector<double> together = sums_of_squares(1, gradient, blocks);
  EXPECT_EQ(sums_of_squares(3, gradient, blocks), together);
  for (std::size_t b = 0; b < blocks.size(); ++b) {
    const ElementRange alone[] = {blocks[b]};
    EXPECT_EQ(sums_of_squares(2, gradient, alone), std::vector{together[b]});
  }
  EXPECT_TRUE(sums_of_squares(2, gradient, {}).empty());
}

struct AdamWState {
  AdamWState(std::int64_t n, int threads)
      : master(1, n), m(1, n), v(1, n), gradient(1, n), compute(1, n) {
    master.randomize(1), m.randomize(2, 1e-3), v.randomize(3, 1e-6), gradient.randomize(4, 1e-2);
    for (float& value : v.values) value = std::abs(value);
    Stream stream(threads);
    adamw(stream, args());
  }
  AdamW args() {
    return {.master = master.view(),
            .m = m.view(),
            .v = v.view(),
            .sum = gradient.view(),
            .compute = compute.view(),
            .clip_factor = 0.7,
            .lr = 3e-3,
            .beta1 = 0.9,
            .beta2 = 0.95,
            .eps = 1e-8,
            .weight_decay = 0.1,
            .bias_correction1 = 1 - std::pow(0.9, 7),
            .bias_correction2 = 1 - std::pow(0.95, 7)};
  }
  Matrix<float> master, m, v, gradient;
  Matrix<bf16> compute;
};

TEST(AdamW, AgreesWithDouble) {
  const std::int64_t n = 5003;
  AdamWState result(n, 2);
  Matrix<float> p(1, n), m(1, n), v(1, n);
  p.randomize(1), m.randomize(2, 1e-3), v.randomize(3, 1e-6);
  for (std::size_t i = 0; i < static_cast<std::size_t>(n); ++i) {
    const double g = 0.7 * static_cast<double>(result.gradient.values[i]);
    const double m1 = 0.9 * static_cast<double>(m.values[i]) + 0.1 * g;
    const double v1 = 0.95 * std::abs(static_cast<double>(v.values[i])) + 0.05 * g * g;
    const double update =
        m1 / (1 - std::pow(0.9, 7)) / (std::sqrt(v1 / (1 - std::pow(0.95, 7))) + 1e-8);
    const double expected =
        static_cast<double>(p.values[i]) - 3e-3 * (update + 0.1 * static_cast<double>(p.values[i]));
    // Ten f32 roundings, of m and v relative to their terms.
    ASSERT_NEAR(result.m.values[i], m1, 4e-7 * (std::abs(g) + 1e-3));
    ASSERT_NEAR(result.v.values[i], v1, 4e-7 * v1);
    ASSERT_NEAR(result.master.values[i], expected, 2e-7 + 3e-3 * 1e-5);
    ASSERT_EQ(result.compute.values[i].bits, bf16(result.master.values[i]).bits);
  }
}

TEST(AdamW, BitsDependNeitherOnPlaceNorThreads) {
  const std::int64_t n = 100003;
  AdamWState one(n, 1), three(n, 3);
  EXPECT_TRUE(same_bits(one.master.values, three.master.values));
  EXPECT_TRUE(same_bits(one.v.values, three.v.values));
  // Element by element from the same start.
  AdamWState single(1, 1);
  AdamW args = one.args();
  Matrix<float> p(1, n), m(1, n), v(1, n);
  p.randomize(1), m.randomize(2, 1e-3), v.randomize(3, 1e-6);
  for (float& value : v.values) value = std::abs(value);
  Stream stream(1);
  for (const std::int64_t i : {std::int64_t{0}, std::int64_t{1}, std::int64_t{15}, n - 1}) {
    args.master = p.view().col_range(i, 1);
    args.m = m.view().col_range(i, 1);
    args.v = v.view().col_range(i, 1);
    args.sum = one.gradient.view().col_range(i, 1);
    args.compute = {};
    adamw(stream, args);
    EXPECT_EQ(p.at(0, i), one.master.at(0, i));
  }
}

TEST(AdamW, NoGradientStillDecays) {
  Matrix<double> p(1, 1), m(1, 1), v(1, 1), g(1, 1);
  p.values[0] = 2;
  Stream stream(1);
  adamw(stream, {.master = p.view(),
                 .m = m.view(),
                 .v = v.view(),
                 .sum = g.view(),
                 .lr = 0.5,
                 .beta1 = 0.9,
                 .beta2 = 0.95,
                 .eps = 1e-8,
                 .weight_decay = 0.1});
  EXPECT_DOUBLE_EQ(p.values[0], 2 - 0.5 * 0.1 * 2);
}

}  // namespace
}  // namespace arcus
