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
    return memory_fit(options_, plan(options_), 1, available);
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
        fmt::format("\n  {:<54} {:>12} {:>12}", settings, bytes_text(leaner.even_bytes()),
                    bytes_text(leaner.worst_bytes()));
    EXPECT_NE(tight.text.find(row), std::string::npos) << row << tight.text;
  }
  EXPECT_NE(tight.text.find("what would fit"), std::string::npos) << tight.text;
  EXPECT_NE(tight.text.find(bytes_text(own.worst_bytes())), std::string::npos) << tight.text;
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
