#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>

#include "tests/launch/shell.hpp"

namespace {

using arcus::contains;
using Result = arcus::ShellResult;

/// Runs the binary with `arguments`.
Result run_arcus(const std::string& arguments) {
  return arcus::shell(std::string(ARCUS_BINARY) + " " + arguments);
}

TEST(CommandLine, AloneItPrintsTheHelp) {
  const Result alone = run_arcus("");
  EXPECT_EQ(alone.code, 0);
  EXPECT_EQ(alone.out, run_arcus("--help").out);
  EXPECT_EQ(alone.out, run_arcus("help").out);
  EXPECT_TRUE(contains(alone.out, "A first run:")) << alone.out;
}

TEST(CommandLine, EveryCommandExplainsItselfWithExamples) {
  const std::string help = run_arcus("--help").out;
  for (const std::string command : {ARCUS_COMMANDS}) {
    EXPECT_TRUE(contains(help, "\n  " + command)) << command << " is missing in\n" << help;
    const Result own = run_arcus(command + " --help");
    EXPECT_EQ(own.code, 0) << command;
    EXPECT_TRUE(contains(own.out, "Example")) << own.out;
    EXPECT_TRUE(contains(own.out, "arcus " + command)) << own.out;
    EXPECT_EQ(own.out, run_arcus("help " + command).out);
    for (std::size_t begin = 0; begin < own.out.size();) {
      const std::size_t end = std::min(own.out.find('\n', begin), own.out.size());
      EXPECT_LE(end - begin, 140U) << own.out.substr(begin, end - begin);
      begin = end + 1;
    }
  }
}

TEST(CommandLine, VersionNamesCommitAndLibraries) {
  const Result version = run_arcus("--version");
  EXPECT_EQ(version.code, 0);
  for (const char* part : {"arcus 0.", "commit ", "-march=", "running on", "oneDNN", "HDF5"}) {
    EXPECT_TRUE(contains(version.out, part)) << version.out;
  }
}

TEST(CommandLine, HelpOnConfigurationAndExitCodes) {
  const Result config = run_arcus("help config");
  EXPECT_EQ(config.code, 0);
  EXPECT_TRUE(contains(config.out, "[train]")) << config.out;
  const Result codes = run_arcus("help exit-codes");
  EXPECT_EQ(codes.code, 0);
  for (const char* code : {"64", "65", "66", "69", "70", "75"}) {
    EXPECT_TRUE(contains(codes.out, code)) << codes.out;
  }
  const Result unknown = run_arcus("help cooking");
  EXPECT_EQ(unknown.code, 64);
  EXPECT_TRUE(contains(unknown.out, "arcus: error: no help on \"cooking\"")) << unknown.out;
}

struct Usage {
  const char* arguments;
  const char* expected;
};

TEST(CommandLine, MistakesAreUsageErrorsThatNameTheRemedy) {
  const std::array mistakes = {
      Usage{"inspct x", "arcus: error: unknown command \"inspct\"; did you mean `arcus inspect`?"},
      Usage{"prepare", "--out is required; `arcus prepare --help` shows what it takes"},
      Usage{"prepare --out x --domain c=/etc/passwd --wrong", "--wrong"},
      Usage{"prepare --out /tmp/arcus-never --domain c=/etc/passwd --split-bytes c=few",
            "--split-bytes few: give a number of bytes"},
      Usage{"prepare --out /tmp/arcus-never --domain c=/etc/passwd --separator zh=%",
            "there is no --domain zh="},
      Usage{"generate x --temperature nan", "nan must be a number of at least 0"},
      Usage{"generate x --top-p 1.5", "1.5 must be a number above 0, at most 1"},
      Usage{"generate x --max-tokens 99999999999999999999", "must be a whole number from 1 to"},
      Usage{"generate x --seed -3", "-3 must be a whole number of at least 0"},
      Usage{"train x --plan --ranks 2.5", "2.5 must be a whole number from 1 to"},
      Usage{"inspect /etc/passwd", "/etc/passwd is no part of a checkpoint or a data set"},
      Usage{"inspect /no/such/folder", "/no/such/folder does not exist"},
      Usage{"--no-such-flag", "arcus: error: "},
  };
  for (const Usage& mistake : mistakes) {
    const Result result = run_arcus(mistake.arguments);
    EXPECT_EQ(result.code, 64) << mistake.arguments << "\n" << result.out;
    EXPECT_TRUE(contains(result.out, mistake.expected)) << result.out;
  }
}

class PreparedData : public testing::Test {
 protected:
  void SetUp() override {
    folder_ =
        std::filesystem::temp_directory_path() / ("arcus_command_line_" + std::to_string(getpid()));
    std::filesystem::create_directories(folder_ / "text");
    for (int i = 0; i < 40; ++i) {
      std::ofstream file(folder_ / "text" / (std::to_string(i) + ".txt"));
      for (int line = 0; line < 20; ++line) file << "document " << i << " line " << line << "\n";
    }
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::filesystem::path folder_;
};

/// Largest resident memory, in MiB, of a process that prepares `megabytes` of text.
double memory_of_preparing(const std::filesystem::path& folder, int megabytes) {
  const std::string text = folder / "large.txt";
  {
    std::ofstream file(text);
    std::string block;
    for (std::int64_t i = 0; block.size() < (1U << 20); ++i)
      block += "line " + std::to_string(i * i) + "\n";
    // Documents differ, or they would be left out as repetitions.
    for (int i = 0; i < megabytes; ++i) file << "document " << i << "\n" << block << "%\n";
  }
  const std::string out = folder / ("large" + std::to_string(megabytes));
  const std::string domain = "l=" + text;
  const pid_t child = fork();
  if (child == 0) {
    std::freopen("/dev/null", "w", stderr);
    std::freopen("/dev/null", "w", stdout);
    // The address sanitizer holds freed memory back, which is no growth of the program's own.
    setenv("ASAN_OPTIONS", "quarantine_size_mb=1:thread_local_quarantine_size_kb=64", 1);
    execl(ARCUS_BINARY, ARCUS_BINARY, "prepare", "--out", out.c_str(), "--domain", domain.c_str(),
          "--separator", "%", static_cast<char*>(nullptr));
    _exit(127);
  }
  int status = 0;
  rusage usage{};
  EXPECT_EQ(wait4(child, &status, 0, &usage), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  return static_cast<double>(usage.ru_maxrss) / 1024;
}

TEST_F(PreparedData, MemoryDoesNotGrowWithTheCorpus) {
  const double small = memory_of_preparing(folder_, 24);
  const double large = memory_of_preparing(folder_, 144);
  EXPECT_LT(large, small + 24) << "MiB for 144 MB of text, " << small << " for 24 MB";
}

TEST_F(PreparedData, PrepareThenInspect) {
  const std::string out = (folder_ / "data").string();
  const std::string prepare = "prepare --out " + out +
                              " --valid-fraction 0.2 --domain words=" + (folder_ / "text").string();
  const Result prepared = run_arcus(prepare);
  ASSERT_EQ(prepared.code, 0) << prepared.out;
  EXPECT_TRUE(contains(prepared.out, "words")) << prepared.out;
  EXPECT_TRUE(contains(prepared.out, "vocabulary 256, written to " + out)) << prepared.out;

  const Result shown = run_arcus("inspect --verify " + out);
  EXPECT_EQ(shown.code, 0);
  EXPECT_TRUE(contains(shown.out, "all files are whole")) << shown.out;
  const Result json = run_arcus("inspect --json " + out);
  EXPECT_TRUE(contains(json.out, "\"vocab_size\": 256")) << json.out;
  EXPECT_EQ(run_arcus("inspect --digest " + out).out.size(), 17U);
  EXPECT_EQ(run_arcus("inspect --config " + out).code, 64);

  const Result text = run_arcus("inspect --held-out words " + out);
  EXPECT_EQ(text.code, 0);
  EXPECT_TRUE(text.out.starts_with("document ")) << text.out;
  EXPECT_EQ(run_arcus("inspect --held-out verbs " + out).code, 64);

  const Result again = run_arcus(prepare);
  EXPECT_NE(again.code, 0) << "an existing data set must not be replaced without --force";
  EXPECT_EQ(run_arcus(prepare + " --force").code, 0);
}

TEST_F(PreparedData, BadTextIsADataError) {
  std::ofstream(folder_ / "text" / "binary.txt", std::ios::binary) << std::string("a\0\xff b", 5);
  const Result refused = run_arcus("prepare --out " + (folder_ / "data").string() +
                                   " --domain w=" + (folder_ / "text").string());
  EXPECT_EQ(refused.code, 65) << refused.out;
  EXPECT_TRUE(contains(refused.out, "binary.txt")) << refused.out;
  EXPECT_FALSE(std::filesystem::exists(folder_ / "data"));
}

}  // namespace
