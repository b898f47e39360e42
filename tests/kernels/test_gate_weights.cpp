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
      const auto at = static_cast<std::size_t>(t);
      const auto expected =
          reference::combine_weights(table(r.s)[at], choices(g.topk_idx)[at], choices(g.kept)[at],
                                     o.renormalize, o.renormalize_after_drop, o.scale);
      for (std::int64_t j = 0; j < 3; ++j) {
        EXPECT_NEAR(w.at(t, j), expected[static_cast<std::size_t>(j)], 1e-14) << name_of_options(o);
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

}  // namespace
}  // namespace arcus
