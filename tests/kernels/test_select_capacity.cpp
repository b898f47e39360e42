#include "tests/kernels/gate_support.hpp"

namespace arcus {
namespace {

using namespace test;  // NOLINT(google-build-using-namespace)

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
    Ints wanted = select(stream, s, none, {.topk = topk});
    for (std::int64_t t = 0; t < tokens; ++t) {
      const std::int64_t what = draw(seed, static_cast<std::uint64_t>(100 + t), 8);
      for (std::int64_t j = 0; j < topk; ++j) {
        if (what == 0) wanted.at(t, j) = -1;           // a padding token
        if (what < 3 && j == 1) wanted.at(t, j) = -1;  // a second choice that is not asked for
      }
    }
    const Capacity r = apply(stream, wanted, s, capacity, policy);
    const auto expected =
        reference::kept_choices(choices(wanted), table(s), capacity, policy == DropPolicy::probs);
    ASSERT_EQ(choices(r.expert_of_slot), expected) << "seed " << seed;
    for (std::int64_t e = 0; e < experts; ++e) {
      std::int64_t demand = 0;
      for (const auto& row : choices(wanted)) demand += std::count(row.begin(), row.end(), e);
      EXPECT_EQ(r.demand.at(0, e), demand);
    }
  }
}

}  // namespace
}  // namespace arcus
