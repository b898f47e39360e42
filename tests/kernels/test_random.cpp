#include "kernels/random.hpp"

#include "tests/kernels/op_test.hpp"

namespace arcus {
namespace {

using namespace test;  // NOLINT(google-build-using-namespace)

constexpr std::uint64_t kKey = 0x1234567890abcdef;

template <class T>
Matrix<T> filled_with_normals(Stream& stream, std::int64_t count, std::int64_t first_element,
                              float std) {
  Matrix<T> out(1, count);
  fill_normal(stream, {.out = out, .key = kKey, .first_element = first_element, .std = std});
  return out;
}

template <class T>
void expect_addressed_numbers() {
  Stream stream(2);
  const Rng rng(kKey);
  // Neither the first nor the last element need stand at the edge of a call of the generator.
  for (const std::int64_t count : {0, 1, 3, 4, 5, 30000}) {
    for (const std::int64_t first : {0, 1, 2, 3, 4, 1001}) {
      const auto out = filled_with_normals<T>(stream, count, first, 0.02F);
      for (std::int64_t i = 0; i < count; ++i) {
        const float product = rng.normal(static_cast<std::uint64_t>(first + i)) * 0.02F;
        ASSERT_EQ(to_double(out.at(0, i)), to_double(from_double<T>(product)))
            << count << " from " << first << " at " << i;
      }
    }
  }
}
TEST(FillNormal, GivesTheAddressedNumbers) {
  expect_addressed_numbers<float>();
  expect_addressed_numbers<double>();
  expect_addressed_numbers<bf16>();
}

TEST(FillNormal, PartsAndThreadsGiveTheBitsOfTheWhole) {
  Stream one(1);
  Stream three(3);
  const std::int64_t count = 50001;
  const auto whole = filled_with_normals<float>(one, count, 7, 1);
  EXPECT_TRUE(filled_with_normals<float>(three, count, 7, 1).same_bits(whole));
  Matrix<float> parts(1, count);
  for (std::int64_t begin = 0; begin < count; begin += 777) {
    const std::int64_t part = std::min<std::int64_t>(777, count - begin);
    fill_normal(
        three,
        {.out = parts.view().col_range(begin, part), .key = kKey, .first_element = 7 + begin});
  }
  EXPECT_TRUE(parts.same_bits(whole));
}

TEST(FillNormal, HasTheMomentsOfANormal) {
  Stream stream(2);
  const std::int64_t count = 1 << 18;
  const auto out = filled_with_normals<float>(stream, count, 0, 0.5F);
  double sum = 0, squares = 0;
  for (const float value : out.data()) {
    sum += to_double(value);
    squares += to_double(value) * to_double(value);
  }
  // Five standard errors of the mean and of the variance.
  EXPECT_NEAR(sum / static_cast<double>(count), 0, 5 * 0.5 / 512);
  EXPECT_NEAR(squares / static_cast<double>(count), 0.25, 5 * 0.25 * std::sqrt(2.0) / 512);
}

}  // namespace
}  // namespace arcus
