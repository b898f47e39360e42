#include "checkpoints/files.hpp"

#include <fcntl.h>
#include <stdio.h>  // renameat2
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include "src/base/error.hpp"
#include "src/base/hash.hpp"

namespace arcus::files {
namespace {

[[noreturn]] void fail(const char* what, const std::filesystem::path& path) {
  ARCUS_FAIL(ExitCode::checkpoint, "cannot {} {}: {}", what, path.string(), std::strerror(errno));
}

/// Owns a file descriptor.
class Descriptor {
 public:
  Descriptor(const std::filesystem::path& path, int flags)
      : fd_(::open(path.c_str(), flags | O_CLOEXEC, 0666)) {
    if (fd_ < 0) fail((flags & O_CREAT) != 0 ? "create" : "open", path);
  }
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

}  // namespace

void sync(const std::filesystem::path& path) {
  const Descriptor file(path, O_RDONLY);
  if (::fsync(file.get()) != 0) fail("sync", path);
}

WriteBehind::WriteBehind(const std::filesystem::path& path) : descriptor_(open_for_reading(path)) {}

WriteBehind::~WriteBehind() { ::close(descriptor_); }

void WriteBehind::wrote(std::int64_t offset, std::int64_t bytes) {
  constexpr std::int64_t kMostAhead = std::int64_t{1} << 28;
  // What fails here is found by sync.
  ::sync_file_range(descriptor_, offset, bytes, SYNC_FILE_RANGE_WRITE);
  under_way_.push_back({offset, bytes});
  bytes_under_way_ += bytes;
  while (bytes_under_way_ > kMostAhead) {
    const Piece& oldest = under_way_.front();
    ::sync_file_range(
        descriptor_, oldest.offset, oldest.bytes,
        SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
    // Nobody reads it again soon: its pages serve the pieces that follow, and training's data stay
    // in memory.
    ::posix_fadvise(descriptor_, oldest.offset, oldest.bytes, POSIX_FADV_DONTNEED);
    bytes_under_way_ -= oldest.bytes;
    under_way_.pop_front();
  }
}

void write_synced(const std::filesystem::path& path, std::string_view text) {
  const Descriptor file(path, O_WRONLY | O_CREAT | O_TRUNC);
  while (!text.empty()) {
    const ssize_t put = ::write(file.get(), text.data(), text.size());
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) fail("write", path);
    text.remove_prefix(static_cast<std::size_t>(put));
  }
  if (::fsync(file.get()) != 0) fail("sync", path);
}

void rename_synced(const std::filesystem::path& from, const std::filesystem::path& to) {
  if (::rename(from.c_str(), to.c_str()) != 0) fail("rename", from);
  sync(to.parent_path());
}

bool exchange_synced(const std::filesystem::path& from, const std::filesystem::path& to) {
  if (::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_EXCHANGE) != 0) {
    if (errno == EINVAL || errno == ENOSYS || errno == ENOTSUP) return false;
    fail("exchange", from);
  }
  sync(to.parent_path());
  return true;
}

std::string read_text(const std::filesystem::path& path) {
  const Descriptor file(path, O_RDONLY);
  std::string text;
  char buffer[1 << 14];
  for (;;) {
    const ssize_t got = ::read(file.get(), buffer, sizeof(buffer));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail("read", path);
    if (got == 0) return text;
    text.append(buffer, static_cast<std::size_t>(got));
  }
}

std::uint64_t hash(const std::filesystem::path& path) {
  const Descriptor file(path, O_RDONLY);
  std::vector<char> buffer(std::size_t{1} << 20);
  StreamHash hash;
  for (;;) {
    const ssize_t got = ::read(file.get(), buffer.data(), buffer.size());
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail("read", path);
    if (got == 0) return hash.digest();
    hash.update(buffer.data(), static_cast<std::size_t>(got));
  }
}

int open_for_reading(const std::filesystem::path& path) {
  return Descriptor(path, O_RDONLY).release();
}

void read_at(int descriptor, std::int64_t offset, void* out, std::int64_t bytes,
             const std::filesystem::path& path) {
  constexpr std::int64_t kMaxTransfer = std::int64_t{1} << 30;  // Linux moves at most 2 GiB at once
  auto* target = static_cast<char*>(out);
  while (bytes > 0) {
    const ssize_t got = ::pread(descriptor, target,
                                static_cast<std::size_t>(std::min(bytes, kMaxTransfer)), offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail("read", path);
    ARCUS_REQUIRE(got > 0, ExitCode::checkpoint, "{} ends at byte {}, {} more were expected",
                  path.string(), offset, bytes);
    target += got;
    offset += got;
    bytes -= got;
  }
}

}  // namespace arcus::files
