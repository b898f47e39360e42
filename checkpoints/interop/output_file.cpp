#include "checkpoints/interop/output_file.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "src/base/error.hpp"

namespace arcus {
namespace {

constexpr std::size_t kCollected = std::size_t{1} << 20;

}  // namespace

OutputFile::OutputFile(const std::filesystem::path& path)
    : path_(path),
      descriptor_(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666)) {
  if (descriptor_ < 0) fail("create");
  try {
    write_behind_.emplace(path);
  } catch (const Error&) {  // a file that may be written, not read: then without
  }
}

OutputFile::~OutputFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

void OutputFile::fail(const char* what) {
  const int error = errno;
  if (descriptor_ >= 0) ::close(std::exchange(descriptor_, -1));
  write_behind_.reset();
  ARCUS_FAIL(ExitCode::data, "cannot {} {}: {}", what, path_.string(), std::strerror(error));
}

void OutputFile::put(std::string_view bytes) {
  ARCUS_CHECK(descriptor_ >= 0, "{} is written to after a failure or its end", path_.string());
  const std::int64_t begin = written_bytes_;
  while (!bytes.empty()) {
    const ssize_t put = ::write(descriptor_, bytes.data(), bytes.size());
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) fail("write");
    bytes.remove_prefix(static_cast<std::size_t>(put));
    written_bytes_ += put;
  }
  if (write_behind_ && written_bytes_ > begin) write_behind_->wrote(begin, written_bytes_ - begin);
}

void OutputFile::flush() {
  put(collected_);
  collected_.clear();
}

void OutputFile::write(std::string_view bytes) {
  if (bytes.size() >= kCollected) {
    flush();
    // In parts, so that the disk starts early.
    for (; !bytes.empty(); bytes.remove_prefix(std::min(bytes.size(), 16 * kCollected))) {
      put(bytes.substr(0, 16 * kCollected));
    }
    return;
  }
  collected_ += bytes;
  if (collected_.size() >= kCollected) flush();
}

void OutputFile::pad(std::int64_t alignment) {
  const std::int64_t end = written_bytes_ + std::ssize(collected_);
  write(std::string(static_cast<std::size_t>((alignment - end % alignment) % alignment), '\0'));
}

void OutputFile::finish() {
  flush();
  if (::fsync(descriptor_) != 0) fail("sync");
  write_behind_.reset();
  if (::close(std::exchange(descriptor_, -1)) != 0) fail("close");
}

}  // namespace arcus
