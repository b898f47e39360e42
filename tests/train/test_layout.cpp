// Law: losses, gradient norms, metrics, routing, drops and the digest of the state have the same
// bits at any number of ranks (threads here), EP size and number of threads.

#include <gtest/gtest.h>

#include "tests/support/routing_cases.hpp"
#include "tests/support/training_fixture.hpp"

namespace arcus::testing {
namespace {

struct Variant {
  const char* name;
  void (*change)(TrainerOptions&);
};
std::ostream& operator<<(std::ostream& out, const Variant& variant) { return out << variant.name; }

const Variant kVariants[] = {
    {"dropless", [](TrainerOptions&) {}},
    {"capacity", [](TrainerOptions& o) { o.routing.capacity_factor = 1.0; }},
    {"probs",
     [](TrainerOptions& o) {
       o.routing.capacity_factor = 0.8;
       o.routing.drop_policy = "probs";
       o.routing.renormalize_after_drop = true;
     }},
    {"shared_recompute",
     [](TrainerOptions& o) {
       o.model.num_shared_experts = 1;
       o.model.shared_expert_gate = true;
       o.model.first_k_dense = 1;
       o.model.qkv_bias = true;
       o.model.tie_embeddings = true;
       o.routing.gate_bias = true;
       o.routing.capacity_factor = 1.25;
       o.train.recompute = true;
     }},
};

constexpr std::int64_t kSteps = 20;

/// Runs of one data set on any layout.
class LayoutTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = std::make_unique<TemporaryFolder>("arcus_layout");
    dataset_ = std::make_unique<TokenDataset>(small_dataset(folder_->path()));
  }
  static void TearDownTestSuite() {
    dataset_.reset();
    folder_.reset();
  }
  std::vector<std::string> on_threads(int ranks, int ep_size, const TrainerOptions& o,
                                      std::int64_t steps = kSteps,
                                      CommunicatorOptions communicator = {}) {
    std::vector<std::string> lines;
    run_on_threads(ranks, communicator, [&](Communicator& world) {
      auto mine = trace_of_run(world, ep_size, o, *dataset_, steps);
      if (world.rank() == 0) lines = std::move(mine);
    });
    return lines;
  }
  static inline std::unique_ptr<TemporaryFolder> folder_;
  static inline std::unique_ptr<TokenDataset> dataset_;
};

class Layout : public LayoutTest, public ::testing::WithParamInterface<Variant> {
 protected:
  static TrainerOptions options() {
    TrainerOptions o = small_training();
    GetParam().change(o);
    return o;
  }
};

/// Every row of the routing tables.
class RoutingLayout : public LayoutTest, public ::testing::WithParamInterface<RoutingCase> {};

TEST_P(RoutingLayout, SameBitsOnAnyRanksAndEp) {
  TrainerOptions o = small_training();
  GetParam().apply(o.model, o.routing);
  constexpr std::int64_t kFew = 4;
  auto self = make_self_communicator();
  const auto reference = trace_of_run(*self, 1, o, *dataset_, kFew);
  EXPECT_EQ(trace_of_run(*self, 1, o, *dataset_, kFew, 2), reference) << "2 threads";
  for (const auto& [ranks, ep] : {std::pair{2, 2}, std::pair{3, 3}, std::pair{4, 2}}) {
    EXPECT_EQ(on_threads(ranks, ep, o, kFew), reference) << ranks << " ranks, EP " << ep;
  }
  o.train.recompute = true;
  EXPECT_EQ(trace_of_run(*self, 1, o, *dataset_, kFew), reference) << "recomputed";
}

INSTANTIATE_TEST_SUITE_P(Tables, RoutingLayout, ::testing::ValuesIn(routing_cases()),
                         [](const auto& param) { return param.param.name; });

TEST_P(Layout, SameBitsOnAnyRanksAndEp) {
  const TrainerOptions o = options();
  auto self = make_self_communicator();
  const auto reference = trace_of_run(*self, 1, o, *dataset_, kSteps);
  ASSERT_EQ(reference.size(), kSteps + 1U);
  EXPECT_NE(reference[0], reference[1]);
  EXPECT_EQ(trace_of_run(*self, 1, o, *dataset_, kSteps, 3), reference) << "3 threads";
  for (const int ranks : {2, 3, 4}) {
    for (int ep = 1; ep <= ranks; ++ep) {
      if (ranks % ep != 0) continue;
      EXPECT_EQ(on_threads(ranks, ep, o), reference) << ranks << " ranks, EP " << ep;
    }
  }
}

TEST_P(Layout, SameBitsOverNodes) {
  const TrainerOptions o = options();
  auto self = make_self_communicator();
  const auto reference = trace_of_run(*self, 1, o, *dataset_, 5);
  for (const int ranks_per_node : {1, 2, 3}) {
    EXPECT_EQ(on_threads(4, 4, o, 5, {.ranks_per_node = ranks_per_node}), reference)
        << ranks_per_node << " ranks a node";
  }
}

TEST_P(Layout, RecomputationChangesNothing) {
  TrainerOptions o = options();
  auto self = make_self_communicator();
  const auto before = trace_of_run(*self, 1, o, *dataset_, 5);
  o.train.recompute = !o.train.recompute;
  EXPECT_EQ(trace_of_run(*self, 1, o, *dataset_, 5), before);
}

INSTANTIATE_TEST_SUITE_P(Options, Layout, ::testing::ValuesIn(kVariants),
                         [](const auto& variant) { return std::string(variant.param.name); });

}  // namespace
}  // namespace arcus::testing
