#include <set>

#include "tests/kernels/gate_support.hpp"

namespace arcus {
namespace {

using namespace test;  // NOLINT(google-build-using-namespace)

// ---- second choice ---------------------------------------------------------------------------

template <class A>
Ints sample(Stream& stream, const Ints& topk_idx, const Matrix<A>& s, const TokenDraws& draws) {
  Ints wanted(topk_idx.rows(), 2, 1);
  sample_second(stream, {.wanted = wanted, .topk_idx = topk_idx, .s = s, .draws = draws});
  EXPECT_TRUE(wanted.padding_untouched());
  return wanted;
}

TEST(SampleSecond, FollowsTheFormula) {
  const TokenDraws draws{.key = 77, .step = std::int64_t{5} << 33, .first_token = 1000};
  const Matrix<float> none;
  for (const std::int64_t tokens : {0, 1, 17, 200}) {
    for (const std::int64_t experts : {2, 3, 8, 64}) {
      Stream one(1);
      const Matrix<float> s =
          scores<float>(one, as<float>(normals(tokens, experts, 1, 2)), Score::softmax).s;
      Ints topk_idx = select(one, s, none, {.topk = 2});
      if (tokens > 0) topk_idx.at(0, 0) = topk_idx.at(0, 1) = -1;  // a padding token
      const Ints wanted = sample(one, topk_idx, s, draws);
      for (std::int64_t t = 0; t < tokens; ++t) {
        const int first = topk_idx.at(t, 0);
        const int second = topk_idx.at(t, 1);
        ASSERT_EQ(wanted.at(t, 0), first);
        const bool both = first >= 0 && reference::second_wanted(
                                            draws.key, static_cast<std::uint64_t>(draws.step),
                                            static_cast<std::uint64_t>(1000 + t), s.at(t, first),
                                            s.at(t, second));
        ASSERT_EQ(wanted.at(t, 1), both ? second : -1) << t;
      }
      for (const int threads : {2, 3}) {
        Stream more(threads);
        EXPECT_TRUE(sample(more, topk_idx, s, draws).same_bits(wanted));
      }
    }
  }
}

TEST(SampleSecond, IsTakenAsOftenAsItsShareSays) {
  Stream stream(1);
  const std::int64_t tokens = 20000;
  // 2 s_2 / (s_1 + s_2): 0, 0.25, 0.8 and 1 (equal scores: always).
  for (const double share : {0.0, 0.25, 0.8, 1.0}) {
    Doubles s(tokens, 3);
    Ints topk_idx(tokens, 2);
    for (std::int64_t t = 0; t < tokens; ++t) {
      s.at(t, 2) = 0.6 * (1 - share / 2);
      s.at(t, 0) = 0.6 * share / 2;
      s.at(t, 1) = 0;
      topk_idx.at(t, 0) = 2;
      topk_idx.at(t, 1) = 0;
    }
    const Ints wanted = sample(stream, topk_idx, s, {.key = 5, .step = 3, .first_token = 0});
    double taken = 0;
    for (std::int64_t t = 0; t < tokens; ++t) taken += wanted.at(t, 1) == 0 ? 1 : 0;
    // Binomial; five standard deviations, none where the share is 0 or 1.
    EXPECT_NEAR(taken / static_cast<double>(tokens), share,
                5 * std::sqrt(share * (1 - share) / static_cast<double>(tokens)));
  }
}

// ---- hash ------------------------------------------------------------------------------------

Ints hashed(Stream& stream, const Ints& ids, std::int64_t experts, std::int64_t topk,
            std::uint64_t key) {
  Ints topk_idx(ids.cols(), topk, 1);
  select_by_hash(stream, {.topk_idx = topk_idx, .ids = ids, .num_experts = experts, .key = key});
  EXPECT_TRUE(topk_idx.padding_untouched());
  return topk_idx;
}

TEST(SelectByHash, FollowsTheFormulaWithDistinctAscendingExperts) {
  for (const std::int64_t tokens : {0, 1, 17, 90}) {
    for (const std::int64_t experts : {1, 2, 3, 8, 64}) {
      for (const std::int64_t topk : {std::int64_t{1}, std::int64_t{2}, experts}) {
        if (topk > experts) continue;
        Ints ids(1, tokens);
        for (std::int64_t t = 0; t < tokens; ++t) {
          ids.at(0, t) = static_cast<int>(draw(3, static_cast<std::uint64_t>(t), 50000));
        }
        Stream one(1);
        const Ints topk_idx = hashed(one, ids, experts, topk, 99);
        for (std::int64_t t = 0; t < tokens; ++t) {
          const auto expected = reference::hash_choices(99, ids.at(0, t), experts, topk);
          const auto chosen = choices(topk_idx)[static_cast<std::size_t>(t)];
          ASSERT_EQ(chosen, expected);
          const std::set<int> distinct(chosen.begin(), chosen.end());
          ASSERT_EQ(std::ssize(distinct), topk);
          ASSERT_TRUE(*distinct.begin() >= 0 && *distinct.rbegin() < experts);
        }
        for (const int threads : {2, 3}) {
          Stream more(threads);
          EXPECT_TRUE(hashed(more, ids, experts, topk, 99).same_bits(topk_idx));
        }
      }
    }
  }
}

TEST(SelectByHash, SpreadsManyIdsEvenly) {
  Stream stream(1);
  const std::int64_t count = 32000;
  Ints ids(1, count);
  for (std::int64_t t = 0; t < count; ++t) ids.at(0, t) = static_cast<int>(t);
  for (const std::int64_t experts : {2, 3, 8, 64}) {
    for (const std::int64_t topk : {1, 2}) {
      if (topk == experts) continue;
      std::vector<double> demand(static_cast<std::size_t>(experts));
      for (const auto& row : choices(hashed(stream, ids, experts, topk, 4))) {
        for (const int e : row) demand[static_cast<std::size_t>(e)] += 1;
      }
      const double share = static_cast<double>(topk) / static_cast<double>(experts);
      // Binomial for each expert; five standard deviations.
      const double deviation = std::sqrt(static_cast<double>(count) * share * (1 - share));
      for (const double tokens : demand) {
        EXPECT_NEAR(tokens, static_cast<double>(count) * share, 5 * deviation);
      }
    }
  }
}

TEST(SelectByHash, LayersDiffer) {
  Stream stream(1);
  Ints ids(1, 1000);
  for (std::int64_t t = 0; t < 1000; ++t) ids.at(0, t) = static_cast<int>(t);
  const auto one = choices(hashed(stream, ids, 8, 1, 1));
  const auto two = choices(hashed(stream, ids, 8, 1, 2));
  int equal = 0;
  for (std::size_t t = 0; t < 1000; ++t) equal += one[t] == two[t] ? 1 : 0;
  EXPECT_NEAR(equal, 125, 53);  // binomial, p = 1/8, five standard deviations
}

}  // namespace
}  // namespace arcus
