#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <string>
#include <string_view>

/// Files that must be on disk, or be what was on disk. Failures name the file and say why; exit
/// code 66.
namespace arcus::files {

/// Forces a file's or folder's contents to disk.
void sync(const std::filesystem::path& path);
/// Keeps the disk busy while a file is written: what was written goes to disk at once, and the
/// writer is never far ahead of it, so that a slow disk shows as slow progress. A file system that
/// cannot do this is left alone; `sync` comes at the end in any case.
class WriteBehind {
 public:
  explicit WriteBehind(const std::filesystem::path& path);
  ~WriteBehind();
  WriteBehind(const WriteBehind&) = delete;
  WriteBehind& operator=(const WriteBehind&) = delete;
  void wrote(std::int64_t offset, std::int64_t bytes);

 private:
  struct Piece {
    std::int64_t offset, bytes;
  };
  int descriptor_;
  std::deque<Piece> under_way_;
  std::int64_t bytes_under_way_ = 0;
};
/// Writes a file and forces it to disk.
void write_synced(const std::filesystem::path& path, std::string_view text);
/// Atomic within one file system; forces the folder of `to` to disk.
void rename_synced(const std::filesystem::path& from, const std::filesystem::path& to);
/// Puts the folder `from` in the place of the folder `to`, which ends up under the name `from`, in
/// one operation, and forces their folder to disk. False, nothing done, where the file system has
/// no such operation.
bool exchange_synced(const std::filesystem::path& from, const std::filesystem::path& to);

std::string read_text(const std::filesystem::path& path);
std::uint64_t hash(const std::filesystem::path& path);

int open_for_reading(const std::filesystem::path& path);
/// Reads exactly `bytes` bytes; `path` is for messages.
void read_at(int descriptor, std::int64_t offset, void* out, std::int64_t bytes,
             const std::filesystem::path& path);

}  // namespace arcus::files
