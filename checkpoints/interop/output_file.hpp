#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>

#include "checkpoints/files.hpp"

namespace arcus {

/// A new file that is written from its beginning to its end. Failures throw (data) and name the
/// file; after one, nothing more can be written. The destructor closes; whoever made a file that
/// was not finished removes it.
class OutputFile {
 public:
  /// Replaces what is there.
  explicit OutputFile(const std::filesystem::path& path);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  const std::filesystem::path& path() const { return path_; }
  /// Small pieces are collected: what fails may show at a later call, at the latest in finish().
  void write(std::string_view bytes);
  /// Zeros up to the next multiple of `alignment`.
  void pad(std::int64_t alignment);
  /// Brings all to the disk and closes.
  void finish();

 private:
  void flush();
  void put(std::string_view bytes);
  [[noreturn]] void fail(const char* what);

  std::filesystem::path path_;
  int descriptor_ = -1;
  std::optional<files::WriteBehind> write_behind_;
  std::string collected_;
  std::int64_t written_bytes_ = 0;  ///< to the file, without what is collected
};

}  // namespace arcus
