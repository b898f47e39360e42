// The shipped batch script on a real Slurm of four nodes: what jobs do when they are warned,
// stopped, preempted, cancelled, requeued, when ranks and nodes die, as arrays. Whatever happens, a
// run ends with the bits of one that nothing happened to.
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <functional>
#include <map>
#include <regex>
#include <string>
#include <thread>
#include <vector>

#include "tests/launch/training_commands.hpp"

extern char** environ;

namespace arcus {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;
using testing_commands::read_file;
using testing_commands::TrainingCommands;

constexpr const char* kClusterScript = ARCUS_SOURCE_DIR "/tests/slurm/cluster.sh";
constexpr int kUnable = 77;
constexpr int kSteps = 400;

double seconds_since(Clock::time_point then) {
  return std::chrono::duration<double>(Clock::now() - then).count();
}

bool wait_until(const std::function<bool()>& condition, double seconds) {
  for (const auto begin = Clock::now(); seconds_since(begin) < seconds;) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  return condition();
}

int count(const std::string& text, const std::string& part) {
  int times = 0;
  for (std::size_t at = 0; (at = text.find(part, at)) != std::string::npos; at += part.size()) {
    ++times;
  }
  return times;
}

/// The tests themselves may run inside a job of another Slurm.
void forget_outer_job() {
  std::vector<std::string> names;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string text = *entry;
    for (const char* begin : {"SLURM", "SBATCH", "SRUN", "PMI", "OMPI_COMM", "ARCUS"}) {
      if (text.starts_with(begin)) names.push_back(text.substr(0, text.find('=')));
    }
  }
  for (const std::string& name : names) ::unsetenv(name.c_str());
}

/// For a cluster on one machine: root may run MPI, which talks over loopback only.
void set_environment() {
  const std::map<std::string, std::string> values = {
      {"SLURM_CONF", ARCUS_CLUSTER_DIR "/slurm.conf"},
      {"ARCUS", ARCUS_BINARY},
      {"OMP_NUM_THREADS", "1"},
      {"OMPI_ALLOW_RUN_AS_ROOT", "1"},
      {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"},
      {"OMPI_MCA_btl_tcp_if_include", "127.0.0.1/8"},
      {"OMPI_MCA_oob_tcp_if_include", "lo"}};
  for (const auto& [name, value] : values) ::setenv(name.c_str(), value.c_str(), 1);
  // It is the environment file's to set.
  ::unsetenv("OMPI_MCA_mpi_yield_when_idle");
}

ShellResult cluster(const std::string& verb, const std::string& node = "") {
  return shell(std::string(kClusterScript) + " " + verb + " " ARCUS_CLUSTER_DIR " " + node);
}

class SlurmJobs : public TrainingCommands {
 protected:
  static void SetUpTestSuite() {
    forget_outer_job();
    set_environment();
    const ShellResult up = cluster("up");
    if (up.code == kUnable) {
      std::cout << up.out << std::flush;
      std::_Exit(kUnable);
    }
    not_up_ = up.code == 0 ? "" : "no cluster: " + up.out;
    if (up.code == 0) TrainingCommands::SetUpTestSuite();
  }
  static void TearDownTestSuite() {
    if (!not_up_.empty()) return;
    EXPECT_EQ(cluster("down").code, 0);
    TrainingCommands::TearDownTestSuite();
  }
  // What fails in SetUpTestSuite would leave the tests out, as if all were well.
  void SetUp() override { ASSERT_EQ(not_up_, ""); }
  void TearDown() override {
    if (!not_up_.empty()) return;
    if (HasFailure()) {
      for (const fs::path& log : logs_) std::cerr << "--- " << log << "\n" << read_file(log);
      std::cerr << read_file(ARCUS_CLUSTER_DIR "/slurmctld.log");
      // It may have left jobs, dead nodes, settings.
      cluster("up");
      return;
    }
    shell("scancel --user $(id -un)");
    EXPECT_TRUE(wait_until([] { return shell("squeue --noheader").out.empty(); }, 30));
  }

  /// Submits the shipped script for a run; `%a` in the name is an array task's.
  std::string submit(const std::string& options, const std::string& run,
                     const std::string& more = "") {
    const fs::path log = log_of(run);
    logs_.push_back(log);
    const ShellResult submitted =
        shell("cd " ARCUS_SOURCE_DIR " && " + environment_ + " sbatch --parsable --output " +
              log.string() + " " + options + " slurm/train.sbatch " + train_arguments(run, more));
    EXPECT_EQ(submitted.code, 0) << submitted.out;
    return submitted.out.substr(0, submitted.out.find('\n'));
  }
  static std::string train_arguments(const std::string& run, const std::string& more) {
    return train(run, "--set train.steps=" + std::to_string(kSteps) + " " + more)
        .substr(std::string("train ").size());
  }
  static fs::path log_of(const std::string& run) { return folder_ / (run + ".log"); }
  static std::string log(const std::string& run) { return read_file(log_of(run)); }

  /// What `scontrol show job` says, e.g. of "JobState"; empty = nothing.
  static std::string field(const std::string& job, const std::string& name) {
    const std::string text = shell("scontrol --oneliner show job " + job).out;
    std::smatch match;
    return std::regex_search(text, match, std::regex(" " + name + "=(\\S*)")) ? match[1].str() : "";
  }
  static bool ended(const std::string& job) {
    const std::string state = field(job, "JobState");
    return !state.empty() && state != "PENDING" && state != "RUNNING" && state != "COMPLETING" &&
           state != "CONFIGURING";
  }
  /// The state that a job ends in, with its exit code: "COMPLETED 0".
  static std::string end_of(const std::string& job, double seconds = 60) {
    EXPECT_TRUE(wait_until([&] { return ended(job); }, seconds)) << field(job, "JobState");
    const std::string code = field(job, "ExitCode");
    return field(job, "JobState") + " " + code.substr(0, code.find(':'));
  }

  static int last_step(const std::string& run) {
    const std::string metrics = read_file(run_dir(run) / "metrics.jsonl");
    const std::size_t at = metrics.rfind("\"step\":");
    return at == std::string::npos ? 0 : std::atoi(metrics.c_str() + at + 7);
  }
  static void wait_for_step(const std::string& run, int step) {
    ASSERT_TRUE(wait_until([&] { return last_step(run) >= step; }, 60)) << last_step(run);
  }

  /// The digest of a run by one process, to which nothing happened.
  static std::string reference(int seed = 1) {
    const std::string run = "reference-" + std::to_string(seed);
    if (!fs::exists(run_dir(run))) {
      EXPECT_EQ(
          arcus(0, "train " + train_arguments(run, "--set run.seed=" + std::to_string(seed))).code,
          0);
    }
    return digest(run);
  }
  /// Done, in the end, with the same bits, after `restarts` requeues; one log tells of all starts.
  static void expect_completed(const std::string& job, const std::string& run, int restarts) {
    EXPECT_EQ(end_of(job, 90), "COMPLETED 0");
    EXPECT_EQ(field(job, "Restarts"), std::to_string(restarts));
    EXPECT_EQ(count(log(run), "train.sbatch: "), count(log(run), "\ntrain.sbatch: ") + 1);
    for (int start = 0; start <= restarts; ++start) {
      EXPECT_EQ(count(log(run), ", restart " + std::to_string(start) + "\n"), 1);
    }
    EXPECT_EQ(count(log(run), "going on from"), restarts);
    EXPECT_EQ(digest(run), reference());
  }

  std::string environment_;  ///< assignments in front of sbatch
  std::vector<fs::path> logs_;
  static inline std::string not_up_;
};

TEST_F(SlurmJobs, FourNodesTrainAndStatusTells) {
  const std::string job = submit("--nodes=4", "plain");
  wait_for_step("plain", 5);
  const ShellResult during = arcus(0, "status " + run_dir("plain").string());
  EXPECT_TRUE(contains(during.out, "in use by process ")) << during.out;
  EXPECT_TRUE(contains(during.out, " on n1\n")) << during.out;
  EXPECT_TRUE(contains(during.out, " of 400, loss ")) << during.out;
  expect_completed(job, "plain", 0);
  EXPECT_TRUE(contains(log("plain"), "ranks        4 = ")) << log("plain");
  // One line a minute: only the first and the last step are told of.
  EXPECT_EQ(count(log("plain"), "tokens/s"), 2) << log("plain");
  const ShellResult after = arcus(0, "status " + run_dir("plain").string());
  EXPECT_TRUE(contains(after.out, "nobody holds it")) << after.out;
  EXPECT_TRUE(contains(after.out, "step        400 of 400")) << after.out;
}

TEST_F(SlurmJobs, AWarningSavesAndRequeues) {
  const std::string job = submit("--nodes=4", "warned");
  wait_for_step("warned", 20);
  shell("scancel --batch --signal=USR1 " + job);
  expect_completed(job, "warned", 1);
  EXPECT_TRUE(contains(log("warned"), "stopped by USR1, saved at step "));
}

TEST_F(SlurmJobs, TheTimeLimitRequeuesOnceAlsoWhereTheExitCodeDoes) {
  shell("echo RequeueExit=75 >>" ARCUS_CLUSTER_DIR "/slurm.conf && scontrol reconfigure");
  // Slurm looks at limits every half minute.
  const std::string job =
      submit("--nodes=4 --time=1 --signal=B:USR1@59", "limit", "--set train.steps=1000000");
  EXPECT_TRUE(wait_until([&] { return contains(log("limit"), ", restart 1\n"); }, 60));
  EXPECT_EQ(field(job, "Restarts"), "1");
  EXPECT_TRUE(contains(log("limit"), "stopped by USR1, saved at step "));
  shell("scancel " + job);
  EXPECT_EQ(end_of(job).substr(0, 9), "CANCELLED");
  shell("sed -i /RequeueExit/d " ARCUS_CLUSTER_DIR "/slurm.conf && scontrol reconfigure");
}

TEST_F(SlurmJobs, RequeueingByHandSavesToo) {
  const std::string job = submit("--nodes=4", "by-hand");
  wait_for_step("by-hand", 20);
  shell("scontrol requeue " + job);
  expect_completed(job, "by-hand", 1);
  EXPECT_TRUE(contains(log("by-hand"), "stopped by TERM, saved at step "));
}

TEST_F(SlurmJobs, PreemptedJobsComeBack) {
  const std::string job = submit("--nodes=2-4", "preempted");
  wait_for_step("preempted", 20);
  const ShellResult urgent =
      shell("sbatch --parsable --partition=urgent --nodes=1 --output=/dev/null --wrap='sleep 9'");
  ASSERT_EQ(urgent.code, 0) << urgent.out;
  expect_completed(job, "preempted", 1);
  // One node was still taken.
  EXPECT_TRUE(contains(log("preempted"), "ranks        3 = ")) << log("preempted");
}

TEST_F(SlurmJobs, CancellingSavesAndTheNextJobGoesOn) {
  const std::string job = submit("--nodes=4", "cancelled");
  wait_for_step("cancelled", 20);
  shell("scancel " + job);
  EXPECT_EQ(end_of(job), "CANCELLED 75");
  EXPECT_EQ(field(job, "Restarts"), "0");
  EXPECT_TRUE(contains(log("cancelled"), "stopped by TERM, saved at step "));
  const ShellResult whole = arcus(0, "inspect --verify " + run_dir("cancelled").string());
  EXPECT_EQ(whole.code, 0) << whole.out;
  const std::string next = submit("--nodes=2", "cancelled");
  EXPECT_EQ(end_of(next), "COMPLETED 0");
  EXPECT_EQ(digest("cancelled"), reference());
}

TEST_F(SlurmJobs, SurvivorsOfALostRankEndThemselvesAndTheJobComesBack) {
  const std::string job = submit("--nodes=4", "rank", "--set checkpoint.every=10");
  wait_for_step("rank", 20);
  const auto begin = Clock::now();
  cluster("kill-rank", "3");
  EXPECT_TRUE(wait_until([&] { return field(job, "Restarts") == "1"; }, 30));
  // Silence of 5 s, the others' 4 s for the one that reports; srun's --wait is 60 s.
  EXPECT_LT(seconds_since(begin), 15);
  std::cout << "restarting after " << seconds_since(begin) << " s\n";
  EXPECT_TRUE(contains(log("rank"), "rank 2 on n3 is lost")) << log("rank");
  EXPECT_TRUE(contains(log("rank"), "failed with exit code 137; requeueing"));
  expect_completed(job, "rank", 1);
}

TEST_F(SlurmJobs, NodesDieAndTheRunGoesOnWithWhatIsLeft) {
  const std::string job = submit("--nodes=2-4", "nodes", "--set checkpoint.every=10");
  wait_for_step("nodes", 20);
  auto begin = Clock::now();
  cluster("kill-node", "3");
  ASSERT_TRUE(wait_until([&] { return contains(log("nodes"), ", restart 1\n"); }, 90));
  std::cout << "node lost: running again after " << seconds_since(begin) << " s\n";
  wait_for_step("nodes", 80);
  // The one that the batch script runs on.
  begin = Clock::now();
  cluster("kill-node", "1");
  ASSERT_TRUE(wait_until([&] { return contains(log("nodes"), ", restart 2\n"); }, 90));
  std::cout << "batch node lost: running again after " << seconds_since(begin) << " s\n";
  expect_completed(job, "nodes", 2);
  for (const char* ranks : {"ranks        4 = ", "ranks        3 = ", "ranks        2 = "}) {
    EXPECT_EQ(count(log("nodes"), ranks), 1);
  }
  cluster("start-node", "1");
  cluster("start-node", "3");
  EXPECT_TRUE(wait_until(
      [] {
        return count(shell("sinfo --noheader --Node --partition=main --states=idle").out, "main") ==
               4;
      },
      10));
}

TEST_F(SlurmJobs, AnArrayOfSeeds) {
  const std::string job = submit("--array=1-3 --nodes=1", "seed-%a", "--set run.seed=%a");
  // A requeue of one task leaves the others alone: the last one has the whole array's number.
  wait_for_step("seed-3", 20);
  shell("scancel --batch --signal=USR1 " + job + "_3");
  for (int seed = 1; seed <= 3; ++seed) {
    EXPECT_EQ(end_of(job + "_" + std::to_string(seed)), "COMPLETED 0");
    EXPECT_EQ(digest("seed-" + std::to_string(seed)), reference(seed));
  }
  EXPECT_NE(reference(1), reference(2));
  EXPECT_NE(reference(2), reference(3));
  EXPECT_EQ(field(job + "_3", "Restarts"), "1");
  EXPECT_EQ(field(job + "_1", "Restarts"), "0");

  const std::string shared = submit("--array=1-2 --nodes=1", "shared");
  EXPECT_EQ(end_of(shared + "_1"), "FAILED 64");
  EXPECT_TRUE(contains(log("shared"), "need run folders of their own")) << log("shared");
}

TEST_F(SlurmJobs, WhatAnotherStartWouldNotChangeIsNotRequeued) {
  const std::string typo = submit("--nodes=4", "typo", "--set train.stepz=3");
  EXPECT_EQ(end_of(typo), "FAILED 64");
  EXPECT_EQ(field(typo, "Restarts"), "0");
  EXPECT_TRUE(contains(log("typo"), "did you mean train.steps?")) << log("typo");
  EXPECT_TRUE(contains(log("typo"), "not requeued"));

  environment_ = "ARCUS_MAX_RESTARTS=0";
  const std::string often = submit("--nodes=4", "often");
  wait_for_step("often", 5);
  shell("scancel --batch --signal=USR1 " + often);
  EXPECT_EQ(end_of(often), "FAILED 75");
  EXPECT_TRUE(contains(log("often"), "not requeued: restarted 0 times already")) << log("often");
}

TEST_F(SlurmJobs, AScriptWithoutItsSurroundingsSaysWhatItNeeds) {
  const auto refused = [&](const std::string& run, const std::string& command) {
    logs_.push_back(log_of(run));
    const ShellResult job =
        shell("cd / && sbatch --parsable --output " + log_of(run).string() + " " + command);
    EXPECT_EQ(end_of(job.out.substr(0, job.out.find('\n'))), "FAILED 64");
    return log(run);
  };
  const std::string script = ARCUS_SOURCE_DIR "/slurm/train.sbatch";
  EXPECT_TRUE(contains(refused("elsewhere", script + " a.toml"), "no slurm/env.sh in /"));
  ::setenv("ARCUS_ROOT", ARCUS_SOURCE_DIR, 1);
  EXPECT_TRUE(contains(refused("nothing", script), "usage: sbatch"));
  ::setenv("ARCUS", "/no/arcus", 1);
  EXPECT_TRUE(contains(refused("no-program", script + " a.toml"), "no program /no/arcus"));
  ::unsetenv("ARCUS_ROOT");
  ::setenv("ARCUS", ARCUS_BINARY, 1);
}

}  // namespace
}  // namespace arcus
