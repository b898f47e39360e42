// The second promise: whatever befalls a run while it saves, it goes on from a complete checkpoint
// and ends with the bits of an undisturbed one. tests/support/faulty_files.cpp does the befalling.
#include <cstdlib>
#include <random>

#include "tests/launch/training_commands.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;
using testing_commands::read_file;

class Faults : public testing_commands::TrainingCommands {
 protected:
  static constexpr int kSteps = 40;

  /// Saves all the time.
  static std::string saving(const std::string& run, const std::string& more = "") {
    return train(run, "--set train.steps=" + std::to_string(kSteps) +
                          " --set checkpoint.every=2 --set eval.every=10 " + more);
  }
  /// Options of mpirun for ranks that meet `faults` (NAME=VALUE...) in files of that name.
  static std::string meeting(const std::string& faults, const std::string& files) {
    std::string options = " -x LD_PRELOAD=" ARCUS_FAULTY_FILES " -x ARCUS_FAULT_PATH=" + files;
    std::stringstream names(faults);
    for (std::string fault; names >> fault;) options += " -x ARCUS_FAULT_" + fault;
    return options;
  }
  static std::string launch(int ranks, const std::string& options, const std::string& arguments) {
    return std::string(ARCUS_MPIRUN) + options + " -np " + std::to_string(ranks) + " " +
           ARCUS_BINARY + " " + arguments;
  }
  static ShellResult faulty(int ranks, const std::string& faults, const std::string& arguments,
                            const std::string& files = "/checkpoints") {
    return shell(launch(ranks, meeting(faults, files), arguments));
  }
  static void expect_like_undisturbed(const std::string& run) {
    if (!fs::exists(run_dir("undisturbed"))) {
      const ShellResult result = arcus(0, saving("undisturbed"));
      ASSERT_EQ(result.code, 0) << result.out;
    }
    EXPECT_EQ(digest(run), digest("undisturbed"));
    testing_commands::expect_same_metrics(run_dir(run), run_dir("undisturbed"));
  }
  /// Calls that a rank of `ranks` makes in a whole run.
  static int count_calls(int ranks, int rank) {
    const std::string run = "counted" + std::to_string(ranks) + std::to_string(rank);
    const fs::path count = run_dir(run + ".count");
    const ShellResult result =
        faulty(ranks, "RANK=" + std::to_string(rank) + " COUNT=" + count.string(), saving(run));
    EXPECT_EQ(result.code, 0) << result.out;
    return std::atoi(read_file(count).c_str());
  }
};

/// Draws who is killed, and when: at a call that changes a file, or at any time.
class Killer {
 public:
  /// A command that starts the run and kills it, or lets it end where the moment never comes.
  struct Kill {
    bool at_call, all;
    int ranks, rank, call;
    double seconds;
  };
  explicit Killer(std::function<int(int ranks, int rank)> calls) : calls_(std::move(calls)) {}

  Kill draw() {
    Kill kill;
    kill.ranks = 1 + pick(4);
    kill.rank = pick(kill.ranks);
    kill.all = pick(2) == 0;
    kill.at_call = pick(3) != 0;
    kill.call = 1 + pick(most_calls(kill.ranks, kill.rank));
    kill.seconds = 0.05 + 0.001 * pick(600);
    return kill;
  }

 private:
  int pick(int below) {
    return static_cast<int>(generator_() % static_cast<std::uint32_t>(std::max(below, 1)));
  }
  int most_calls(int ranks, int rank) {
    int& known = known_[{ranks, std::min(rank, 1)}];
    if (known == 0) known = calls_(ranks, rank);
    return known;
  }

  std::mt19937 generator_{2026};
  std::function<int(int, int)> calls_;
  std::map<std::pair<int, int>, int> known_;
};

// ARCUS_KILLS=200 test_launch_faults: a soak of some minutes.
TEST_F(Faults, KilledAtAnyMomentOfASaveTheRunEndsWithTheSameBits) {
  const char* wanted = std::getenv("ARCUS_KILLS");
  const int most = wanted == nullptr ? 8 : std::atoi(wanted);
  Killer killer([](int ranks, int rank) { return count_calls(ranks, rank); });
  int kills = 0;
  int at_calls = 0;
  int mid_save = 0;
  int runs = 0;
  while (kills < most && !HasFailure()) {
    const std::string run = "killed" + std::to_string(runs++);
    const fs::path checkpoints = run_dir(run) / "checkpoints";
    for (;;) {
      const Killer::Kill kill = killer.draw();
      const std::string arguments =
          saving(run, kill.rank == 0 ? "" : "--set checkpoint.background=false");
      ShellResult result;
      if (kills >= most) {
        result = arcus(kill.ranks, arguments);
      } else if (kill.at_call) {
        result = faulty(kill.ranks,
                        "RANK=" + std::to_string(kill.rank) + " CALL=" + std::to_string(kill.call) +
                            (kill.all ? " ALL=1" : ""),
                        arguments);
      } else {
        const std::string victim =
            "$(pgrep -P $job" + (kill.all ? std::string(") $job")
                                          : " | sed -n " + std::to_string(kill.rank + 1) + "p)");
        result = shell(launch(kill.ranks, "", arguments) + " & job=$!; sleep " +
                       std::to_string(kill.seconds) + "; kill -KILL " + victim + "; wait $job");
      }
      if (result.code == 0) break;
      ASSERT_EQ(result.code, 137) << result.out;
      ++kills;
      at_calls += kill.at_call ? 1 : 0;
      if (!fs::exists(checkpoints)) continue;
      for (const auto& entry : fs::directory_iterator(checkpoints)) {
        mid_save += entry.path().extension() == ".tmp" ? 1 : 0;
      }
      if (!fs::exists(checkpoints / "latest")) continue;
      const ShellResult sound = arcus(0, "inspect --verify " + run_dir(run).string());
      ASSERT_EQ(sound.code, 0) << sound.out;
    }
    expect_like_undisturbed(run);
  }
  std::cout << kills << " kills (" << at_calls << " at a call, " << mid_save
            << " left half a checkpoint behind) in " << runs << " runs\n";
  EXPECT_GT(mid_save, 0) << "no kill met a save";
}

TEST_F(Faults, SlowWritesLeaveCheckpointsOutAndChangeNothing) {
  const ShellResult slow = faulty(2, "DELAY_US=5000", saving("slow"));
  EXPECT_EQ(slow.code, 0) << slow.out;
  EXPECT_TRUE(contains(slow.out, "is still being written; saves take longer")) << slow.out;
  expect_like_undisturbed("slow");
}

// As a file system that turns read-only, or lets nobody write any more.
TEST_F(Faults, AFolderThatTakesNoMoreFilesCostsNoCheckpointThatWasThere) {
  for (const auto& [number, text] :
       {std::pair{EROFS, "Read-only file system"}, std::pair{EACCES, "Permission denied"}}) {
    const std::string run = "refused" + std::to_string(number);
    const ShellResult result =
        faulty(2, "RANK=0 CALL=300 ERRNO=" + std::to_string(number), saving(run));
    EXPECT_EQ(result.code, 66) << result.out;
    // The last save of a run is told of in other words; on a busy machine it may be the one.
    EXPECT_TRUE(contains(result.out, "was not saved") || contains(result.out, "could not be saved"))
        << result.out;
    EXPECT_TRUE(contains(result.out, text)) << result.out;
    EXPECT_EQ(arcus(0, "inspect --verify " + run_dir(run).string()).code, 0);
    EXPECT_EQ(arcus(3, saving(run)).code, 0);
    expect_like_undisturbed(run);
  }
}

/// A job of three ranks, long enough to be disturbed.
class LostRanks : public Faults {
 protected:
  /// Does `harm` to the job ($job, its launcher) after some steps, and waits for its end.
  /// The last line of the output: seconds from the harm until no rank is left but `$spared`.
  static ShellResult disturb(const std::string& run, const std::string& mpirun_options,
                             const std::string& harm) {
    const std::string metrics = (run_dir(run) / "metrics.jsonl").string();
    return shell(
        launch(3, mpirun_options, train(run, "--set train.steps=1000000")) +
        " & job=$!; while ! grep -q '\"step\":300,' " + metrics +
        " 2>/dev/null; do kill -0 $job || exit 1; sleep 0.01; done; victim=$(pgrep -P $job | "
        "sed -n 2p); others=$(pgrep -P $job | grep -v $victim); begin=$(date +%s%N); " +
        harm +
        "; while kill -0 $others 2>/dev/null; do sleep 0.05; done; echo ended after $(( "
        "($(date +%s%N) - begin) / 1000000 )) ms; wait $job");
  }
  static int milliseconds(const ShellResult& result) {
    const auto at = result.out.find("ended after ");
    return at == std::string::npos ? -1 : std::atoi(result.out.c_str() + at + 12);
  }
  static void expect_named(const ShellResult& result) {
    EXPECT_TRUE(contains(result.out, "error: no rank has moved for ")) << result.out;
    EXPECT_TRUE(contains(result.out, " is lost (silent for ")) << result.out;
    for (const char* part : {"; rank 1 on ", "last seen at step ", ", layer ", ", in "}) {
      EXPECT_TRUE(contains(result.out, part)) << part << "\n" << result.out;
    }
  }
};

TEST_F(LostRanks, AStoppedRankEndsTheJobWithinTenSecondsByName) {
  const ShellResult result = disturb("stopped", "", "kill -STOP $victim");
  EXPECT_EQ(result.code, 69) << result.out;
  expect_named(result);
  EXPECT_LT(milliseconds(result), 10000) << result.out;
  EXPECT_EQ(arcus(0, "inspect --digest " + run_dir("stopped").string()).code, 66)
      << "there was no checkpoint yet, and a broken job must not make one";
}

// A launcher that ends nobody, as srun without -K.
TEST_F(LostRanks, AKilledRankIsNoticedWithoutTheLauncher) {
  const ShellResult result =
      disturb("killed_alone", " --mca orte_enable_recovery 1", "kill -KILL $victim");
  expect_named(result);
  EXPECT_GT(milliseconds(result), 0);
  EXPECT_LT(milliseconds(result), 10000) << result.out;
}

// The rank's process lives and beats, its training thread waits for a file.
TEST_F(LostRanks, ARankThatDoesNotGetOnIsReportedAsSlowAndLaterEndsTheJob) {
  const std::string calls = "RANK=0 CALL=600 DELAY_US=";
  const ShellResult slow =
      faulty(3, calls + "1500000", train("slow", "--set train.steps=601"), "/metrics.jsonl");
  EXPECT_EQ(slow.code, 0) << slow.out;
  EXPECT_TRUE(contains(slow.out, "the others wait for 1.")) << slow.out;
  EXPECT_TRUE(contains(slow.out, "a step takes 0.")) << slow.out;
  EXPECT_TRUE(contains(slow.out, ": rank 0 on ")) << slow.out;
  EXPECT_TRUE(contains(slow.out, " is slow, at step 59")) << slow.out;
  const ShellResult stuck =
      faulty(3, calls + "60000000",
             train("stuck", "--set train.steps=1000 --set run.stuck_after_s=3"), "/metrics.jsonl");
  EXPECT_EQ(stuck.code, 69) << stuck.out;
  EXPECT_TRUE(contains(stuck.out, "; rank 0 on ")) << stuck.out;
  EXPECT_TRUE(contains(stuck.out, " is late, at step ")) << stuck.out;
}

}  // namespace
}  // namespace arcus
