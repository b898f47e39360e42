#pragma once

#include <filesystem>

namespace arcus {

/// A folder that appears whole or not at all: files are written to PATH.partial, which commit()
/// renames when they are on disk and the destructor removes otherwise.
class OutputFolder {
 public:
  /// Throws (data) when `path` holds anything, unless `force` is set and it is a data set; or when
  /// another process is writing it.
  OutputFolder(const std::filesystem::path& path, bool force);
  OutputFolder(const OutputFolder&) = delete;
  OutputFolder& operator=(const OutputFolder&) = delete;
  ~OutputFolder();

  /// Where to write.
  const std::filesystem::path& partial() const { return partial_; }
  void commit();

 private:
  std::filesystem::path path_;
  std::filesystem::path partial_;
  int lock_ = -1;
  bool committed_ = false;
};

}  // namespace arcus
