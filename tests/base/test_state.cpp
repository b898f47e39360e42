#include <gtest/gtest.h>

#include <utility>
#include <vector>

#include "src/base/state.hpp"

namespace arcus {
namespace {

TensorSpec spec(std::vector<std::int64_t> shape, std::int64_t num_units = 1) {
  return {.name = {}, .shape = std::move(shape), .num_units = num_units};
}

TEST(TensorSpec, SeesShapesAsRowsAndColumns) {
  const TensorSpec experts = spec({4, 10, 6}, 4);
  EXPECT_EQ(experts.cols(), 6);
  EXPECT_EQ(experts.num_rows(), 40);
  EXPECT_EQ(experts.unit_rows(), 10);
  EXPECT_EQ(experts.num_elements(), 240);
  const TensorSpec vector = spec({7});
  EXPECT_EQ(vector.cols(), 1);
  EXPECT_EQ(vector.num_rows(), 7);
}

TEST(Blocks, AreTheFewestRowsOfEnoughElements) {
  EXPECT_EQ(block_rows(spec({1000, 512})), 128);
  EXPECT_EQ(block_rows(spec({1000, 500})), 132);  // 131 rows are 65500 elements, too few
  EXPECT_EQ(block_rows(spec({10, 512})), 10);
  EXPECT_EQ(block_rows(spec({3, 100000})), 1);
  EXPECT_EQ(block_rows(spec({100000})), 65536);
}

/// Blocks cover every row once, in order, never cross a unit, and only a unit's last is short.
TEST(Blocks, PartitionEveryUnit) {
  const std::vector<TensorSpec> specs{
      spec({1000, 512}), spec({8, 300, 512}, 8), spec({3, 65537}, 3),   spec({1}),
      spec({200000}),    spec({5, 1, 3}, 5),     spec({2, 129, 512}, 2)};
  for (const TensorSpec& s : specs) {
    std::int64_t next = 0;
    for (std::int64_t i = 0; i < num_blocks(s); ++i) {
      const RowRange range = block_range(s, i);
      EXPECT_EQ(range.begin, next);
      EXPECT_LT(range.begin, range.end);
      EXPECT_EQ(range.begin / s.unit_rows(), (range.end - 1) / s.unit_rows());
      const bool last_of_unit = range.end % s.unit_rows() == 0;
      const std::int64_t rows = range.end - range.begin;
      EXPECT_TRUE(last_of_unit || rows * s.cols() >= kBlockElements);
      EXPECT_LT((rows - 1) * s.cols(), kBlockElements);
      next = range.end;
    }
    EXPECT_EQ(next, s.num_rows());
    EXPECT_EQ(num_blocks(s), s.num_units * blocks_per_unit(s));
  }
}

}  // namespace
}  // namespace arcus
