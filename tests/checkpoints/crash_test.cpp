#include <sys/wait.h>

#include <chrono>
#include <csignal>
#include <functional>
#include <thread>

#include "tests/checkpoints/fixture.hpp"

namespace arcus::test {
namespace {

namespace fs = std::filesystem;

const std::vector<std::string> kStages = {"collect",   "write",  "report", "index",
                                          "checksums", "rename", "latest", "retire"};

void save_alone(const fs::path& run_dir, std::int64_t step, const SaveOptions& options) {
  const auto world = make_self_communicator();
  Stream stream(1);
  RankState state(tensor_cases(), 0, 1, 0);
  state.fill(step);
  save_checkpoint(*world, stream, run_dir, info_at(step), state.views(), options);
}

/// Runs `body`, which must not return, in a process of its own. `end` waits for the moment to kill
/// it; without one it has to kill itself.
template <class Body>
void run_until_killed(Body&& body, const std::function<void()>& end = nullptr) {
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    try {
      body();
    } catch (...) {
    }
    ::_exit(1);
  }
  if (end) {
    end();
    ::kill(child, SIGKILL);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) << status;
}

/// Step of the latest checkpoint, which must be whole.
std::int64_t latest_step(const fs::path& run_dir) {
  const auto world = make_self_communicator();
  Stream stream(1);
  RankState state(tensor_cases(), 0, 1, 0);
  const auto resumed = resume_checkpoint(*world, stream, run_dir, "auto", state.views());
  if (!resumed) return -1;
  EXPECT_EQ(resumed->path, *find_latest(run_dir)) << "the latest was damaged";
  EXPECT_EQ(state.differences(resumed->info.step), std::vector<std::string>{});
  return resumed->info.step;
}

TEST(Crash, KilledAtAnyStage) {
  for (std::size_t stage = 0; stage < kStages.size(); ++stage) {
    const TemporaryFolder run;
    save_alone(run.path(), 1, {.keep = 1});
    const SaveOptions deadly{.keep = 1, .on_stage = [&](std::string_view name) {
                               if (name == kStages[stage]) ::raise(SIGKILL);
                             }};
    run_until_killed([&] { save_alone(run.path(), 2, deadly); });
    EXPECT_EQ(latest_step(run.path()), kStages[stage] == "retire" ? 2 : 1) << kStages[stage];
    // The next save puts everything right.
    save_alone(run.path(), 3, {.keep = 1});
    EXPECT_EQ(latest_step(run.path()), 3);
    EXPECT_EQ(names_in(run.path() / "checkpoints"),
              (std::vector<std::string>{"latest", "step-00000003"}))
        << kStages[stage];
  }
}

TEST(Crash, KilledWhileReplacingTheOnlyCheckpoint) {
  for (const std::string& stage : kStages) {
    const TemporaryFolder run;
    save_alone(run.path(), 1, {.keep = 1});
    const SaveOptions deadly{.keep = 1, .on_stage = [&](std::string_view name) {
                               if (name == stage) ::raise(SIGKILL);
                             }};
    run_until_killed([&] { save_alone(run.path(), 1, deadly); });
    EXPECT_EQ(latest_step(run.path()), 1) << stage;
  }
}

TEST(Crash, KilledAtAnyTime) {
  const TemporaryFolder run;
  save_alone(run.path(), 1, {.keep = 2});
  std::int64_t step = 1;
  for (int round = 0; round < 16; ++round) {
    const std::int64_t before = step;
    const fs::path latest = *find_latest(run.path());
    const bool wait_for_one = round % 2 == 1;
    run_until_killed(
        [&] {
          for (std::int64_t next = before + 1;; ++next) save_alone(run.path(), next, {.keep = 2});
        },
        [&] {
          const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
          while (wait_for_one && *find_latest(run.path()) == latest &&
                 std::chrono::steady_clock::now() < deadline) {
            std::this_thread::sleep_for(std::chrono::microseconds(100));
          }
          std::this_thread::sleep_for(std::chrono::microseconds(4321 * round));
        });
    step = latest_step(run.path());
    EXPECT_GE(step, before + (wait_for_one ? 1 : 0)) << "round " << round;
  }
}

}  // namespace
}  // namespace arcus::test
