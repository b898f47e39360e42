#include "kernels/permute.hpp"

#include "tests/kernels/op_test.hpp"

namespace arcus {
namespace {

using namespace test;  // NOLINT(google-build-using-namespace)

/// Elements that name their place.
template <class T>
Matrix<T> places(std::int64_t rows, std::int64_t cols, std::int64_t padding) {
  Matrix<T> x(rows, cols, padding);
  for (std::int64_t t = 0; t < rows; ++t) {
    // Eight bits, which bf16 holds exactly.
    for (std::int64_t i = 0; i < cols; ++i) x.at(t, i) = from_double<T>((t * 7 + i) % 256);
  }
  return x;
}

template <class T>
void expect_gathered(Stream& stream) {
  for (const std::int64_t cols : {1, 5, 300}) {
    for (const std::int64_t tokens : {1, 40}) {
      for (const std::int64_t slots : {1, 3}) {
        // No rows, fewer than there are slots, and rows that are wanted several times.
        for (const std::int64_t rows : {std::int64_t{0}, tokens, 4 * tokens * slots}) {
          const Matrix<T> x = places<T>(tokens, cols, 2);
          Ints index(1, rows);
          for (std::int64_t r = 0; r < rows; ++r) {
            index.at(0, r) =
                static_cast<std::int32_t>(draw(5, static_cast<std::uint64_t>(r), tokens * slots));
          }
          Matrix<T> y(rows, cols, 3);
          gather_rows(stream, {.y = y, .x = x, .index = index, .indices_per_row = slots});
          for (std::int64_t r = 0; r < rows; ++r) {
            for (std::int64_t i = 0; i < cols; ++i) {
              ASSERT_EQ(to_double(y.at(r, i)), to_double(x.at(index.at(0, r) / slots, i)));
            }
          }
          EXPECT_TRUE(y.padding_untouched());
        }
      }
    }
  }
}
TEST(GatherRows, CopiesTheRowsOfTheirIndices) {
  Stream one(1);
  Stream three(3);
  expect_gathered<float>(one);
  expect_gathered<float>(three);
  expect_gathered<double>(three);
  expect_gathered<bf16>(three);
}

TEST(GatherRows, KeepsBitsThatAreNoNumbers) {
  Stream stream(1);
  Matrix<float> x(2, 1);
  x.at(0, 0) = std::bit_cast<float>(0x7f800001U);
  x.at(1, 0) = std::bit_cast<float>(0xffc12345U);
  Ints index(1, 2);
  index.at(0, 0) = 1;
  index.at(0, 1) = 0;
  Matrix<float> y(2, 1);
  gather_rows(stream, {.y = y, .x = x, .index = index});
  EXPECT_EQ(std::memcmp(&y.at(0, 0), &x.at(1, 0), sizeof(float)), 0);
  EXPECT_EQ(std::memcmp(&y.at(1, 0), &x.at(0, 0), sizeof(float)), 0);
}

TEST(GatherRows, RefusesOtherShapes) {
  Stream stream(1);
  const Matrix<float> x = filled<float>(4, 5, 1);
  const Ints index = filled<std::int32_t>(1, 3, 0);
  EXPECT_THROW(gather_rows(stream, {.y = Matrix<float>(3, 4), .x = x, .index = index}), Error);
  EXPECT_THROW(gather_rows(stream, {.y = Matrix<float>(2, 5), .x = x, .index = index}), Error);
  EXPECT_THROW(gather_rows(stream, {.y = Matrix<double>(3, 5), .x = x, .index = index}), Error);
}

}  // namespace
}  // namespace arcus
