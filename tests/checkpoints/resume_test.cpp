#include <spdlog/sinks/ostream_sink.h>
#include <spdlog/spdlog.h>

#include <sstream>

#include "checkpoints/layout.hpp"
#include "tests/checkpoints/fixture.hpp"

namespace arcus::test {
namespace {

namespace fs = std::filesystem;

/// The log of this process, as text.
class CapturedLog {
 public:
  CapturedLog() : before_(spdlog::default_logger()) {
    spdlog::set_default_logger(std::make_shared<spdlog::logger>(
        "captured", std::make_shared<spdlog::sinks::ostream_sink_mt>(text_)));
  }
  ~CapturedLog() { spdlog::set_default_logger(before_); }
  std::string text() const { return text_.str(); }

 private:
  std::ostringstream text_;
  std::shared_ptr<spdlog::logger> before_;
};

/// The step that three ranks resume from (-1 = none), its content checked.
std::int64_t resumed_step(const fs::path& run_dir, const std::string& spec) {
  std::int64_t step = -1;
  run_on_threads(3, {}, [&](Communicator& world) {
    Stream stream(1);
    RankState state(tensor_cases(), world.rank(), world.size(), 9);
    state.clear();
    const auto resumed = resume_checkpoint(world, stream, run_dir, spec, state.views());
    if (!resumed) return;
    EXPECT_EQ(state.differences(resumed->info.step), std::vector<std::string>{});
    if (world.rank() == 0) step = resumed->info.step;
  });
  return step;
}

void spoil(const fs::path& path, const std::string& tensor) {
  const Checkpoint checkpoint = open_checkpoint(path);
  const StoredRange& range = checkpoint.find(tensor)->ranges.back();
  flip_bit(path / checkpoint.files.at(static_cast<std::size_t>(range.shard) + 1).name, range.offset,
           5);
}

TEST(Resume, NothingToResume) {
  const TemporaryFolder run;
  EXPECT_EQ(resumed_step(run.path(), "auto"), -1);
  EXPECT_EQ(find_latest(run.path()), std::nullopt);
  save_at(run.path(), 1);
  EXPECT_EQ(resumed_step(run.path(), "none"), -1);
}

TEST(Resume, AutoTakesTheLatest) {
  const TemporaryFolder run;
  save_at(run.path(), 1, 2);
  save_at(run.path(), 30, 2);
  save_at(run.path(), 2, 2);  // the run went back to step 1
  EXPECT_EQ(resumed_step(run.path(), "auto"), 2);
  std::ofstream(run.path() / "checkpoints/latest") << "step-00009999\n";
  EXPECT_EQ(resumed_step(run.path(), "auto"), 30);
  fs::remove(run.path() / "checkpoints/latest");
  EXPECT_EQ(resumed_step(run.path(), "auto"), 30);
}

TEST(Resume, APathNamesACheckpointOrARun) {
  const TemporaryFolder run;
  const fs::path first = save_at(run.path(), 1, 2).path;
  save_at(run.path(), 2, 2);
  const TemporaryFolder other;
  EXPECT_EQ(resumed_step(other.path(), first.string()), 1);
  EXPECT_EQ(resumed_step(other.path(), first.string() + "/"), 1);
  EXPECT_EQ(resumed_step(other.path(), run.path().string()), 2);
  EXPECT_EQ(resumed_step(other.path(), (run.path() / "checkpoints/").string()), 2);
  EXPECT_CONTAINS(error_of([&] { resumed_step(run.path(), "/nowhere/at/all"); }), "does not exist");
  EXPECT_CONTAINS(error_of([&] { resumed_step(run.path(), other.path().string()); }),
                  "neither a checkpoint");
}

TEST(Resume, AutoFallsBackWithAWarning) {
  const TemporaryFolder run;
  for (const std::int64_t step : {1, 2, 3, 4}) save_at(run.path(), step, 3, 1);
  const auto paths = list_checkpoints(run.path());
  ASSERT_EQ(paths.size(), 4U);
  spoil(paths[0], "model.norm.weight");
  {
    const CapturedLog log;
    EXPECT_EQ(resumed_step(run.path(), "auto"), 3);
    EXPECT_CONTAINS(log.text(), "step-00000004 is not usable");
    EXPECT_CONTAINS(log.text(), "model.norm.weight is damaged");
  }
  fs::remove(paths[1] / "CHECKSUMS");
  EXPECT_EQ(resumed_step(run.path(), "auto"), 2);
  fs::remove(paths[2] / "rank-00001.h5");
  EXPECT_EQ(resumed_step(run.path(), "auto"), 1);
  fs::resize_file(paths[3] / "index.h5", 1000);
  EXPECT_CONTAINS(error_of([&] { resumed_step(run.path(), "auto"); }), "none of the 4 checkpoints");
}

TEST(Resume, AReplacementThatACrashCutShortIsEnded) {
  const TemporaryFolder run;
  const fs::path path = save_at(run.path(), 1, 2).path;
  const fs::path fresh = path.string() + ".tmp";
  const fs::path old = path.string() + ".old";
  // On a file system without an exchange: killed when the old one had given up its name.
  fs::rename(path, old);
  EXPECT_EQ(resumed_step(run.path(), "auto"), 1);
  EXPECT_FALSE(fs::exists(old));
  // Killed when the new one had taken it.
  fs::copy(path, old, fs::copy_options::recursive);
  EXPECT_EQ(resumed_step(run.path(), "auto"), 1);
  EXPECT_FALSE(fs::exists(old));
  // And whole, then cleared away by the next save.
  fs::copy(path, fresh, fs::copy_options::recursive);
  layout::replace_folder(fresh, path, /*exchange=*/false);
  EXPECT_TRUE(fs::exists(old));
  EXPECT_FALSE(fs::exists(fresh));
  save_at(run.path(), 2, 2);
  EXPECT_FALSE(fs::exists(old));
  EXPECT_EQ(resumed_step(run.path(), path.string()), 1);
}

TEST(Resume, OddThingsInTheFolderAreNamedOrLeftAside) {
  const TemporaryFolder run;
  const fs::path first = save_at(run.path(), 1, 2).path;
  const fs::path second = save_at(run.path(), 2, 2).path;
  // A folder where a shard should be is damage, so the one before serves.
  fs::remove(second / "rank-00001.h5");
  fs::create_directory(second / "rank-00001.h5");
  EXPECT_EQ(resumed_step(run.path(), "auto"), 1);
  fs::remove(run.path() / "checkpoints/latest");
  fs::create_directory(run.path() / "checkpoints/latest");
  EXPECT_EQ(resumed_step(run.path(), "auto"), 1);
  // What cannot be read must not pass for "there are none".
  fs::remove_all(run.path() / "checkpoints");
  std::ofstream(run.path() / "checkpoints") << "a file";
  EXPECT_CONTAINS(error_of([&] { resumed_step(run.path(), "auto"); }), "cannot read");
}

TEST(Resume, DamageToANamedCheckpointIsAnError) {
  const TemporaryFolder run;
  save_at(run.path(), 1, 3);
  const fs::path second = save_at(run.path(), 2, 3).path;
  spoil(second, "m/long.vector");
  EXPECT_CONTAINS(error_of([&] { resumed_step(run.path(), second.string()); }),
                  "m/long.vector is damaged");
}

TEST(Resume, ACheckpointThatDoesNotFitIsNoReasonToGoBack) {
  const TemporaryFolder run;
  save_at(run.path(), 1);
  save_at(run.path(), 2);
  std::vector<TensorCase> cases = tensor_cases();
  cases[6].spec.shape = {65};
  const auto world = make_self_communicator();
  Stream stream(1);
  RankState state(cases, 0, 1, 0);
  EXPECT_CONTAINS(
      error_of([&] { resume_checkpoint(*world, stream, run.path(), "auto", state.views()); }),
      "step-00000002 does not fit this run");
}

}  // namespace
}  // namespace arcus::test
