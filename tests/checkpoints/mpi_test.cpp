#include "tests/support/mpi_test.hpp"
#include "tests/checkpoints/fixture.hpp"

namespace arcus::test {
namespace {

TEST(CheckpointMpi, ProcessesSaveAndLoad) {
  const auto communicator = test_session().world();
  Communicator& world = *communicator;
  Stream stream(1);
  TemporaryFolder mine;
  const std::filesystem::path run = broadcast_text(world, stream, mine.path().string());
  RankState state(tensor_cases(), world.rank(), world.size(), 3);
  state.fill(7);
  const auto digest = state_digest(world, stream, state.views());
  const SaveReport report = save_checkpoint(world, stream, run, info_at(7), state.views());
  EXPECT_EQ(report.digest, digest);
  RankState other(tensor_cases(), world.rank(), world.size(), 4);
  other.clear();
  const auto resumed = resume_checkpoint(world, stream, run, "auto", other.views());
  EXPECT_TRUE(resumed.has_value());
  EXPECT_EQ(other.differences(7), std::vector<std::string>{});
  world.barrier(stream);  // rank 0's folder goes with the test
}

}  // namespace
}  // namespace arcus::test
