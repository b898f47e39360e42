// Law: losses, gradient norms, metrics, routing, drops and the digest of the state have the same
// bits at any number of ranks (threads here), EP size and number of threads.

#include <gtest/gtest.h>

#include <cstdlib>
#include <tuple>

#include "tests/support/gpt2_blocks.hpp"
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
    {"gpt2",
     [](TrainerOptions& o) {
       use_gpt2_blocks(o.model, o.train.seq_len);
       o.model.num_shared_experts = 1;
       o.model.first_k_dense = 1;
       o.routing.capacity_factor = 1.0;
     }},
    {"adapters",
     [](TrainerOptions& o) {
       o.model.num_shared_experts = 1;
       o.model.first_k_dense = 1;
       o.routing.capacity_factor = 1.25;
       o.lora = {.rank = 6, .alpha = 9, .match = "_proj"};
       o.groups = {{.part = "router", .lr_scale = 0.5}};
     }},
    {"gpt2_adapters",
     [](TrainerOptions& o) {
       use_gpt2_blocks(o.model, o.train.seq_len);
       o.model.num_shared_experts = 1;
       o.model.first_k_dense = 1;
       o.routing.capacity_factor = 1.0;
       o.lora = {.rank = 5, .alpha = 9, .match = "_proj"};
       o.groups = {{.match = "bias", .lr_scale = 0.5}};
     }},
};

/// ARCUS_LAYOUT=all: 50 steps of every routing and type too (some minutes).
bool thorough() {
  const char* wanted = std::getenv("ARCUS_LAYOUT");
  return wanted != nullptr && std::string(wanted) == "all";
}

#ifdef __SANITIZE_ADDRESS__
constexpr std::int64_t kSteps = 8;  // many times slower
#else
constexpr std::int64_t kSteps = 50;
#endif

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

using VariantAndType = std::tuple<Variant, const char*>;

class Layout : public LayoutTest, public ::testing::WithParamInterface<VariantAndType> {
 protected:
  static TrainerOptions options() {
    TrainerOptions o = small_training();
    o.train.steps = kSteps;
    o.train.dtype = std::get<1>(GetParam());
    std::get<0>(GetParam()).change(o);
    return o;
  }
};

/// Every row of the routing tables.
class RoutingLayout : public LayoutTest, public ::testing::WithParamInterface<RoutingCase> {};

TEST_P(RoutingLayout, SameBitsOnAnyRanksAndEp) {
  const std::int64_t steps = thorough() ? kSteps : 4;
  std::vector<std::pair<int, int>> layouts = {{2, 2}, {3, 3}, {4, 2}};
  if (thorough())
    layouts = {{2, 1}, {2, 2}, {3, 1}, {3, 3}, {4, 1}, {4, 2}, {4, 4}, {6, 3}, {6, 6}};
  const auto dtypes = thorough() ? compute_dtypes() : std::vector<const char*>{"f32"};
  for (const char* dtype : dtypes) {
    TrainerOptions o = small_training();
    o.train.steps = kSteps;
    o.train.dtype = dtype;
    GetParam().apply(o.model, o.routing);
    auto self = make_self_communicator();
    const auto reference = trace_of_run(*self, 1, o, *dataset_, steps);
    EXPECT_EQ(trace_of_run(*self, 1, o, *dataset_, steps, 2), reference) << dtype << ", 2 threads";
    for (const auto& [ranks, ep] : layouts) {
      EXPECT_EQ(on_threads(ranks, ep, o, steps), reference)
          << dtype << ", " << ranks << " ranks, EP " << ep;
    }
    o.train.recompute = true;
    EXPECT_EQ(trace_of_run(*self, 1, o, *dataset_, steps), reference) << dtype << ", recomputed";
  }
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
  for (const int ranks : {2, 3, 4, 6}) {
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

INSTANTIATE_TEST_SUITE_P(Options, Layout,
                         ::testing::Combine(::testing::ValuesIn(kVariants),
                                            ::testing::ValuesIn(compute_dtypes())),
                         [](const auto& chosen) {
                           return std::string(std::get<0>(chosen.param).name) + "_" +
                                  std::get<1>(chosen.param);
                         });

}  // namespace
}  // namespace arcus::testing
