#include <gtest/gtest.h>
#include <sched.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "comm/backends.hpp"
#include "launch/bench.hpp"
#include "launch/progress.hpp"
#include "launch/session.hpp"
#include "launch/signals.hpp"
#include "launch/threads.hpp"
#include "launch/utf8_stream.hpp"
#include "launch/version.hpp"
#include "src/base/error.hpp"

namespace arcus {
namespace {

TEST(Progress, DurationsAndCounts) {
  EXPECT_EQ(format_duration(0), "0 s");
  EXPECT_EQ(format_duration(59.4), "59 s");
  EXPECT_EQ(format_duration(59.6), "1:00");
  EXPECT_EQ(format_duration(3599), "59:59");
  EXPECT_EQ(format_duration(3723), "1:02:03");
  EXPECT_EQ(format_duration(-5), "0 s");
  EXPECT_EQ(format_count(950), "950");
  EXPECT_EQ(format_count(12345), "12.3k");
  EXPECT_EQ(format_count(4.56e6), "4.56M");
}

TEST(Progress, LineHasTheEstimateOfWhicheverLimitComesFirst) {
  ProgressLine by_steps(stderr, 100, 300);
  // 50 steps in 100 s: 150 more take 300 s.
  EXPECT_EQ(by_steps.format({150, 2.5, 12345, 1.25}, 100),
            "step 150/300  loss 2.5000  12.3k tokens/s  load 1.25x  5:00 left");
  ProgressLine by_time(stderr, 100, 300, 3);
  EXPECT_EQ(by_time.format({150, 2.5, 12345, 0}, 100),
            "step 150/300  loss 2.5000  12.3k tokens/s  1:20 left");
}

TEST(Progress, PlainLinesAreFewAndComplete) {
  std::FILE* file = std::tmpfile();
  ASSERT_NE(file, nullptr);
  {
    ProgressLine line(file, 0, 1000);
    for (std::int64_t step = 1; step <= 1000; ++step) line.update({step, 1.0, 10, 0});
  }
  std::rewind(file);
  std::string text;
  for (int c = std::fgetc(file); c != EOF; c = std::fgetc(file)) text += static_cast<char>(c);
  std::fclose(file);
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 2) << text;
  EXPECT_NE(text.find("step    1/1000"), std::string::npos);
  EXPECT_NE(text.find("step 1000/1000"), std::string::npos);
  EXPECT_EQ(text.find('\033'), std::string::npos);
}

TEST(Signals, UserSignalAsksForAStopUntilRequestsAreIgnored) {
  install_signal_handlers();
  EXPECT_FALSE(stop_requested());
  std::raise(SIGUSR1);
  EXPECT_TRUE(stop_requested());
  std::raise(SIGTERM);
  EXPECT_STREQ(stop_signal_name(), "USR1");
  ignore_stop_requests();
  EXPECT_FALSE(stop_requested());
  EXPECT_EXIT(std::raise(SIGTERM), testing::KilledBySignal(SIGTERM), "");
}

TEST(Signals, ASecondInterruptEndsTheProcess) {
  EXPECT_EXIT(
      {
        install_signal_handlers();
        std::raise(SIGINT);
        if (stop_requested()) std::raise(SIGINT);
      },
      testing::KilledBySignal(SIGINT), "");
}

TEST(Threads, ConfigurationThenEnvironmentThenCores) {
  auto comm = make_self_communicator();
  Stream stream(1);
  ParallelConfig parallel;
  setenv("OMP_NUM_THREADS", "3", 1);
  parallel.threads = 5;
  EXPECT_EQ(threads_per_rank(parallel, *comm, stream), 5);
  parallel.threads = 0;
  EXPECT_EQ(threads_per_rank(parallel, *comm, stream), 3);
  setenv("OMP_NUM_THREADS", "none", 1);
  EXPECT_THROW(threads_per_rank(parallel, *comm, stream), Error);
  unsetenv("OMP_NUM_THREADS");
  EXPECT_EQ(threads_per_rank(parallel, *comm, stream), available_cores());
  EXPECT_GE(available_cores(), 1);
}

TEST(Threads, RanksOnTheSameCoresShareThem) {
  unsetenv("OMP_NUM_THREADS");
  const int ranks = 2 * available_cores() + 1;
  run_on_threads(ranks, {}, [](Communicator& comm) {
    Stream stream(1);
    EXPECT_EQ(threads_per_rank({}, comm, stream), 1);
  });
}

TEST(Threads, BoundOnesHaveACoreEach) {
  const int cores = available_cores();
  std::mutex mutex;
  std::vector<cpu_set_t> bound;
  // Ranks are threads here, so that nothing of this process stays bound.
  run_on_threads(2, {}, [&](Communicator& comm) {
    Stream stream(1);
    const ParallelConfig parallel{.threads = std::max(1, cores / 2), .bind = "cores"};
    if (cores < 2) {
      EXPECT_THROW(set_up_threads(parallel, comm, stream), Error);
      return;
    }
    const int threads = set_up_threads(parallel, comm, stream);
    EXPECT_EQ(threads, cores / 2);
#pragma omp parallel num_threads(threads)
    {
      cpu_set_t own;
      sched_getaffinity(0, sizeof own, &own);
      const std::lock_guard lock(mutex);
      bound.push_back(own);
    }
  });
  if (cores < 2) return;
  EXPECT_EQ(bound.size(), 2 * static_cast<std::size_t>(cores / 2));
  for (std::size_t i = 0; i < bound.size(); ++i) {
    EXPECT_GE(CPU_COUNT(&bound[i]), 1);
    for (std::size_t j = 0; j < i; ++j) {
      cpu_set_t both;
      CPU_AND(&both, &bound[i], &bound[j]);
      EXPECT_EQ(CPU_COUNT(&both), 0) << "threads " << j << " and " << i << " share a processor";
    }
  }
}

TEST(Threads, MoreThanThereAreCoresCannotBeBound) {
  auto comm = make_self_communicator();
  Stream stream(1);
  EXPECT_THROW(set_up_threads({.threads = available_cores() + 1, .bind = "cores"}, *comm, stream),
               Error);
}

TEST(Session, RunsAloneWithoutALauncherAndReportsErrors) {
  if (MpiSession::launched()) GTEST_SKIP() << "started by an MPI launcher";
  EXPECT_EQ(run_session({},
                        [](Session& session) {
                          EXPECT_TRUE(session.is_root());
                          EXPECT_EQ(session.comm().size(), 1);
                          return ExitCode::interrupted;
                        }),
            75);
  testing::internal::CaptureStderr();
  const int code = run_session({}, [](Session& session) -> ExitCode {
    session.together([] { ARCUS_FAIL(ExitCode::data, "no such text"); });
    return ExitCode::ok;
  });
  const std::string text = testing::internal::GetCapturedStderr();
  EXPECT_EQ(code, 65);
  EXPECT_NE(text.find("arcus: error: "), std::string::npos) << text;
  EXPECT_NE(text.find("no such text\n"), std::string::npos) << text;
}

TEST(Utf8Stream, WholeCharactersPassWhereverTheBytesAreCut) {
  const std::string text =
      "a\u00e9\u4e2d\U0001f600\xff"
      "b";
  const std::string expected =
      "a\u00e9\u4e2d\U0001f600\ufffd"
      "b";
  for (std::size_t cut = 0; cut <= text.size(); ++cut) {
    Utf8Stream stream;
    std::string out = stream.push(text.substr(0, cut));
    out += stream.push(text.substr(cut));
    EXPECT_EQ(out + stream.finish(), expected) << cut;
  }
  Utf8Stream stream;
  EXPECT_EQ(stream.push("x\xe4\xb8"), "x");
  EXPECT_EQ(stream.push("y"), "\ufffdy");
  EXPECT_EQ(stream.push("\xe4"), "");
  EXPECT_EQ(stream.finish(), "\ufffd");
  EXPECT_EQ(stream.push("\xc0\xaf\xed\xa0\x80"), "\ufffd\ufffd\ufffd\ufffd\ufffd");
}

TEST(Bench, MedianOfOddAndEvenNumbersOfSamples) {
  EXPECT_EQ((Samples{{3, 1, 2}}.median()), 2);
  EXPECT_EQ((Samples{{4, 1, 3, 2}}.median()), 2.5);
  EXPECT_EQ((Samples{{3, 1, 2}}.least()), 1);
  EXPECT_EQ((Samples{{3, 1, 2}}.most()), 3);
}

TEST(Bench, EachSampleIsTheSlowestRanks) {
  if (MpiSession::launched()) GTEST_SKIP() << "started by an MPI launcher";
  run_session({}, [](Session& session) {
    int calls = 0;
    const Samples samples = measure(session, session.stream(), 5, [&] { ++calls; });
    EXPECT_EQ(samples.ms.size(), 5U);
    EXPECT_EQ(calls, 7);
    EXPECT_EQ(sum_over_ranks(session, 2.5), 2.5);
    return ExitCode::ok;
  });
}

TEST(Version, NamesEverythingThatBitsDependOn) {
  const std::string text = version_text();
  for (const char* part : {"commit", "-march=", "running on", "oneDNN 2", "HDF5 1", "MPI"}) {
    EXPECT_NE(text.find(part), std::string::npos) << part << " is missing in\n" << text;
  }
}

}  // namespace
}  // namespace arcus
