#include "tests/kernels/gate_support.hpp"

namespace arcus {
namespace {

using namespace test;  // NOLINT(google-build-using-namespace)

TEST(GateBackward, MatchesDifferences) {
  Stream stream(1);
  const std::int64_t tokens = 7;  // groups of 3: the last one is short
  for (const Options& o : all_options(tokens)) {
    for (const std::int64_t topk : {2, 5}) {
      Gate g(stream, tokens, 5, topk, o);
      if (o.capacity > 0) {
        // Drops must be among the cases, and a token that keeps only part of its experts.
        ASSERT_LT(*std::min_element(&g.kept.at(0, 0), &g.kept.at(tokens - 1, topk - 1) + 1), 0);
      }
      const auto r = scores<double>(stream, g.z, o.score);
      const Doubles fraction = statistics(stream, r, topk, o.tokens_per_group).fraction;
      const Doubles dz =
          widened(backward<double>(stream, g.z, r, g.topk_idx, g.kept, g.dweight, fraction, o));
      const auto loss = [&] {
        const auto now = scores<double>(stream, g.z, o.score);
        const Statistics losses = statistics(stream, now, topk, o.tokens_per_group);
        return inner(widened(weights<double>(stream, now.s, g.topk_idx, g.kept, o)), g.dweight) +
               o.aux_coeff * losses.aux + o.z_coeff * losses.z_loss;
      };
      expect_gradient(g.z, dz, loss, name_of_options(o));
    }
  }
}

TEST(GateBackward, TakesTheFractionFromElsewhere) {
  // Scope global: f is a constant from the previous step.
  Stream stream(1);
  const std::int64_t tokens = 6, experts = 4;
  for (const Score score : {Score::softmax, Score::sigmoid}) {
    const Options o{.score = score, .aux_coeff = 0.9, .tokens_per_group = tokens};
    Gate g(stream, tokens, experts, 2, o);
    Doubles fraction(1, experts);
    for (std::int64_t e = 0; e < experts; ++e) {
      fraction.at(0, e) = 0.1 + 0.1 * static_cast<double>(e);
    }
    const auto r = scores<double>(stream, g.z, score);
    const Doubles dz = widened(backward<double>(stream, g.z, r, g.topk_idx, g.kept,
                                                filled<double>(tokens, 2, 0), fraction, o));
    const auto loss = [&] {
      const auto now = scores<double>(stream, g.z, score);
      double aux = 0;
      for (std::int64_t t = 0; t < tokens; ++t) {
        double sum = 0, product = 0;
        for (std::int64_t e = 0; e < experts; ++e) {
          sum += now.s.at(t, e);
          product += fraction.at(0, e) * now.s.at(t, e);
        }
        aux += product / sum * static_cast<double>(experts) / static_cast<double>(tokens);
      }
      return 0.9 * aux;
    };
    expect_gradient(g.z, dz, loss, "global fraction");
  }
}

TEST(GateBackward, DroppedExpertsIgnoreTheirGradient) {
  Stream stream(1);
  const Options o{.renormalize = true, .tokens_per_group = 7, .capacity = 3};
  Gate g(stream, 7, 5, 2, o);
  const auto r = scores<double>(stream, g.z, o.score);
  const Doubles fraction = filled<double>(1, 5, 0);  // no aux loss here
  const Doubles before =
      widened(backward<double>(stream, g.z, r, g.topk_idx, g.kept, g.dweight, fraction, o));
  for (std::int64_t t = 0; t < 7; ++t) {
    for (std::int64_t j = 0; j < 2; ++j) {
      if (g.kept.at(t, j) < 0) g.dweight.at(t, j) = std::numeric_limits<double>::quiet_NaN();
    }
  }
  const Doubles after =
      widened(backward<double>(stream, g.z, r, g.topk_idx, g.kept, g.dweight, fraction, o));
  EXPECT_TRUE(after.same_bits(before));
}

TEST(Gate, FloatMatchesDoubleOnAnyThreads) {
  Stream one(1);
  Stream three(3);
  const std::int64_t tokens = 90, experts = 40, topk = 6;
  for (const Options& o : all_options(tokens)) {
    const Gate g(one, tokens, experts, topk, o);
    const auto exact = scores<double>(one, g.z, o.score);
    const Statistics exact_stats = statistics(one, exact, topk, o.tokens_per_group);
    const Doubles exact_dz = widened(
        backward<double>(one, g.z, exact, g.topk_idx, g.kept, g.dweight, exact_stats.fraction, o));
    const Matrix<float> z = as<float>(g.z);
    const auto run = [&](Stream& stream) {
      const auto r = scores<float>(stream, z, o.score);
      const Statistics stats = statistics(stream, r, topk, o.tokens_per_group);
      EXPECT_NEAR(stats.aux, exact_stats.aux, 1e-6);
      EXPECT_NEAR(stats.z_loss, exact_stats.z_loss, 1e-5);
      EXPECT_NEAR(stats.entropy, exact_stats.entropy, 1e-4);
      return backward<float>(stream, z, r, g.topk_idx, g.kept, as<float>(g.dweight),
                             as<float>(stats.fraction), o);
    };
    const Matrix<float> dz = run(one);
    expect_near(dz, exact_dz, 1e-5, name_of_options(o));
    EXPECT_TRUE(run(three).same_bits(dz));
  }
}

TEST(Gate, ZeroTokens) {
  Stream stream(2);
  const Options o{.aux_coeff = 1, .z_coeff = 1, .tokens_per_group = 0, .capacity = 1};
  const Matrix<float> z(0, 4);
  const auto r = scores<float>(stream, z, Score::softmax);
  const Matrix<float> none;
  const Ints topk_idx = select(stream, r.s, none, {.topk = 2});
  for (const DropPolicy policy : {DropPolicy::position, DropPolicy::probs}) {
    const Capacity c = apply(stream, topk_idx, r.s, 1, policy);
    for (std::int64_t e = 0; e < 4; ++e) EXPECT_EQ(c.demand.at(0, e), 0);
  }
  weights<float>(stream, r.s, topk_idx, topk_idx, o);
  const Statistics stats = statistics(stream, r, 2, 0);
  EXPECT_EQ(stats.aux, 0);
  EXPECT_EQ(stats.z_loss, 0);
  EXPECT_EQ(stats.entropy, 0);
  backward<float>(stream, z, r, topk_idx, topk_idx, Matrix<float>(0, 2), Matrix<float>(0, 4), o);
}

}  // namespace
}  // namespace arcus
