#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "src/base/dtype.hpp"
#include "src/base/hash.hpp"
#include "src/base/rng.hpp"
#include "src/base/tensor.hpp"

namespace arcus {
namespace {

float round_trip(float x) { return static_cast<float>(bf16(x)); }

TEST(Bf16, EveryValueComesBack) {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    bf16 value;
    value.bits = static_cast<std::uint16_t>(bits);
    const auto x = static_cast<float>(value);
    if (std::isnan(x)) {
      EXPECT_TRUE(std::isnan(round_trip(x)));
    } else {
      EXPECT_EQ(bf16(x).bits, value.bits);
    }
  }
}

/// Against the definition: the nearer of the two neighbours, the even one in the middle.
TEST(Bf16, RoundsToTheNearestAndTiesToEven) {
  const Rng rng(1, "test", "bf16");
  for (std::uint64_t i = 0; i < 200000; ++i) {
    const std::uint32_t bits =
        i % 3 == 0 ? (rng.words(0, i)[0] & 0xffff0000U) | 0x8000U : rng.words(0, i)[0];
    const auto x = std::bit_cast<float>(bits);
    if (!std::isfinite(x)) continue;
    const auto below = std::bit_cast<float>(bits & 0xffff0000U);
    // Of the same sign, one step further from zero; may be infinity, which as a neighbour counts
    // as 2^128.
    const auto above = std::bit_cast<float>((bits & 0xffff0000U) + 0x10000U);
    const double step = std::isfinite(above) ? std::abs(double{above}) - std::abs(double{below})
                                             : 0x1p128 - std::abs(double{below});
    const double part = std::abs(double{x}) - std::abs(double{below});
    const bool up = part > step / 2 || (part == step / 2 && (bits & 0x10000U) != 0);
    ASSERT_EQ(round_trip(x), up ? above : below) << std::hex << bits;
  }
}

TEST(Bf16, KeepsSignsInfinitiesAndNan) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  EXPECT_EQ(round_trip(kInf), kInf);
  EXPECT_EQ(round_trip(-kInf), -kInf);
  EXPECT_TRUE(std::signbit(round_trip(-0.0F)));
  EXPECT_EQ(round_trip(std::numeric_limits<float>::max()), kInf);
  // A NaN whose payload lies in the lower half alone must not become infinity.
  EXPECT_TRUE(std::isnan(round_trip(std::bit_cast<float>(0x7f800001U))));
  EXPECT_TRUE(std::isnan(round_trip(std::bit_cast<float>(0xffffffffU))));
}

TEST(DType, NamesAndSizesAgree) {
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::i32, DType::i64, DType::u8,
                            DType::u16, DType::u32, DType::u64}) {
    EXPECT_EQ(dtype_from_name(name_of(dtype)), dtype);
  }
  EXPECT_EQ(size_of(dtype_of<double>()), sizeof(double));
  EXPECT_EQ(size_of(dtype_of<bf16>()), sizeof(bf16));
  EXPECT_EQ(size_of(dtype_of<std::uint16_t>()), sizeof(std::uint16_t));
  EXPECT_THROW(dtype_from_name("f16"), Error);
}

TEST(DType, DispatchCallsTheRightType) {
  const auto size = []<class T>() { return sizeof(T); };
  EXPECT_EQ(dispatch_compute(DType::bf16, size), 2U);
  EXPECT_EQ(dispatch_compute(DType::f32, size), 4U);
  EXPECT_EQ(dispatch_accumulate(DType::f64, size), 8U);
  EXPECT_THROW(dispatch_compute(DType::i32, size), Error);
  EXPECT_THROW(dispatch_accumulate(DType::bf16, size), Error);
}

// xxh3 of the empty input with seed 0, from the reference implementation.
TEST(Hash, GivesTheKnownAnswer) {
  EXPECT_EQ(hash_text(""), 0x2d06800538d394c2U);
  EXPECT_EQ(hex(0xabcU), "0000000000000abc");
}

TEST(Hash, PiecesGiveTheHashOfTheWhole) {
  std::string text;
  for (int i = 0; i < 5000; ++i) text.push_back(static_cast<char>(i * 7));
  for (const std::size_t step : {1U, 13U, 1024U, 5000U}) {
    StreamHash hash;
    for (std::size_t at = 0; at < text.size(); at += step) {
      hash.update(text.data() + at, std::min(step, text.size() - at));
    }
    EXPECT_EQ(hash.digest(), hash_text(text));
  }
  const std::vector<std::uint64_t> hashes{1, 2};
  const std::vector<std::uint64_t> swapped{2, 1};
  EXPECT_NE(hash_of_hashes(hashes), hash_of_hashes(swapped));
}

TEST(TensorView, ViewsRowsAndColumns) {
  std::vector<float> data(24);
  for (std::size_t i = 0; i < data.size(); ++i) data[i] = static_cast<float>(i);
  const TensorView view(data.data(), DType::f32, 4, 6);
  EXPECT_EQ(view.row<float>(2)[1], 13);
  EXPECT_EQ(view.row_range(1, 2).row<float>(1)[0], 12);
  const ConstTensorView part = view.col_range(2, 3);
  EXPECT_EQ(part.row<float>(3)[0], 20);
  EXPECT_FALSE(part.contiguous());
  EXPECT_THROW(part.span<float>(), Error);
  EXPECT_THROW(view.as<double>(), Error);
  EXPECT_EQ(view.span<float>().size(), 24U);
}

TEST(ErrorMacros, CarryCodeMessageAndPlace) {
  try {
    ARCUS_REQUIRE(1 == 2, ExitCode::data, "{} apples", 3);
    FAIL() << "nothing was thrown";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::data);
    EXPECT_STREQ(error.what(), "3 apples");
    EXPECT_GT(error.line(), 0);
  }
  EXPECT_NO_THROW(ARCUS_CHECK(true, "unused"));
}

TEST(Errors, OnlyDefectsShowWhereTheyCameFrom) {
  const Error usage(ExitCode::usage, "wrong", "file.cpp", 12);
  EXPECT_EQ(usage.report(), "wrong");
  const Error internal(ExitCode::internal, "broken", "file.cpp", 12);
  EXPECT_EQ(internal.report(), "broken (a defect of Arcus, file.cpp:12)");
  EXPECT_EQ(as_error(internal).report(), internal.report());
  EXPECT_EQ(as_error(std::runtime_error("odd")).code(), ExitCode::internal);
  EXPECT_EQ(as_error(std::bad_alloc()).report().find("out of memory"), 0U);
}

}  // namespace
}  // namespace arcus
