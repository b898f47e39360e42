#pragma once

#include <cstdint>
#include <vector>

namespace arcus {

/// Memory of all ranks of a communicator, every rank's part readable and writable by all of them at
/// the address given here. Pages become real when they are touched. What one rank writes and
/// another reads has to be ordered by release and acquire of a flag in it.
class SharedMemory {
 public:
  virtual ~SharedMemory() = default;
  SharedMemory() = default;
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  /// Start of `rank`'s part, aligned to a page.
  char* part(int rank) const { return parts_[static_cast<std::size_t>(rank)]; }
  /// Bytes of this rank's own part.
  std::int64_t bytes() const { return bytes_; }

 protected:
  std::vector<char*> parts_;
  std::int64_t bytes_ = 0;
};

}  // namespace arcus
