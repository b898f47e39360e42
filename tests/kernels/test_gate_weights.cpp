#include "tests/kernels/gate_support.hpp"

namespace arcus {
namespace {

using namespace test;  // NOLINT(google-build-using-namespace)

TEST(CombineWeights, MatchTheFormulas) {
  Stream stream(2);
  for (const Options& o : all_options(7)) {
    const Gate g(stream, 7, 6, 3, o);
    const auto r = scores<double>(stream, g.z, o.score);
    const Doubles w = weights<double>(stream, r.s, g.topk_idx, g.kept, o);
    for (std::int64_t t = 0; t < 7; ++t) {
      double sum = 0;
      for (std::int64_t j = 0; j < 3; ++j) {
        const bool counts = !o.renormalize_after_drop || g.kept.at(t, j) >= 0;
        if (counts) sum += r.s.at(t, g.topk_idx.at(t, j));
      }
      for (std::int64_t j = 0; j < 3; ++j) {
        const double s = r.s.at(t, g.topk_idx.at(t, j));
        const double expected = g.kept.at(t, j) < 0 ? 0 : o.scale * (o.renormalize ? s / sum : s);
        EXPECT_NEAR(w.at(t, j), expected, 1e-14) << name_of_options(o);
      }
    }
    EXPECT_TRUE(w.padding_untouched());
    const auto f = weights<float>(stream, as<float>(widened(r.s)), g.topk_idx, g.kept, o);
    expect_near(f, widened(w), 0x1p-21, name_of_options(o));
  }
}

TEST(CombineWeights, TokensWithoutExpertsGetZeros) {
  Stream stream(1);
  const Options o{.renormalize = true, .renormalize_after_drop = true};
  const Matrix<float> s = filled<float>(2, 3, 0.25F);
  Ints chosen = filled<std::int32_t>(2, 2, -1);
  chosen.at(0, 0) = 0;
  chosen.at(0, 1) = 2;
  const Ints kept = filled<std::int32_t>(2, 2, -1);
  const auto w = weights<float>(stream, s, chosen, kept, o);
  for (const std::int64_t t : {0, 1}) {
    for (const std::int64_t j : {0, 1}) EXPECT_EQ(w.at(t, j), 0.0F);
  }
}

TEST(GateStatistics, MatchTheFormulas) {
  Stream stream(1);
  for (const Score score : {Score::softmax, Score::sigmoid}) {
    for (const std::int64_t group : {1, 3, 4, 10}) {
      const std::int64_t tokens = 10, experts = 5, topk = 2;
      const auto r = scores<double>(stream, normals(tokens, experts, 1), score);
      const Statistics out = statistics(stream, r, topk, group);
      const Matrix<float> none;
      const Ints chosen = select(stream, r.s, none, {.topk = topk});
      double aux = 0, squares = 0, entropy = 0;
      for (std::int64_t begin = 0; begin < tokens; begin += group) {
        const std::int64_t end = std::min(tokens, begin + group);
        const auto length = static_cast<double>(end - begin);
        for (std::int64_t e = 0; e < experts; ++e) {
          double count = 0, share = 0;
          for (std::int64_t t = begin; t < end; ++t) {
            double sum = 0;
            for (std::int64_t i = 0; i < experts; ++i) sum += r.s.at(t, i);
            const double p = r.s.at(t, e) / sum;
            share += p;
            entropy -= p * std::log(p);
            for (std::int64_t j = 0; j < topk; ++j) count += chosen.at(t, j) == e ? 1 : 0;
          }
          const double f = count / (static_cast<double>(topk) * length);
          EXPECT_NEAR(out.fraction.at(begin / group, e), f, 1e-15);
          aux += static_cast<double>(experts) * f * (share / length) * length /
                 static_cast<double>(tokens);
        }
      }
      for (std::int64_t t = 0; t < tokens; ++t) squares += r.lse.at(t, 0) * r.lse.at(t, 0);
      EXPECT_NEAR(out.aux, aux, 1e-13);
      EXPECT_NEAR(out.z_loss, squares / static_cast<double>(tokens), 1e-13);
      EXPECT_NEAR(out.entropy, entropy, 1e-12);
    }
  }
}
TEST(GateStatistics, BalanceGivesOneAndLogOfExperts) {
  Stream stream(1);
  Doubles z(4, 4);
  for (std::int64_t t = 0; t < 4; ++t) {
    for (std::int64_t e = 0; e < 4; ++e) z.at(t, e) = e == t ? 1e-9 : 0;
  }
  const Statistics out = statistics(stream, scores<double>(stream, z, Score::softmax), 1, 4);
  EXPECT_NEAR(out.aux, 1, 1e-8);
  EXPECT_NEAR(out.entropy, 4 * std::log(4.0), 1e-8);
}

}  // namespace
}  // namespace arcus
