#include "checkpoints/run_lock.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <string>
#include <thread>

#include "src/base/error.hpp"
#include "src/base/host.hpp"

namespace arcus {
namespace {

std::string read_holder(int descriptor) {
  std::array<char, 512> text{};
  const ssize_t got = ::pread(descriptor, text.data(), text.size(), 0);
  return got > 0 ? std::string(text.data(), static_cast<std::size_t>(got)) : "another process";
}

}  // namespace

RunLock::RunLock(const std::filesystem::path& run_dir) {
  std::error_code error;
  std::filesystem::create_directories(run_dir, error);
  ARCUS_REQUIRE(!error, ExitCode::usage,
                "cannot create the run folder {}: {}; choose another [run] dir", run_dir.string(),
                error.message());
  const std::filesystem::path path = run_dir / "lock";
  descriptor_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  ARCUS_REQUIRE(descriptor_ >= 0, ExitCode::usage, "cannot open {}: {}; choose another [run] dir",
                path.string(), std::strerror(errno));
  // `arcus status` holds it for a moment.
  int failed = ::flock(descriptor_, LOCK_EX | LOCK_NB);
  for (int i = 0; i < 5 && failed != 0 && errno == EWOULDBLOCK; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(40));
    failed = ::flock(descriptor_, LOCK_EX | LOCK_NB);
  }
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
