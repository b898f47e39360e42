#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdint>
#include <filesystem>
#include <string>

#include "tests/support/temporary_folder.hpp"

namespace arcus::testing {

/// Files of this process cannot grow beyond `bytes` while this lives.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(std::uint64_t bytes) {
    std::signal(SIGXFSZ, SIG_IGN);
    ::getrlimit(RLIMIT_FSIZE, &before_);
    rlimit limit = before_;
    limit.rlim_cur = bytes;
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() { ::setrlimit(RLIMIT_FSIZE, &before_); }

 private:
  rlimit before_{};
};

/// How many files below `folder` this process has open.
inline int open_files_in(const std::filesystem::path& folder) {
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code ignored;
    const auto target = std::filesystem::read_symlink(entry.path(), ignored).string();
    if (target.starts_with(folder.string())) ++count;
  }
  return count;
}

/// A small file system of its own.
class SmallDisk {
 public:
  explicit SmallDisk(std::int64_t bytes) {
    mounted_ = ::mount("tmpfs", folder_.path().c_str(), "tmpfs", 0,
                       ("size=" + std::to_string(bytes)).c_str()) == 0;
  }
  ~SmallDisk() {
    if (mounted_) ::umount(folder_.path().c_str());
  }
  bool mounted() const { return mounted_; }
  const std::filesystem::path& path() const { return folder_.path(); }
  /// Leaves `bytes` free.
  void fill_up_to(std::int64_t bytes) const {
    const auto free = static_cast<std::int64_t>(std::filesystem::space(path()).available);
    const int file = ::open((path() / "filler").c_str(), O_CREAT | O_WRONLY | O_TRUNC, 0666);
    EXPECT_EQ(::posix_fallocate(file, 0, std::max<std::int64_t>(1, free - bytes)), 0);
    ::close(file);
  }
  void make_room() const { std::filesystem::remove(path() / "filler"); }

 private:
  TemporaryFolder folder_;
  bool mounted_ = false;
};

}  // namespace arcus::testing
