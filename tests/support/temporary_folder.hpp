#pragma once

#include <stdlib.h>

#include <filesystem>
#include <string>

#include "src/base/error.hpp"

namespace arcus::testing {

/// A new folder below the system's temporary one, removed with all it holds at the object's end.
class TemporaryFolder {
 public:
  /// `name` begins the folder's name, so that one left behind by a crash tells whose it was.
  explicit TemporaryFolder(const std::string& name = "arcus-test") {
    std::string pattern = (std::filesystem::temp_directory_path() / (name + ".XXXXXX")).string();
    ARCUS_CHECK(::mkdtemp(pattern.data()) != nullptr, "cannot create {}", pattern);
    path_ = pattern;
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

}  // namespace arcus::testing
