// Runs that may not fit into memory: what is said, and that what is proposed would do.

#include "src/train/memory_fit.hpp"

#include <gtest/gtest.h>

#include "tests/support/training_fixture.hpp"

namespace arcus {
namespace {

class MemoryFitOf : public ::testing::Test {
 protected:
  MemoryFitOf() {
    options_.train.seq_len = 256;
    options_.train.micro_batch_seqs = 8;
    options_.train.global_batch_seqs = 16;
  }
  TrainPlan plan(const TrainerOptions& options) const { return make_plan(options, 1, 1, 0, 1); }
  MemoryFit fit(std::int64_t available) const {
    return memory_fit(options_, plan(options_), 1, 0, available);
  }

  TrainerOptions options_ = testing::small_training();
};

TEST_F(MemoryFitOf, SaysNothingWhereAllFits) {
  const MemoryFit fits = fit(plan(options_).worst_bytes());
  EXPECT_TRUE(fits.fits_even && fits.fits_worst);
  EXPECT_EQ(fits.text, "");
}

TEST_F(MemoryFitOf, NamesSettingsThatFitWithWhatTheyNeed) {
  const TrainPlan own = plan(options_);
  const MemoryFit tight = fit(own.worst_bytes() - 1);
  EXPECT_TRUE(tight.fits_even);
  EXPECT_FALSE(tight.fits_worst);
  TrainerOptions recomputing = options_;
  recomputing.train.recompute = true;
  TrainerOptions smaller = options_;
  smaller.train.micro_batch_seqs = 4;
  for (const auto& [settings, leaner] : {std::pair{"train.recompute = true", plan(recomputing)},
                                         std::pair{"train.micro_batch_seqs = 4", plan(smaller)}}) {
    EXPECT_LT(leaner.worst_bytes(), own.worst_bytes());
    const std::string row =
        fmt::format("\n  {:<66} {:>12} {:>12}", settings, bytes_text(leaner.even_bytes()),
                    bytes_text(leaner.worst_bytes()));
    EXPECT_NE(tight.text.find(row), std::string::npos) << row << tight.text;
  }
  EXPECT_NE(tight.text.find("what would fit"), std::string::npos) << tight.text;
  EXPECT_NE(tight.text.find(bytes_text(own.worst_bytes())), std::string::npos) << tight.text;
}

// What is proposed is what was planned: the configured EP size, and all that a row says.
TEST_F(MemoryFitOf, KeepsToTheConfiguredLayout) {
  options_.model.num_experts = 64;
  const TrainPlan own = plan(options_);
  for (const int ep_size : {0, 1}) {
    const MemoryFit tight = memory_fit(options_, own, 1, ep_size, own.worst_bytes() - 1);
    const TrainPlan twice = make_plan(options_, 2, 1, ep_size, 1);
    const std::string row =
        fmt::format("\n  {:<66} {:>12} {:>12}", "2 ranks, on 2 times as many nodes",
                    bytes_text(twice.even_bytes()), bytes_text(twice.worst_bytes()));
    EXPECT_EQ(tight.text.find(row) != std::string::npos, twice.worst_bytes() < own.worst_bytes())
        << row << tight.text;
    // Of several numbers of ranks that would do the least is named.
    EXPECT_TRUE(ep_size == 0 || tight.text.find("4 ranks") == std::string::npos) << tight.text;
  }
}

TEST_F(MemoryFitOf, BoundsTrainingAndEvaluation) {
  options_.train.micro_batch_seqs = 4;
  for (const double capacity : {0.0, 1.5}) {
    options_.routing.capacity_factor = capacity;
    const TrainPlan own = make_plan(options_, 4, 1, 0, 1);
    const MemoryFit tight = memory_fit(options_, own, 1, 0, own.worst_bytes() - 1);
    const std::string keys = capacity > 0
                                 ? "  routing.eval_capacity_factor = 1.25"
                                 : "routing.capacity_factor = 1.25, routing.eval_capacity_factor";
    EXPECT_NE(tight.text.find(keys), std::string::npos) << tight.text;
  }
}

TEST_F(MemoryFitOf, KnowsWhatNeverFits) {
  EXPECT_FALSE(fit(plan(options_).even_bytes() - 1).fits_even);
  const MemoryFit none = fit(1);
  EXPECT_FALSE(none.fits_even);
  EXPECT_NE(none.text.find("nothing tried fits"), std::string::npos) << none.text;
}

// A capacity is proposed only to routings that take one.
TEST_F(MemoryFitOf, ProposesNothingThatWouldBeRefused) {
  options_.routing.select = "dense";
  options_.model.topk = options_.model.num_experts;
  options_.routing.renormalize = false;
  options_.routing.aux_loss = 0;
  const MemoryFit tight = fit(plan(options_).worst_bytes() - 1);
  EXPECT_NE(tight.text.find("train.recompute"), std::string::npos) << tight.text;
  EXPECT_EQ(tight.text.find("capacity"), std::string::npos) << tight.text;
}

}  // namespace
}  // namespace arcus
