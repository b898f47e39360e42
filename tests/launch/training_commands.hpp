#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

#include "tests/launch/shell.hpp"

namespace arcus::testing_commands {

namespace fs = std::filesystem;

inline std::string read_file(const fs::path& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

/// metrics.jsonl without what may differ between layouts.
inline std::string metrics_without_timing(const fs::path& run) {
  std::stringstream lines(read_file(run / "metrics.jsonl"));
  std::string kept;
  for (std::string line; std::getline(lines, line);) {
    kept += line.substr(0, line.find(",\"timing\"")) + "\n";
  }
  return kept;
}

/// The metrics of two runs are the same but for the timing.
inline void expect_same_metrics(const fs::path& run, const fs::path& other) {
  std::stringstream ours(metrics_without_timing(run));
  std::stringstream theirs(metrics_without_timing(other));
  for (std::string a, b;;) {
    const bool more = static_cast<bool>(std::getline(ours, a));
    ASSERT_EQ(more, static_cast<bool>(std::getline(theirs, b))) << "one has more lines: " << a << b;
    if (!more) return;
    ASSERT_EQ(a, b);
  }
}

/// A small data set, and commands as a user types them.
class TrainingCommands : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = fs::temp_directory_path() / ("arcus_training_commands_" + std::to_string(getpid()));
    fs::create_directories(folder_ / "text");
    for (int i = 0; i < 60; ++i) {
      std::ofstream file(folder_ / "text" / (std::to_string(i) + ".txt"));
      for (int line = 0; line < 10; ++line) file << "file " << i << ", line " << line << "\n";
    }
    const ShellResult prepared =
        shell(std::string(ARCUS_BINARY) + " prepare --out " + data() +
              " --valid-fraction 0.1 --domain words=" + (folder_ / "text").string());
    ASSERT_EQ(prepared.code, 0) << prepared.out;
  }
  static void TearDownTestSuite() { fs::remove_all(folder_); }

  static std::string data() { return (folder_ / "data").string(); }
  static fs::path run_dir(const std::string& name) { return folder_ / name; }

  /// `ranks` 0: without a launcher.
  static ShellResult arcus(int ranks, const std::string& arguments) {
    const std::string launcher =
        ranks == 0 ? "" : std::string(ARCUS_MPIRUN) + " -np " + std::to_string(ranks) + " ";
    return shell(launcher + ARCUS_BINARY + " " + arguments);
  }
  static std::string train(const std::string& run, const std::string& more = "") {
    return "train " ARCUS_SOURCE_DIR "/launch/configs/tiny.toml --set run.dir=" +
           run_dir(run).string() + " --set run.data=" + data() + " " + more;
  }
  static std::string digest(const std::string& run) {
    return arcus(0, "inspect --digest " + run_dir(run).string()).out;
  }

  static inline fs::path folder_;
};

}  // namespace arcus::testing_commands
