#include <numeric>
#include <set>
#include <tuple>

#include "tests/kernels/gate_support.hpp"

namespace arcus {
namespace {

using namespace test;  // NOLINT(google-build-using-namespace)

// ---- selection -------------------------------------------------------------------------------

/// Numbers 0..n-1 by descending value, equal ones in ascending order.
std::vector<std::int64_t> by_value(const std::vector<float>& value) {
  std::vector<std::int64_t> order(value.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
    return value[static_cast<std::size_t>(a)] > value[static_cast<std::size_t>(b)];
  });
  return order;
}

std::vector<std::int64_t> reference_topk(const std::vector<float>& c, const Selection& how) {
  const auto width = static_cast<std::int64_t>(c.size()) / how.n_group;
  std::vector<float> group;
  for (std::int64_t g = 0; g < how.n_group; ++g) {
    std::vector<float> members(c.begin() + g * width, c.begin() + (g + 1) * width);
    std::sort(members.rbegin(), members.rend());
    group.push_back(how.group_score == GroupScore::max ? members[0]
                                                       : members[0] + (width > 1 ? members[1] : 0));
  }
  auto kept = by_value(group);
  kept.resize(static_cast<std::size_t>(how.n_group > 1 ? how.topk_group : 1));
  std::vector<std::int64_t> chosen;
  for (const std::int64_t e : by_value(c)) {
    if (std::find(kept.begin(), kept.end(), e / width) != kept.end()) chosen.push_back(e);
  }
  chosen.resize(static_cast<std::size_t>(how.topk));
  return chosen;
}

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
      std::vector<float> c;
      for (std::int64_t e = 0; e < experts; ++e) {
        c.push_back(bias.rows() == 0 ? s.at(t, e) : s.at(t, e) + bias.at(0, e));
      }
      const auto expected = reference_topk(c, how);
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

// ---- capacity --------------------------------------------------------------------------------

struct Assignment {
  std::int64_t token, rank;
  float s;
};

TEST(ApplyCapacity, MatchesASortOverHundredsOfCases) {
  Stream stream(1);
  for (std::uint64_t seed = 0; seed < 600; ++seed) {
    const std::int64_t experts = 1 + draw(seed, 1, 9);
    const std::int64_t topk = seed % 7 == 0 ? experts : 1 + draw(seed, 2, experts);
    const std::array<std::int64_t, 5> sizes = {0, 1, 2, 17, 60};
    const std::int64_t tokens = sizes[static_cast<std::size_t>(draw(seed, 3, 5))];
    const std::int64_t capacity = draw(seed, 4, tokens + 2);
    const DropPolicy policy = seed % 2 == 0 ? DropPolicy::position : DropPolicy::probs;
    const Matrix<float> s = tied_scores(tokens, experts, seed + 5000);
    const Matrix<float> none;
    Ints topk_idx = select(stream, s, none, {.topk = topk});
    for (std::int64_t t = 0; t < tokens; ++t) {
      if (draw(seed, static_cast<std::uint64_t>(100 + t), 8) != 0) continue;
      for (std::int64_t j = 0; j < topk; ++j) topk_idx.at(t, j) = -1;  // a padding token
    }
    const Capacity r = apply(stream, topk_idx, s, capacity, policy);
    for (std::int64_t e = 0; e < experts; ++e) {
      std::vector<Assignment> wanted;
      for (std::int64_t t = 0; t < tokens; ++t) {
        for (std::int64_t j = 0; j < topk; ++j) {
          if (topk_idx.at(t, j) == e) wanted.push_back({t, j, s.at(t, e)});
        }
      }
      EXPECT_EQ(r.demand.at(0, e), static_cast<std::int64_t>(wanted.size()));
      std::sort(wanted.begin(), wanted.end(), [&](const Assignment& a, const Assignment& b) {
        if (policy == DropPolicy::position) {
          return std::tie(a.rank, a.token) < std::tie(b.rank, b.token);
        }
        return a.s != b.s ? a.s > b.s : std::tie(a.token, a.rank) < std::tie(b.token, b.rank);
      });
      for (std::size_t i = 0; i < wanted.size(); ++i) {
        const bool kept = capacity == 0 || static_cast<std::int64_t>(i) < capacity;
        ASSERT_EQ(r.expert_of_slot.at(wanted[i].token, wanted[i].rank), kept ? e : -1)
            << "seed " << seed << ", expert " << e << ", place " << i;
      }
    }
    for (std::int64_t t = 0; t < tokens; ++t) {
      for (std::int64_t j = 0; j < topk; ++j) {
        if (topk_idx.at(t, j) < 0) {
          ASSERT_EQ(r.expert_of_slot.at(t, j), -1);
        }
      }
    }
  }
}

}  // namespace
}  // namespace arcus
