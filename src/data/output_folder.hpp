#pragma once

#include <filesystem>
#include <string>

namespace arcus {

/// What kind of folder it is, so that only its like is replaced.
struct FolderKind {
  std::string what;    ///< "data set"
  std::string marker;  ///< a file that every such folder has
};
inline const FolderKind kDataSetFolder{"data set", "dataset.json"};

/// A folder that appears whole or not at all: files are written to PATH.partial, which commit()
/// renames when they are on disk and the destructor removes otherwise.
class OutputFolder {
 public:
  /// Throws (data) when `path` holds anything, unless `force` is set and it is of that kind; or
  /// when another process is writing it.
  OutputFolder(const std::filesystem::path& path, bool force,
               const FolderKind& kind = kDataSetFolder);
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
