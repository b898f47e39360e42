#include "src/data/output_folder.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "src/base/error.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;

void sync_path(const fs::path& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  const bool good = fd >= 0 && ::fsync(fd) == 0;
  const int error = errno;
  if (fd >= 0) ::close(fd);
  ARCUS_REQUIRE(good, ExitCode::data, "cannot bring {} to the disk: {}", path.string(),
                std::strerror(error));
}

void check_free(const fs::path& path, bool force, const FolderKind& kind) {
  if (!fs::exists(path)) return;
  const bool folder = fs::is_directory(path);
  if (folder && fs::is_empty(path)) return;
  ARCUS_REQUIRE(force, ExitCode::data,
                "{} exists; choose another folder, or replace the {} in it with --force",
                path.string(), kind.what);
  ARCUS_REQUIRE(folder && fs::exists(path / kind.marker), ExitCode::data,
                "{} exists and is no {}: it is not replaced, even with --force", path.string(),
                kind.what);
}

fs::path without_trailing_slash(const fs::path& path) {
  const fs::path normal = fs::absolute(path).lexically_normal();
  return normal.has_filename() ? normal : normal.parent_path();
}

}  // namespace

OutputFolder::OutputFolder(const fs::path& path, bool force, const FolderKind& kind)
    : path_(without_trailing_slash(path)) {
  check_free(path_, force, kind);
  partial_ = path_;
  partial_ += ".partial";
  std::error_code error;
  fs::create_directories(partial_, error);
  ARCUS_REQUIRE(!error, ExitCode::data, "cannot make the folder {}: {}", partial_.string(),
                error.message());
  lock_ = ::open(partial_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (lock_ < 0 || ::flock(lock_, LOCK_EX | LOCK_NB) != 0) {
    if (lock_ >= 0) ::close(lock_);
    ARCUS_FAIL(ExitCode::data, "another process is writing {}; wait for it", partial_.string());
  }
  // What an interrupted run left.
  for (const auto& entry : fs::directory_iterator(partial_)) fs::remove_all(entry.path());
}

OutputFolder::~OutputFolder() {
  std::error_code ignored;
  if (!committed_) fs::remove_all(partial_, ignored);
  if (lock_ >= 0) ::close(lock_);
}

void OutputFolder::commit() {
  for (const auto& entry : fs::directory_iterator(partial_)) sync_path(entry.path());
  sync_path(partial_);
  fs::path old = path_;
  old += ".old";
  std::error_code error;
  if (fs::exists(path_) && !fs::is_empty(path_)) {
    fs::remove_all(old);
    fs::rename(path_, old, error);
  }
  if (!error) fs::rename(partial_, path_, error);
  ARCUS_REQUIRE(!error, ExitCode::data, "cannot rename {} to {}: {}", partial_.string(),
                path_.string(), error.message());
  committed_ = true;
  sync_path(path_.parent_path());
  fs::remove_all(old, error);
}

}  // namespace arcus
