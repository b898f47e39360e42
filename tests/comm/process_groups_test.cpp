#include "comm/process_groups.hpp"

#include <gtest/gtest.h>

#include "comm/backends.hpp"

namespace arcus {
namespace {

TEST(ExpertPartition, CoversEveryExpertOnceInEvenBlocks) {
  for (std::int64_t experts = 1; experts <= 20; ++experts) {
    for (int ranks = 1; ranks <= 9; ++ranks) {
      const ExpertPartition partition(experts, ranks);
      EXPECT_EQ(partition.begin(0), 0);
      EXPECT_EQ(partition.begin(ranks), experts);
      for (int r = 0; r < ranks; ++r) {
        EXPECT_GE(partition.count(r), experts / ranks);
        EXPECT_LE(partition.count(r), (experts + ranks - 1) / ranks);
      }
    }
  }
}

TEST(EpSize, AutoIsTheLargestDivisorThatFits) {
  EXPECT_EQ(resolve_ep_size(0, 1, 8), 1);
  EXPECT_EQ(resolve_ep_size(0, 8, 8), 8);
  EXPECT_EQ(resolve_ep_size(0, 12, 8), 6);
  EXPECT_EQ(resolve_ep_size(0, 7, 5), 1);
  EXPECT_EQ(resolve_ep_size(0, 16, 3), 2);
  EXPECT_EQ(resolve_ep_size(2, 4, 8), 2);
}

TEST(EpSize, RefusesWithARemedy) {
  const auto message = [](std::int64_t ep_size, int ranks, std::int64_t experts) {
    try {
      resolve_ep_size(ep_size, ranks, experts);
      return std::string("none");
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::usage);
      return std::string(error.what());
    }
  };
  EXPECT_EQ(message(3, 4, 8),
            "parallel.ep_size (3) must divide the number of ranks (4); set it to 4 or \"auto\"");
  EXPECT_EQ(message(4, 4, 3),
            "parallel.ep_size (4) must not exceed model.num_experts (3); set it to 2 or \"auto\"");
  EXPECT_NE(message(-1, 4, 3), "none");
}

TEST(ProcessGroups, EpRanksAreConsecutive) {
  run_on_threads(6, {}, [](Communicator& world) {
    const auto groups = make_process_groups(world, 3);
    EXPECT_EQ(groups.world, &world);
    EXPECT_EQ(groups.ep->size(), 3);
    EXPECT_EQ(groups.ep->rank(), world.rank() % 3);
    EXPECT_EQ(groups.edp->size(), 2);
    EXPECT_EQ(groups.edp->rank(), world.rank() / 3);
    Stream stream(1);
    std::int64_t sum = world.rank();
    stream.wait(groups.edp->all_reduce(stream, {TensorView(&sum, DType::i64, 1, 1)}));
    EXPECT_EQ(sum, 2 * (world.rank() % 3) + 3);
  });
}

}  // namespace
}  // namespace arcus
