// The first promise as one story: what a run computes depends neither on its ranks nor on how often
// and in what way it was cut short.
#include <vector>

#include "tests/launch/training_commands.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;

class AnyLayout : public testing_commands::TrainingCommands {
 protected:
  /// 60 steps, each long enough to be cut in two.
  static std::string sixty(const std::string& run, const std::string& more = "") {
    return train(run,
                 "--set train.steps=60 --set train.seq_len=64 --set model.hidden_size=64 --set "
                 "checkpoint.every=7 --set eval.every=20 --set run.digest_every=5 " +
                     more);
  }
  /// Starts `ranks` ranks and does `end` (to $job, their launcher) once `steps` steps are on
  /// record.
  static ShellResult cut_short(int ranks, const std::string& run, const std::string& arguments,
                               int steps, const std::string& end) {
    const std::string metrics = (run_dir(run) / "metrics.jsonl").string();
    return shell(std::string(ARCUS_MPIRUN) + " -np " + std::to_string(ranks) + " " + ARCUS_BINARY +
                 " " + arguments + " & job=$!; while ! grep -q '\"step\":" + std::to_string(steps) +
                 ",' " + metrics + " 2>/dev/null; do kill -0 $job || break; sleep 0.01; done; " +
                 end + "; wait $job");
  }
};

TEST_F(AnyLayout, SixtyStepsOnOneRankOrCutInThreeOnFourThreeAndTwo) {
  const ShellResult whole = arcus(1, sixty("whole"));
  ASSERT_EQ(whole.code, 0) << whole.out;

  // Killed while a step computes, all at once, so that nobody can save anything.
  const ShellResult killed =
      cut_short(4, "cut", sixty("cut"), 20, "kill -KILL $job $(pgrep -P $job)");
  EXPECT_EQ(killed.code, 137) << killed.out;
  const ShellResult stopped =
      cut_short(3, "cut", sixty("cut", "--set parallel.threads=2"), 40, "kill -USR1 $job");
  EXPECT_EQ(stopped.code, 75) << stopped.out;
  EXPECT_TRUE(contains(stopped.out, "going on from")) << stopped.out;
  const ShellResult rest = arcus(2, sixty("cut", "--set parallel.ep_size=1"));
  EXPECT_EQ(rest.code, 0) << rest.out;
  EXPECT_TRUE(contains(rest.out, "2 = EP 1 x EDP 2")) << rest.out;
  EXPECT_TRUE(contains(rest.out, "going on from")) << rest.out;

  testing_commands::expect_same_metrics(run_dir("cut"), run_dir("whole"));
  EXPECT_EQ(digest("whole").size(), 17U);
  EXPECT_EQ(digest("cut"), digest("whole"));
  const ShellResult diff =
      arcus(0, "diff " + run_dir("cut").string() + " " + run_dir("whole").string());
  EXPECT_EQ(diff.code, 0) << diff.out;
  EXPECT_TRUE(contains(diff.out, "digests      equal at all 12 common steps, 5 to 60")) << diff.out;

  const auto text = [](int ranks, const std::string& run) {
    return arcus(ranks, "generate " + run_dir(run).string() +
                            " --prompt 'file 1' --max-tokens 40 --seed 3 --raw")
        .out;
  };
  EXPECT_EQ(text(3, "cut"), text(1, "whole"));
  EXPECT_EQ(text(4, "cut"), text(1, "whole"));
}

}  // namespace
}  // namespace arcus
