#include <atomic>

#include "src/base/hdf5.hpp"
#include "tests/checkpoints/fixture.hpp"
#include "tests/support/small_disk.hpp"

namespace arcus::test {
namespace {

namespace fs = std::filesystem;
using testing::FileSizeLimit;
using testing::open_files_in;
using testing::SmallDisk;

/// Saves at three ranks; the messages of the ranks that failed.
std::vector<std::string> try_to_save(const fs::path& run_dir, std::int64_t step) {
  std::vector<std::string> messages(3);
  run_on_threads(3, {}, [&](Communicator& world) {
    Stream stream(1);
    RankState state(tensor_cases(), world.rank(), world.size(), 0);
    state.fill(step);
    try {
      save_checkpoint(world, stream, run_dir, info_at(step), state.views(), {.keep = 1});
    } catch (const Error& error) {
      EXPECT_EQ(static_cast<int>(error.code()), static_cast<int>(ExitCode::checkpoint));
      messages[static_cast<std::size_t>(world.rank())] = error.what();
    }
  });
  return messages;
}

void expect_failed_together(const std::vector<std::string>& messages, const std::string& reason) {
  for (const std::string& message : messages) {
    EXPECT_EQ(message, messages[0]);
    EXPECT_CONTAINS(message, reason);
    EXPECT_CONTAINS(message, "rank ");
  }
}

TEST(FullDisk, AFileThatCannotGrowFailsOnAllRanksTogether) {
  const TemporaryFolder run;
  const fs::path first = save_at(run.path(), 1, 3).path;
  const auto sizes = [&](const std::string& name) { return fs::file_size(first / name); };
  const auto largest =
      std::max({sizes("rank-00000.h5"), sizes("rank-00001.h5"), sizes("rank-00002.h5")});
  for (const std::uintmax_t limit :
       {std::uintmax_t{0}, std::uintmax_t{1000}, sizes("index.h5") / 2, largest / 2, largest - 1}) {
    std::vector<std::string> messages;
    {
      const FileSizeLimit limited(limit);
      messages = try_to_save(run.path(), 2);
    }
    expect_failed_together(messages, "File too large");
    EXPECT_EQ(names_in(run.path() / "checkpoints"),
              (std::vector<std::string>{"latest", "step-00000001"}))
        << limit;
    EXPECT_EQ(open_files_in(run.path()), 0) << limit;
  }
  expect_content(*find_latest(run.path()), 1, 2);
  {
    const FileSizeLimit limited(largest);
    EXPECT_EQ(try_to_save(run.path(), 2), std::vector<std::string>(3));
  }
  expect_content(*find_latest(run.path()), 2, 2);
}

TEST(FullDisk, TheIndexAloneDoesNotFit) {
  std::vector<TensorCase> cases;
  for (int i = 0; i < 300; ++i) {
    cases.push_back({{"layer." + std::to_string(i), DType::u8, {1, 1}, 1}, false});
  }
  const TemporaryFolder run;
  const FileSizeLimit limited(60'000);  // one rank's third of the tensors fits, the index does not
  std::atomic<int> failed = 0;
  run_on_threads(3, {}, [&](Communicator& world) {
    Stream stream(1);
    RankState state(cases, world.rank(), world.size(), 6);
    const std::string message =
        error_of([&] { save_checkpoint(world, stream, run.path(), info_at(1), state.views()); });
    EXPECT_CONTAINS(message, "rank 0: writing ");
    EXPECT_CONTAINS(message, "index.h5 failed: File too large");
    ++failed;
  });
  EXPECT_EQ(failed, 3);
  EXPECT_EQ(names_in(run.path() / "checkpoints"), std::vector<std::string>{});
}

TEST(FullDisk, NoSpaceLeft) {
  const SmallDisk disk(64 << 20);
  if (!disk.mounted()) GTEST_SKIP() << "mounting a small disk takes more rights";
  const std::int64_t bytes = save_at(disk.path(), 1, 3).bytes;
  std::int64_t step = 1;
  int failures = 0;
  for (const std::int64_t room :
       {std::int64_t{0}, std::int64_t{4096}, std::int64_t{40960}, bytes / 3, bytes - 4096, bytes,
        bytes + 16384, bytes + 49152, bytes + 131072, 2 * bytes}) {
    disk.fill_up_to(room);
    const auto messages = try_to_save(disk.path(), step + 1);
    disk.make_room();
    if (messages[0].empty()) {
      ++step;
    } else {
      ++failures;
      expect_failed_together(messages, "No space left on device");
    }
    expect_content(*find_latest(disk.path()), step, 2);
    EXPECT_EQ(names_in(disk.path() / "checkpoints").size(), 2U) << room;
    EXPECT_EQ(open_files_in(disk.path()), 0) << room;
  }
  EXPECT_GE(failures, 6);
  EXPECT_GE(step, 2);
}

TEST(FullDisk, AFolderThatCannotBeMadeIsNamed) {
  const TemporaryFolder run;
  std::ofstream(run.path() / "checkpoints") << "a file";
  const auto messages = try_to_save(run.path(), 1);
  expect_failed_together(messages, (run.path() / "checkpoints").string());
}

}  // namespace
}  // namespace arcus::test
