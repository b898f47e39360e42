#pragma once

#include <cstddef>
#include <filesystem>
#include <string_view>

namespace arcus {

/// A regular file mapped read-only into memory: its pages come from the page cache and go back to
/// it, so files larger than memory are fine.
class MappedFile {
 public:
  MappedFile() = default;
  /// Throws (data) when the file cannot be read or is no regular file.
  explicit MappedFile(const std::filesystem::path& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  /// The whole file; valid as long as this object lives.
  std::string_view bytes() const { return {static_cast<const char*>(data_), size_}; }
  std::size_t size() const { return size_; }
  /// For a reader that goes through the file once: read ahead.
  void expect_sequential() const;
  /// Lets go of the pages that lie wholly in front of `end`; they can be read again.
  void release_before(std::size_t end) const { release(0, end); }
  /// The same for pages that lie wholly in [begin, end).
  void release(std::size_t begin, std::size_t end) const;

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace arcus
