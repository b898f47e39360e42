#pragma once

#include <chrono>
#include <filesystem>

namespace arcus {

/// Holds a run folder for this process, so that two runs never write into one. One per run, on rank
/// 0. The operating system frees the lock when the process ends, however it ends. Uses flock on
/// `<run_dir>/lock`, which network file systems may keep to one host, and may keep for a while
/// after the holder's node died.
class RunLock {
 public:
  /// Makes the folder where needed. Throws (usage) naming the holder when it is in use; a holder on
  /// another node may be dead, so that one is waited for, for `patience` (NFS forgets in 90 s).
  explicit RunLock(const std::filesystem::path& run_dir,
                   std::chrono::milliseconds patience = std::chrono::seconds(120));
  ~RunLock();
  RunLock(const RunLock&) = delete;
  RunLock& operator=(const RunLock&) = delete;

 private:
  int descriptor_ = -1;
};

}  // namespace arcus
