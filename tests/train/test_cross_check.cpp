// Law: ranks that compute alike confirm each other and the run's bits do not change; a rank whose
// arithmetic or parameters differ is named.

#include <gtest/gtest.h>

#include <mutex>

#include "src/train/cross_check.hpp"
#include "tests/support/training_fixture.hpp"

namespace arcus::testing {
namespace {

class CrossCheckTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = std::make_unique<TemporaryFolder>("arcus_cross_check");
    dataset_ = std::make_unique<TokenDataset>(small_dataset(folder_->path()));
  }
  static void TearDownTestSuite() {
    dataset_.reset();
    folder_.reset();
  }

  /// What the ranks find before their first step when rank `faulty` (-1: none) has another weight
  /// of tensor `name`.
  static CrossCheckResult check(int ranks, int ep_size, int faulty, const std::string& name) {
    CrossCheckResult result;
    std::mutex mutex;
    run_on_threads(ranks, {}, [&](Communicator& world) {
      const TrainerOptions options = small_training();
      TrainingRun run(world, ep_size, options, *dataset_);
      run.trainer().initialize();
      if (world.rank() == faulty) {
        for (const StateView& view : run.instance().parameter_views()) {
          if (view.spec.name == name) static_cast<float*>(view.slices.front().data)[5] += 0.25F;
        }
      }
      CrossCheck cross_check(run.instance(), options);
      const CrossCheckResult mine = cross_check.run(run.sampler(), 0);
      const std::lock_guard lock(mutex);
      if (world.rank() == 0) result = mine;
      EXPECT_EQ(mine.compared, ranks > 1);
    });
    return result;
  }

  static std::unique_ptr<TemporaryFolder> folder_;
  static std::unique_ptr<TokenDataset> dataset_;
};
std::unique_ptr<TemporaryFolder> CrossCheckTest::folder_;
std::unique_ptr<TokenDataset> CrossCheckTest::dataset_;

constexpr const char* kDense = "model.layers.0.self_attn.o_proj.weight";
constexpr const char* kExpert = "model.layers.1.mlp.experts.down_proj.weight";

using Ranks = std::vector<std::int64_t>;

TEST_F(CrossCheckTest, RanksThatComputeAlikeAreNoSuspects) {
  for (const auto& [ranks, ep] :
       {std::pair{1, 1}, {2, 2}, {2, 1}, {3, 3}, {4, 2}, {6, 2}, {6, 6}}) {
    const CrossCheckResult result = check(ranks, ep, -1, kDense);
    EXPECT_EQ(result.suspects, Ranks()) << ranks << " ranks, EP " << ep;
    EXPECT_EQ(result.experts_too, ranks > ep);
  }
}

TEST_F(CrossCheckTest, ARankThatDiffersIsNamed) {
  for (const int faulty : {0, 2}) {
    const CrossCheckResult result = check(3, 3, faulty, kDense);
    EXPECT_EQ(result.suspects, Ranks{faulty});
    EXPECT_TRUE(result.majority);
    EXPECT_NE(to_text(result, 1).find("experts were not cross-checked"), std::string::npos)
        << to_text(result, 1);
  }
  // Two can only disagree.
  const CrossCheckResult two = check(2, 2, 1, kDense);
  EXPECT_EQ(two.suspects, (Ranks{0, 1}));
  EXPECT_FALSE(two.majority);
}

TEST_F(CrossCheckTest, ExpertsAreCheckedWhereAnotherGroupHasThem) {
  EXPECT_EQ(check(3, 3, 1, kExpert).suspects, Ranks()) << "EDP 1: nobody else has them";
  const CrossCheckResult result = check(4, 2, 1, kExpert);
  EXPECT_TRUE(result.experts_too);
  EXPECT_FALSE(result.suspects.empty());
}

TEST_F(CrossCheckTest, NothingOfTheRunChanges) {
  run_on_threads(3, {}, [&](Communicator& world) {
    const TrainerOptions options = small_training();
    std::vector<std::string> checked;
    TrainingRun run(world, 3, options, *dataset_);
    run.trainer().initialize();
    CrossCheck cross_check(run.instance(), options);
    for (std::int64_t step = 0; step < 6; ++step) {
      EXPECT_EQ(cross_check.run(run.sampler(), step).suspects, Ranks());
      run.steps(1, checked);
    }
    checked.push_back(run.digest());
    EXPECT_EQ(checked, trace_of_run(world, 3, options, *dataset_, 6));
  });
}

}  // namespace
}  // namespace arcus::testing
