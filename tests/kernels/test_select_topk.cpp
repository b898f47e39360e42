#include <set>

#include "tests/kernels/gate_support.hpp"

namespace arcus {
namespace {

using namespace test;  // NOLINT(google-build-using-namespace)

TEST(SelectTopk, MatchesASortOverHundredsOfCases) {
  Stream stream(2);
  for (std::uint64_t seed = 0; seed < 400; ++seed) {
    Selection how;
    how.n_group = 1 + draw(seed, 1, 4);
    how.group_score = draw(seed, 2, 2) == 0 ? GroupScore::max : GroupScore::top2_sum;
    // Every ninth case chooses more than one pass of the selection finds.
    const std::int64_t width =
        (seed % 9 == 0 ? 30 : 2) + draw(seed, 3, 5) - (how.group_score == GroupScore::max ? 1 : 0);
    const std::int64_t experts = how.n_group * width;
    how.topk_group = 1 + draw(seed, 4, how.n_group);
    const std::int64_t most = how.n_group > 1 ? how.topk_group * width : experts;
    how.topk = seed % 5 == 0 ? most : 1 + draw(seed, 5, most);
    const std::array<std::int64_t, 4> sizes = {0, 1, 7, 40};
    const std::int64_t tokens = sizes[static_cast<std::size_t>(draw(seed, 6, 4))];
    const Matrix<float> s = tied_scores(tokens, experts, seed + 1000);
    Matrix<float> bias(seed % 2 == 0 ? 0 : 1, experts);
    for (float& b : bias.data()) b = 0.125F * static_cast<float>(draw(seed, 7, 5) - 2);
    const Ints topk_idx = select(stream, s, bias, how);
    for (std::int64_t t = 0; t < tokens; ++t) {
      reference::Row c;
      for (std::int64_t e = 0; e < experts; ++e) {
        c.push_back(bias.rows() == 0 ? s.at(t, e) : s.at(t, e) + bias.at(0, e));
      }
      const auto expected =
          how.n_group > 1 ? reference::topk_in_groups(c, how.topk, how.n_group, how.topk_group,
                                                      how.group_score == GroupScore::top2_sum)
                          : reference::topk(c, how.topk);
      for (std::int64_t j = 0; j < how.topk; ++j) {
        ASSERT_EQ(topk_idx.at(t, j), expected[static_cast<std::size_t>(j)])
            << "seed " << seed << ", token " << t << ", rank " << j;
      }
    }
  }
}

TEST(SelectTopk, StaysValidWithoutNumbers) {
  Stream stream(1);
  Matrix<float> s = filled<float>(1, 6, std::numeric_limits<float>::quiet_NaN());
  s.at(0, 4) = -std::numeric_limits<float>::infinity();
  s.at(0, 2) = 1;
  const Matrix<float> none;
  const Ints all = select(stream, s, none, {.topk = 6});
  const std::set<std::int32_t> distinct(&all.at(0, 0), &all.at(0, 0) + 6);
  EXPECT_EQ(distinct, (std::set<std::int32_t>{0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(all.at(0, 0), 2);
}

TEST(SelectTopk, RefusesWhatCannotBe) {
  Stream stream(1);
  const Matrix<float> s = filled<float>(1, 6, 0.5F);
  const Matrix<float> none;
  EXPECT_THROW(select(stream, s, none, {.topk = 7}), Error);
  EXPECT_THROW(select(stream, s, none, {.topk = 1, .n_group = 4, .topk_group = 2}), Error);
  EXPECT_THROW(select(stream, s, none, {.topk = 3, .n_group = 3, .topk_group = 1}), Error);
  EXPECT_THROW(select(stream, s, none, {.topk = 1, .n_group = 6, .topk_group = 2}), Error);
}

}  // namespace
}  // namespace arcus
