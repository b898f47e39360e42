// The layout law over processes: a run on this job's ranks, at every EP size that divides them, has
// the bits of a run on one rank, which every rank computes for itself.

#include <gtest/gtest.h>

#include "tests/support/mpi_test.hpp"
#include "tests/support/training_fixture.hpp"

namespace arcus::testing {
namespace {

constexpr std::int64_t kSteps = 20;

class LayoutMpi : public ::testing::TestWithParam<double> {};

TEST_P(LayoutMpi, SameBitsAsOneRank) {
  const auto communicator = test_session().world();
  Communicator& world = *communicator;
  const TemporaryFolder folder("arcus_layout_mpi");
  const TokenDataset dataset = small_dataset(folder.path());
  TrainerOptions options = small_training();
  options.routing.capacity_factor = GetParam();
  auto self = make_self_communicator();
  const auto reference = trace_of_run(*self, 1, options, dataset, kSteps);
  for (int ep = 1; ep <= world.size(); ++ep) {
    if (world.size() % ep != 0) continue;
    EXPECT_EQ(trace_of_run(world, ep, options, dataset, kSteps), reference)
        << world.size() << " processes, EP " << ep;
  }
}

INSTANTIATE_TEST_SUITE_P(CapacityFactors, LayoutMpi, ::testing::Values(0.0, 1.0));

}  // namespace
}  // namespace arcus::testing
