// The layout law over processes: a run on this job's ranks, at every EP size that divides them, has
// the bits of a run on one rank, which every rank computes for itself.

#include <gtest/gtest.h>

#include "tests/support/gpt2_blocks.hpp"
#include "tests/support/mpi_test.hpp"
#include "tests/support/routing_cases.hpp"
#include "tests/support/training_fixture.hpp"

namespace arcus::testing {
namespace {

/// A run on one rank, beside runs of all processes at every EP size.
void expect_bits_of_one_rank(const TrainerOptions& options, std::int64_t steps) {
  const auto communicator = test_session().world();
  Communicator& world = *communicator;
  const TemporaryFolder folder("arcus_layout_mpi");
  const TokenDataset dataset = small_dataset(folder.path());
  auto self = make_self_communicator();
  const auto reference = trace_of_run(*self, 1, options, dataset, steps);
  for (int ep = 1; ep <= world.size(); ++ep) {
    if (world.size() % ep != 0) continue;
    EXPECT_EQ(trace_of_run(world, ep, options, dataset, steps), reference)
        << world.size() << " processes, EP " << ep;
  }
}

class CapacityLayoutMpi : public ::testing::TestWithParam<double> {};

TEST_P(CapacityLayoutMpi, SameBitsAsOneRank) {
  TrainerOptions options = small_training();
  options.routing.capacity_factor = GetParam();
  expect_bits_of_one_rank(options, 20);
}

TEST(LayoutMpi, BlocksLikeGpt2sHaveTheBitsOfOneRank) {
  TrainerOptions options = small_training();
  use_gpt2_blocks(options.model, options.train.seq_len);
  options.model.first_k_dense = 1;
  expect_bits_of_one_rank(options, 10);
  options.lora = {.rank = 3, .match = "_proj"};
  options.groups = {{.match = "experts.*bias"}};
  expect_bits_of_one_rank(options, 5);
}

TEST(LayoutMpi, AdaptersHaveTheBitsOfOneRank) {
  TrainerOptions options = small_training();
  options.lora = {.rank = 4, .match = "_proj"};
  expect_bits_of_one_rank(options, 20);
  // Those of experts alone, so that whole flats are frozen; some ranks hold nothing of them.
  options.lora.match = "experts.(up|down)";
  options.train.recompute = true;
  options.routing.capacity_factor = 1.25;
  options.routing.pad_to_capacity = true;
  expect_bits_of_one_rank(options, 5);
}

/// Every row of the routing tables.
class RoutingLayoutMpi : public ::testing::TestWithParam<RoutingCase> {};

TEST_P(RoutingLayoutMpi, SameBitsAsOneRank) {
  TrainerOptions options = small_training();
  GetParam().apply(options.model, options.routing);
  expect_bits_of_one_rank(options, 2);
}

INSTANTIATE_TEST_SUITE_P(Tables, RoutingLayoutMpi, ::testing::ValuesIn(routing_cases()),
                         [](const auto& param) { return param.param.name; });
INSTANTIATE_TEST_SUITE_P(CapacityFactors, CapacityLayoutMpi, ::testing::Values(0.0, 1.0));

}  // namespace
}  // namespace arcus::testing
