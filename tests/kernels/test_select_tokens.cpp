#include "tests/kernels/gate_support.hpp"

/// Selections that look at other tokens, and their causal form.
namespace arcus {
namespace {

using namespace test;  // NOLINT(google-build-using-namespace)

const std::vector<std::int64_t> kTokens = {0, 1, 17, 130};
const std::vector<std::int64_t> kExperts = {1, 2, 3, 8, 64};

/// Streams of more threads give the same bits as `expected`.
template <class Run>
void expect_same_on_threads(const Ints& expected, Run&& run) {
  EXPECT_TRUE(expected.padding_untouched());
  for (const int threads : {2, 3}) {
    Stream stream(threads);
    EXPECT_TRUE(run(stream).same_bits(expected)) << threads << " threads";
  }
}

// ---- sinkhorn --------------------------------------------------------------------------------

template <class A>
Ints balanced(Stream& stream, const Matrix<A>& z, std::int64_t topk, std::int64_t iterations) {
  Ints topk_idx(z.rows(), topk, 1);
  Doubles scratch(1, z.rows() * z.cols() + z.cols() + z.rows());
  select_sinkhorn(stream,
                  {.topk_idx = topk_idx, .z = z, .iterations = iterations, .scratch = scratch});
  return topk_idx;
}

TEST(SelectSinkhorn, MatchesTheFormula) {
  Stream one(1);
  for (const std::int64_t tokens : kTokens) {
    for (const std::int64_t experts : kExperts) {
      for (const std::int64_t topk : {std::int64_t{1}, std::int64_t{2}, experts}) {
        if (topk > experts) continue;
        for (const std::int64_t iterations : {0, 1, 8}) {
          const Doubles z = normals(tokens, experts, 1, 3);
          const Ints chosen = balanced(one, z, topk, iterations);
          ASSERT_EQ(choices(chosen), reference::sinkhorn(table(z), topk, iterations))
              << tokens << " tokens, " << experts << " experts, " << iterations << " iterations";
          expect_same_on_threads(
              chosen, [&](Stream& stream) { return balanced(stream, z, topk, iterations); });
        }
      }
    }
  }
}

TEST(SelectSinkhorn, FloatIsDoubleOnTheSameNumbers) {
  Stream stream(2);
  const Doubles z = normals(200, 16, 2, 3);
  const Ints expected = balanced(stream, z, 2, 8);
  EXPECT_EQ(choices(balanced(stream, as<float>(z, 3), 2, 8)), choices(expected));
}

TEST(SelectSinkhorn, ScalingGivesEveryColumnItsShare) {
  // After the last step q_i sum_t r_t A_ti = 1 / E but for the 1e-8; the tokens' sums follow as the
  // iteration converges. Seen through the choices: a biased gate is balanced, and was not before.
  Stream stream(1);
  const std::int64_t tokens = 2000, experts = 8;
  Doubles z = normals(tokens, experts, 3);
  for (std::int64_t t = 0; t < tokens; ++t) z.at(t, 2) += 3;
  const auto demand = [&](std::int64_t iterations) {
    std::vector<double> count(experts);
    for (const auto& row : choices(balanced(stream, z, 1, iterations))) {
      count[static_cast<std::size_t>(row[0])] += 1;
    }
    return count;
  };
  EXPECT_GT(reference::largest(demand(0)), 0.8 * tokens);
  // Soft shares are equal; the hard choice of near-normal logits stays within a fifth of them.
  for (const double count : demand(20))
    EXPECT_NEAR(count, tokens / experts, 0.2 * tokens / experts);
}

TEST(SelectSinkhorn, TiesGoToTheLowerExpert) {
  Stream stream(2);
  for (const auto& row : choices(balanced(stream, filled<float>(17, 8, 0.25F), 3, 5))) {
    EXPECT_EQ(row, (std::vector<int>{0, 1, 2}));
  }
}

// ---- experts choose --------------------------------------------------------------------------

template <class A>
Ints chosen_by_experts(Stream& stream, const Matrix<A>& s, std::int64_t capacity) {
  Ints topk_idx(s.rows(), s.cols(), 1);
  Longs scratch(1, 2 * s.cols());
  select_by_experts(stream,
                    {.topk_idx = topk_idx, .s = s, .capacity = capacity, .scratch = scratch});
  return topk_idx;
}

template <class A>
void expect_expert_choice(const Matrix<A>& s, std::int64_t capacity) {
  Stream one(1);
  const Ints chosen = chosen_by_experts(one, s, capacity);
  ASSERT_EQ(choices(chosen), reference::expert_choice(table(s), capacity))
      << s.rows() << " tokens, " << s.cols() << " experts, capacity " << capacity;
  std::vector<std::int64_t> taken(static_cast<std::size_t>(s.cols()));
  for (const auto& row : choices(chosen)) {
    for (const int e : row) {
      if (e >= 0) ++taken[static_cast<std::size_t>(e)];
    }
  }
  for (const std::int64_t count : taken) ASSERT_EQ(count, std::min(capacity, s.rows()));
  expect_same_on_threads(chosen,
                         [&](Stream& stream) { return chosen_by_experts(stream, s, capacity); });
}

TEST(SelectByExperts, EveryExpertTakesItsCapacity) {
  std::uint64_t seed = 0;
  for (const std::int64_t tokens : kTokens) {
    for (const std::int64_t experts : kExperts) {
      for (const std::int64_t capacity :
           {std::int64_t{1}, std::int64_t{5}, tokens + 1 - tokens / 2, tokens + 3}) {
        // Distinct scores every third time, else ties and -0; then both signs; then all equal.
        expect_expert_choice(tied_scores(tokens, experts, ++seed), capacity);
        expect_expert_choice(normals(tokens, experts, seed), capacity);
        expect_expert_choice(as<float>(normals(tokens, experts, seed), 2), capacity);
        expect_expert_choice(filled<double>(tokens, experts, 0.125), capacity);
      }
    }
  }
}

TEST(SelectByExperts, TakesNumbersBeforeWhatIsNone) {
  Stream stream(1);
  Matrix<float> s = filled<float>(5, 1, std::numeric_limits<float>::quiet_NaN());
  s.at(3, 0) = -1;
  const auto chosen = choices(chosen_by_experts(stream, s, 2));
  EXPECT_EQ(chosen, (reference::Choices{{0}, {-1}, {-1}, {0}, {-1}}));
}

// ---- causal ----------------------------------------------------------------------------------

TEST(SelectAbove, ListsPositiveLogitsAscending) {
  for (const std::int64_t tokens : kTokens) {
    for (const std::int64_t experts : kExperts) {
      Matrix<float> p = as<float>(normals(tokens, experts, 9), 2);
      for (std::int64_t t = 0; t < tokens; t += 3) p.at(t, 0) = t % 2 == 0 ? 0.0F : -0.0F;
      const auto run = [&](Stream& stream) {
        Ints topk_idx(tokens, experts, 1);
        select_above(stream, {.topk_idx = topk_idx, .p = p});
        return topk_idx;
      };
      Stream one(1);
      const Ints chosen = run(one);
      for (std::int64_t t = 0; t < tokens; ++t) {
        std::vector<int> expected;
        for (std::int64_t e = 0; e < experts; ++e) {
          if (p.at(t, e) > 0) expected.push_back(static_cast<int>(e));
        }
        expected.resize(static_cast<std::size_t>(experts), -1);
        ASSERT_EQ(choices(chosen)[static_cast<std::size_t>(t)], expected);
      }
      expect_same_on_threads(chosen, run);
    }
  }
}

}  // namespace
}  // namespace arcus
