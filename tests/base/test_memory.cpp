// What a process may still take: the machine's own limit and those of its control groups.

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstring>
#include <fstream>

#include "src/base/memory.hpp"
#include "tests/support/temporary_folder.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;

class AvailableMemory : public ::testing::Test {
 protected:
  void write(const std::string& file, const std::string& text) {
    const fs::path path = folder_.path() / file;
    fs::create_directories(path.parent_path());
    std::ofstream(path) << text;
  }
  std::int64_t available() const { return available_memory(folder_.path()); }

  testing::TemporaryFolder folder_{"arcus-memory"};
};

TEST_F(AvailableMemory, IsUnknownWhereNothingSaysIt) { EXPECT_EQ(available(), 0); }

TEST_F(AvailableMemory, IsWhatTheKernelSaysWithoutLimits) {
  write("proc/meminfo", "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:    5000 kB\n");
  write("proc/self/cgroup", "0::/\n");
  EXPECT_EQ(available(), 5000 * 1024);
  write("sys/fs/cgroup/memory.max", "max\n");
  write("sys/fs/cgroup/memory.current", "77\n");
  EXPECT_EQ(available(), 5000 * 1024);
}

// A job's step has no limit of its own, the job has; page cache is given back.
TEST_F(AvailableMemory, IsWhatTheGroupsAroundLeave) {
  write("proc/meminfo", "MemAvailable: 5000 kB\n");
  write("proc/self/cgroup", "0::/job_7/step_0\n");
  write("sys/fs/cgroup/job_7/step_0/memory.max", "max\n");
  write("sys/fs/cgroup/job_7/step_0/memory.current", "1000\n");
  write("sys/fs/cgroup/job_7/memory.max", "1000000\n");
  write("sys/fs/cgroup/job_7/memory.current", "700000\n");
  EXPECT_EQ(available(), 300000);
  write("sys/fs/cgroup/job_7/memory.stat", "anon 1\ninactive_file 50000\nactive_file 25000\n");
  EXPECT_EQ(available(), 375000);
  write("sys/fs/cgroup/job_7/step_0/memory.max", "1500\n");
  EXPECT_EQ(available(), 500);
}

TEST_F(AvailableMemory, KnowsGroupsOfTheFirstVersion) {
  write("proc/meminfo", "MemAvailable: 5000 kB\n");
  write("proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/slurm/job\n0::/\n");
  write("sys/fs/cgroup/memory/slurm/job/memory.limit_in_bytes", "4000\n");
  write("sys/fs/cgroup/memory/slurm/job/memory.usage_in_bytes", "1000\n");
  EXPECT_EQ(available(), 3000);
  // The job's page cache is counted at its steps, and in total here.
  write("sys/fs/cgroup/memory/slurm/job/memory.stat",
        "inactive_file 1\ntotal_inactive_file 300\ntotal_active_file 200\n");
  EXPECT_EQ(available(), 3500);
  write("sys/fs/cgroup/memory/slurm/job/memory.usage_in_bytes", "5000\n");
  EXPECT_EQ(available(), 0);
}

TEST(ResidentMemory, PeakIsSinceTheLastReset) {
  constexpr std::int64_t kBytes = 64 << 20;
  const std::int64_t before = resident_memory();
  // Not from the heap: a sanitizer's keeps what is freed.
  void* taken = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(taken, MAP_FAILED);
  std::memset(taken, 1, kBytes);
  munmap(taken, kBytes);
  // The kernel counts in batches of pages.
  EXPECT_GE(peak_memory(), before + kBytes / 8 * 7);
  reset_peak_memory();
  EXPECT_LT(peak_memory(), before + kBytes / 2);
}

}  // namespace
}  // namespace arcus
