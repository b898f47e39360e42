#include "checkpoints/run_lock.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <sys/file.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <string>
#include <thread>
#include <utility>

#include "src/base/error.hpp"
#include "src/base/host.hpp"

namespace arcus {
namespace {

std::string read_holder(int descriptor) {
  std::array<char, 512> text{};
  const ssize_t got = ::pread(descriptor, text.data(), text.size(), 0);
  return got > 0 ? std::string(text.data(), static_cast<std::size_t>(got)) : "another process";
}

/// What flock returns at last, with errno.
int lock_in_time(int descriptor, const std::filesystem::path& run_dir,
                 std::chrono::milliseconds patience) {
  using Clock = std::chrono::steady_clock;
  // `arcus status` holds it for a moment.
  constexpr std::chrono::milliseconds kMoment(200), kPause(40);
  const auto begin = Clock::now();
  bool said = false;
  while (::flock(descriptor, LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK) return -1;
    const std::string holder = read_holder(descriptor);
    const bool elsewhere = !holder.ends_with(" on " + node_name());
    const auto waited = Clock::now() - begin;
    if (waited > (elsewhere ? patience : kMoment)) {
      errno = EWOULDBLOCK;
      return -1;
    }
    if (elsewhere && waited > kMoment && !std::exchange(said, true)) {
      spdlog::warn("run folder {} is in use by {}, whose node may be gone; waiting at most {} s",
                   run_dir.string(), holder,
                   std::chrono::duration_cast<std::chrono::seconds>(patience).count());
    }
    std::this_thread::sleep_for(kPause);
  }
  return 0;
}

}  // namespace

RunLock::RunLock(const std::filesystem::path& run_dir, std::chrono::milliseconds patience) {
  std::error_code error;
  std::filesystem::create_directories(run_dir, error);
  ARCUS_REQUIRE(!error, ExitCode::usage,
                "cannot create the run folder {}: {}; choose another [run] dir", run_dir.string(),
                error.message());
  const std::filesystem::path path = run_dir / "lock";
  descriptor_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  ARCUS_REQUIRE(descriptor_ >= 0, ExitCode::usage, "cannot open {}: {}; choose another [run] dir",
                path.string(), std::strerror(errno));
  const int failed = lock_in_time(descriptor_, run_dir, patience);
  if (failed != 0) {
    const bool taken = errno == EWOULDBLOCK;
    const std::string reason =
        taken ? "is in use by " + read_holder(descriptor_) : std::strerror(errno);
    ::close(descriptor_);
    ARCUS_REQUIRE(!taken, ExitCode::usage,
                  "run folder {} {}; wait for that run to end, or choose another [run] dir",
                  run_dir.string(), reason);
    ARCUS_FAIL(ExitCode::usage,
               "cannot lock {}: {}; choose a [run] dir on a file system with locks", path.string(),
               reason);
  }
  const std::string holder = fmt::format("process {} on {}", ::getpid(), node_name());
  // The text only serves the message above, so a full disk is no reason to stop here.
  if (::ftruncate(descriptor_, 0) != 0 ||
      ::pwrite(descriptor_, holder.data(), holder.size(), 0) < 0) {
    return;
  }
}

RunLock::~RunLock() { ::close(descriptor_); }

}  // namespace arcus
