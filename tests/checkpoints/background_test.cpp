#include <sys/resource.h>
#include <sys/wait.h>

#include <csignal>
#include <random>
#include <thread>

#include "checkpoints/saver.hpp"
#include "tests/checkpoints/fixture.hpp"

namespace arcus::test {
namespace {

namespace fs = std::filesystem;

/// What a step loop does: asks whether any rank is still writing, and goes on when none is.
/// Between, the state changes as soon as it may.
std::optional<SaveReport> step(Communicator& world, Stream& stream, CheckpointSaver& saver,
                               RankState& state, std::int64_t content) {
  std::int64_t busy = saver.busy() ? 1 : 0;
  stream.wait(world.all_reduce(stream, {TensorView(&busy, DType::i64, 1, 1), ReduceOp::max}));
  saver.wait_copied();
  state.fill(content);
  return saver.under_way() && busy == 0 ? saver.advance() : std::nullopt;
}

TEST(BackgroundSave, HoldsTheStateOfItsBeginningWhateverChangesMeanwhile) {
  for (const int ranks : {1, 2, 3}) {
    const TemporaryFolder run;
    run_on_threads(ranks, {}, [&](Communicator& world) {
      Stream stream(1);
      RankState state(tensor_cases(), world.rank(), world.size(), 5);
      CheckpointSaver saver(world, stream, run.path());
      std::int64_t content = 0;
      for (const std::int64_t saved : {3, 7}) {
        state.fill(saved);
        const std::uint64_t digest = state_digest(world, stream, state.views());
        saver.start(info_at(saved), state.views(), {}, /*copy=*/true);
        EXPECT_TRUE(saver.under_way());
        std::optional<SaveReport> report;
        while (!report) report = step(world, stream, saver, state, 100 + ++content);
        EXPECT_EQ(report->digest, digest);
        EXPECT_FALSE(saver.under_way());
      }
    });
    for (const std::int64_t saved : {3, 7}) {
      expect_content(run.path() / "checkpoints" / fmt::format("step-{:08}", saved), saved, 2);
    }
    EXPECT_EQ(*find_latest(run.path()), run.path() / "checkpoints" / "step-00000007");
  }
}

TEST(BackgroundSave, IsNoCheckpointBeforeAllHaveWritten) {
  const TemporaryFolder run;
  save_at(run.path(), 1);
  const auto self = make_self_communicator();
  Stream stream(1);
  RankState state(tensor_cases(), 0, 1, 0);
  state.fill(2);
  {
    CheckpointSaver saver(*self, stream, run.path());
    saver.start(info_at(2), state.views(), {}, /*copy=*/true);
    while (saver.busy()) std::this_thread::yield();
    EXPECT_EQ(*find_latest(run.path()), run.path() / "checkpoints" / "step-00000001");
    EXPECT_THROW(saver.start(info_at(3), state.views(), {}, true), Error) << "never piled up";
  }
  // Nobody went on with it: the next save clears it away.
  EXPECT_EQ(names_in(run.path() / "checkpoints"),
            (std::vector<std::string>{"latest", "step-00000001", "step-00000002.tmp"}));
  save_at(run.path(), 4);
  EXPECT_EQ(names_in(run.path() / "checkpoints"),
            (std::vector<std::string>{"latest", "step-00000001", "step-00000004"}));
}

TEST(BackgroundSave, WhatOneThreadMeetsIsThrownOnAllRanks) {
  const TemporaryFolder run;
  save_at(run.path(), 1, 3);
  run_on_threads(3, {}, [&](Communicator& world) {
    Stream stream(1);
    RankState state(tensor_cases(), world.rank(), world.size(), 0);
    state.fill(2);
    CheckpointSaver saver(world, stream, run.path());
    const SaveOptions failing{.on_stage = [&](std::string_view stage) {
      ARCUS_REQUIRE(world.rank() != 1 || stage != "write", ExitCode::checkpoint, "no disk today");
    }};
    saver.start(info_at(2), state.views(), failing, /*copy=*/true);
    EXPECT_CONTAINS(error_of([&] { saver.finish(); }), "rank 1: no disk today");
    EXPECT_FALSE(saver.under_way());
    // The same saver goes on.
    saver.start(info_at(3), state.views(), {}, /*copy=*/true);
    saver.finish();
  });
  EXPECT_EQ(names_in(run.path() / "checkpoints"),
            (std::vector<std::string>{"latest", "step-00000001", "step-00000003"}));
}

TEST(BackgroundSave, TellsThatItGetsOn) {
  const TemporaryFolder run;
  const auto self = make_self_communicator();
  Stream stream(1);
  RankState state(tensor_cases(), 0, 1, 0);
  CheckpointSaver saver(*self, stream, run.path());
  const SaveOptions slow{.on_stage = [](std::string_view stage) {
    if (stage == "write" || stage == "index") {
      std::this_thread::sleep_for(std::chrono::milliseconds(700));
    }
  }};
  saver.start(info_at(1), state.views(), slow, /*copy=*/true);
  int calls = 0;
  saver.finish([&] { ++calls; });
  EXPECT_GE(calls, 1);
  EXPECT_LE(calls, 4) << "a thread that stands still is no progress";
}

/// Saves in the background for ever, with the state changing meanwhile.
void train_and_save(const fs::path& run_dir, std::int64_t first_step) {
  run_on_threads(2, {}, [&](Communicator& world) {
    Stream stream(1);
    RankState state(tensor_cases(), world.rank(), world.size(), 9);
    CheckpointSaver saver(world, stream, run_dir);
    for (std::int64_t next = first_step;; ++next) {
      state.fill(next);
      saver.start(info_at(next), state.views(), {.keep = 2}, /*copy=*/true);
      while (!step(world, stream, saver, state, next + 1000)) {
      }
    }
  });
}

/// Kills at seeded times; ARCUS_KILLS sets how many (CI: a few, the soak: hundreds).
TEST(BackgroundSave, KilledAtAnyTimeLeavesACompleteCheckpoint) {
  const char* wanted = std::getenv("ARCUS_KILLS");
  const int kills = wanted == nullptr ? 12 : std::atoi(wanted);
  const TemporaryFolder run;
  save_at(run.path(), 1, 2);
  std::mt19937 generator(11);
  std::int64_t last = 1;
  for (int round = 0; round < kills; ++round) {
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      try {
        train_and_save(run.path(), last + 1);
      } catch (...) {
      }
      ::_exit(1);
    }
    // Every second time not before a save has ended, however slow this build is.
    const fs::path before = *find_latest(run.path());
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
    while (round % 2 == 1 && *find_latest(run.path()) == before &&
           std::chrono::steady_clock::now() < deadline) {
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
    std::this_thread::sleep_for(std::chrono::microseconds(1000 + generator() % 150'000));
    ::kill(child, SIGKILL);
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFSIGNALED(status)) << "round " << round;
    const fs::path latest = *find_latest(run.path());
    const Checkpoint checkpoint = open_checkpoint(latest);
    verify_checkpoint(checkpoint);
    expect_content(latest, checkpoint.info.step, 3, 2);
    EXPECT_GE(checkpoint.info.step, last);
    last = checkpoint.info.step;
  }
  EXPECT_GT(last, 1) << "no save ended before its kill";
}

}  // namespace
}  // namespace arcus::test
