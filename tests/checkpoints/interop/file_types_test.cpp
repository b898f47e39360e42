#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "checkpoints/interop/tensor_file.hpp"
#include "src/base/dtype.hpp"
#include "tests/checkpoints/interop/expect.hpp"

namespace arcus::test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// What 16 bits mean, from the definition of binary16.
double meaning_of(std::uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const int fraction = bits & 1023;
  const double sign = (bits & 0x8000) != 0 ? -1 : 1;
  if (exponent == 0) return sign * std::ldexp(fraction, -24);
  if (exponent < 31) return sign * std::ldexp(1024 + fraction, exponent - 25);
  return fraction == 0 ? sign * kInfinity : std::numeric_limits<double>::quiet_NaN();
}

/// The nearest of all binary16 numbers, found by search; of two equally near ones the even one.
std::uint16_t nearest_f16(float value) {
  static const std::vector<double> finite = [] {
    std::vector<double> all;
    for (std::uint16_t bits = 0; bits < 0x7C00; ++bits) all.push_back(meaning_of(bits));
    all.push_back(65536);  // what the next one would be; it is infinity
    return all;
  }();
  const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double size = std::abs(static_cast<double>(value));
  if (size >= 65536) return sign | 0x7C00;
  const auto above =
      static_cast<std::size_t>(std::ranges::upper_bound(finite, size) - finite.begin());
  const double to_below = size - finite[above - 1];
  const double to_above = finite[above] - size;
  const bool up = to_above < to_below || (to_above == to_below && above % 2 == 0);
  return static_cast<std::uint16_t>(sign | (up ? above : above - 1));
}

TEST(F16, EveryNumberMeansWhatTheDefinitionSaysAndComesBack) {
  for (std::uint32_t i = 0; i < 65536; ++i) {
    const auto bits = static_cast<std::uint16_t>(i);
    const float value = float_from_f16(bits);
    if (std::isnan(meaning_of(bits))) {
      EXPECT_TRUE(std::isnan(value)) << i;
      EXPECT_EQ(f16_from_float(value), bits | 0x200) << i;  // quiet, with what it carries
      continue;
    }
    EXPECT_EQ(static_cast<double>(value), meaning_of(bits)) << i;
    EXPECT_EQ(std::signbit(value), i >= 0x8000) << i;
    EXPECT_EQ(f16_from_float(value), bits) << i;
  }
}

TEST(F16, RoundsToTheNearestTiesToEven) {
  const auto check = [](float value) {
    for (const float signed_value : {value, -value}) {
      ASSERT_EQ(f16_from_float(signed_value), nearest_f16(signed_value)) << signed_value;
    }
  };
  // Every number, every point half way to the next one, and their neighbours.
  for (std::uint16_t bits = 0; bits < 0x7C00; ++bits) {
    const float low = float_from_f16(bits);
    const float high = bits == 0x7BFF ? 65536.0F : float_from_f16(bits + 1);
    for (const float value : {low, (low + high) / 2}) {
      check(value);
      check(std::nextafter(value, kInfinity));
      if (value > 0) check(std::nextafter(value, 0.0F));
    }
  }
  for (const float value : {65519.9F, 65520.0F, 65536.0F, 1e30F, kInfinity, 0x1p-25F, 0x1.8p-25F,
                            0x1p-126F, 0x1p-149F}) {
    check(value);
  }
  std::mt19937 random(1);
  for (int i = 0; i < 1'000'000; ++i) {
    const auto value = std::bit_cast<float>(static_cast<std::uint32_t>(random()) & 0x7FFFFFFFU);
    if (!std::isnan(value)) check(value);
  }
}

#ifdef __FLT16_MAX__
TEST(F16, AgreesWithTheCompilersOwn) {
  std::mt19937 random(2);
  for (int i = 0; i < 1'000'000; ++i) {
    const auto value = std::bit_cast<float>(static_cast<std::uint32_t>(random()));
    if (std::isnan(value)) continue;
    const auto bits = std::bit_cast<std::uint16_t>(static_cast<_Float16>(value));
    ASSERT_EQ(f16_from_float(value), bits) << value;
  }
  for (std::uint32_t i = 0; i < 65536; ++i) {
    const auto value = static_cast<float>(std::bit_cast<_Float16>(static_cast<std::uint16_t>(i)));
    const float ours = float_from_f16(static_cast<std::uint16_t>(i));
    ASSERT_TRUE(std::bit_cast<std::uint32_t>(ours) == std::bit_cast<std::uint32_t>(value) ||
                (std::isnan(ours) && std::isnan(value)))
        << i;
  }
}
#endif

std::vector<float> decoded(FileType type, std::string_view bytes, std::size_t count) {
  std::vector<float> values(count);
  decode(type, bytes, values);
  return values;
}

/// Random floats of all sizes that the type can hold, NaN and infinities among them.
std::vector<float> random_floats(std::size_t count, float most, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<float> values;
  while (values.size() < count) {
    const auto value = std::bit_cast<float>(static_cast<std::uint32_t>(random()));
    if (!(std::isfinite(value) && std::abs(value) > most)) values.push_back(value);
  }
  return values;
}

TEST(Encode, EachNumberAloneGivesTheBytesOfTheWhole) {
  for (const std::size_t count : {0, 1, 7, 64, 1001}) {
    const auto values = random_floats(count, 65000, 3);
    const std::string as_f32 = encode(FileType::f32, values, "x");
    const std::string as_f16 = encode(FileType::f16, values, "x");
    const std::string as_bf16 = encode(FileType::bf16, values, "x");
    ASSERT_EQ(as_f32.size(), 4 * count);
    ASSERT_EQ(as_f16.size(), 2 * count);
    ASSERT_EQ(as_bf16.size(), 2 * count);
    for (std::size_t i = 0; i < count; ++i) {
      std::uint16_t f16_bits = 0;
      std::uint16_t bf16_bits = 0;
      std::memcpy(&f16_bits, as_f16.data() + 2 * i, 2);
      std::memcpy(&bf16_bits, as_bf16.data() + 2 * i, 2);
      EXPECT_EQ(f16_bits, f16_from_float(values[i])) << values[i];
      EXPECT_EQ(bf16_bits, bf16(values[i]).bits) << values[i];
      EXPECT_EQ(std::memcmp(as_f32.data() + 4 * i, &values[i], 4), 0);
    }
  }
}

TEST(Encode, DecodingGivesTheRoundedNumbersBack) {
  const auto values = random_floats(10'000, 65000, 4);
  for (const FileType type : {FileType::f32, FileType::f16, FileType::bf16}) {
    const std::string bytes = encode(type, values, "x");
    const auto back = decoded(type, bytes, values.size());
    EXPECT_EQ(encode(type, back, "x"), bytes);
    for (std::size_t i = 0; i < values.size(); ++i) {
      const float rounded = type == FileType::f32   ? values[i]
                            : type == FileType::f16 ? float_from_f16(f16_from_float(values[i]))
                                                    : static_cast<float>(bf16(values[i]));
      EXPECT_TRUE(back[i] == rounded || (std::isnan(back[i]) && std::isnan(values[i])));
    }
  }
}

TEST(Encode, WhatDoesNotFitIsNamed) {
  std::vector<float> values(100, 1.0F);
  values[3] = -kInfinity;  // stays what it is
  values[5] = std::numeric_limits<float>::quiet_NaN();
  values[41] = -65520.0F;
  EXPECT_EQ(error_of([&] { encode(FileType::f16, values, "a.weight"); }),
            "a.weight: number 41 is -65520, too large for F16; write BF16 or F32");
  values[41] = -65519.996F;
  EXPECT_NO_THROW(encode(FileType::f16, values, "a.weight"));
  values[99] = std::numeric_limits<float>::max();
  EXPECT_NO_THROW(encode(FileType::f32, values, "a.weight"));
  EXPECT_EQ(error_of([&] { encode(FileType::bf16, values, "a.weight"); }),
            "a.weight: number 99 is 3.4028235e+38, too large for BF16; write F32");
  values[99] = std::bit_cast<float>(0x7F7F7FFFU);  // rounds to the largest BF16
  EXPECT_NO_THROW(encode(FileType::bf16, values, "a.weight"));
  const std::vector<float> block(32);
  EXPECT_CONTAINS(error_of([&] { encode(FileType::q8_0, block, "x"); }, ExitCode::internal),
                  "Arcus reads Q8_0 and does not write it");
}

/// Random blocks whose scales are random f16 numbers, NaN and infinities included.
std::string random_blocks(std::size_t bytes, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::string blocks;
  for (std::size_t i = 0; i < bytes; ++i) blocks += static_cast<char>(random());
  return blocks;
}

std::uint16_t half_at(const std::string& bytes, std::size_t at) {
  return static_cast<std::uint16_t>(static_cast<unsigned char>(bytes[at]) |
                                    static_cast<unsigned char>(bytes[at + 1]) << 8);
}

/// The products are exact in double, and so is Q4_1's rounding to float of the exact sum: GGML's
/// float arithmetic gives the same because 4 and 11 bits multiply to 15.
TEST(Blocks, AreWhatGgmlDefines) {
  constexpr std::size_t kBlocks = 3000;
  const auto check = [](FileType type, std::size_t block_bytes, auto expected) {
    const std::string bytes = random_blocks(kBlocks * block_bytes, 5);
    const auto values = decoded(type, bytes, kBlocks * 32);
    for (std::size_t i = 0; i < values.size(); ++i) {
      const std::string block = bytes.substr(i / 32 * block_bytes, block_bytes);
      const auto wanted = static_cast<float>(expected(block, i % 32));
      ASSERT_TRUE(values[i] == wanted || (std::isnan(values[i]) && std::isnan(wanted)))
          << name_of(type) << " " << i << ": " << values[i] << " " << wanted;
    }
  };
  check(FileType::q8_0, 34, [](const std::string& block, std::size_t i) {
    return meaning_of(half_at(block, 0)) * static_cast<signed char>(block[2 + i]);
  });
  const auto nibble = [](const std::string& block, std::size_t begin, std::size_t i) {
    const int both = static_cast<unsigned char>(block[begin + i % 16]);
    return i < 16 ? both % 16 : both / 16;
  };
  check(FileType::q4_0, 18, [&](const std::string& block, std::size_t i) {
    return meaning_of(half_at(block, 0)) * (nibble(block, 2, i) - 8);
  });
  check(FileType::q4_1, 20, [&](const std::string& block, std::size_t i) {
    return meaning_of(half_at(block, 0)) * nibble(block, 4, i) + meaning_of(half_at(block, 2));
  });
}

TEST(FileTypes, BytesAndTheirLimits) {
  EXPECT_EQ(bytes_of(FileType::f32, 3), 12);
  EXPECT_EQ(bytes_of(FileType::f16, 3), 6);
  EXPECT_EQ(bytes_of(FileType::bf16, 0), 0);
  EXPECT_EQ(bytes_of(FileType::q8_0, 64), 68);
  EXPECT_EQ(bytes_of(FileType::q4_0, 64), 36);
  EXPECT_EQ(bytes_of(FileType::q4_1, 64), 40);
  EXPECT_CONTAINS(error_of([] { bytes_of(FileType::q4_1, 48); }),
                  "48 numbers cannot be written as Q4_1");
  EXPECT_EQ(bytes_of(FileType::f32, std::int64_t{1} << 60), std::int64_t{1} << 62);
  EXPECT_CONTAINS(error_of([] { bytes_of(FileType::f32, (std::int64_t{1} << 60) + 1); }), "2^62");
  EXPECT_CONTAINS(error_of([] { bytes_of(FileType::f16, -2); }), "-2 numbers");
  const std::int64_t large = std::int64_t{1} << 40;
  EXPECT_EQ((FileTensor{.name = "a", .shape = {}}.num_elements()), 1);
  EXPECT_EQ((FileTensor{.name = "a", .shape = {3, 0}}.num_elements()), 0);
  EXPECT_CONTAINS(error_of([&] {
                    FileTensor{.name = "a", .shape = {large, large}}.num_elements();
                  }),
                  "tensor a cannot have the shape [1099511627776, 1099511627776]");
  EXPECT_CONTAINS(error_of([&] {
                    FileTensor{.name = "a", .shape = {large, large, 0}}.num_elements();
                  }),
                  "cannot have the shape");
  EXPECT_CONTAINS(error_of([] {
                    FileTensor{.name = "a", .shape = {2, -1}}.num_elements();
                  }),
                  "cannot have the shape [2, -1]");
}

}  // namespace
}  // namespace arcus::test
