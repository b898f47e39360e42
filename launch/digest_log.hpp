#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "checkpoints/checkpoint.hpp"

namespace arcus {

/// RUN/digests.jsonl: hashes of a run's whole state every so many steps, for `arcus diff`. A line:
/// {"step", "digest", "tensors": {NAME: [hash of each unit, 16 hexadecimal digits]}}; hashes are
/// those of a checkpoint (checkpoints/FORMAT.md), the same at any layout.
inline constexpr const char* kDigestLogName = "digests.jsonl";

/// Appends lines; on the rank that writes.
class DigestLog {
 public:
  /// Cuts the lines of steps after `steps_done`.
  DigestLog(const std::filesystem::path& run_dir, std::int64_t steps_done);
  /// `state` as describe_state gives it. A full disk is a warning, once.
  void write(std::int64_t step, const Checkpoint& state);

 private:
  std::filesystem::path file_;
  std::ofstream out_;
  bool broken_ = false;  ///< the last line may stand there in part
  bool warned_ = false;
};

struct DigestLine {
  std::string digest;
  std::map<std::string, std::vector<std::string>> tensors;  ///< hashes of units
};
/// None where the line was cut off by a crash or a full disk.
std::optional<DigestLine> parse_digest_line(const std::string& line);

}  // namespace arcus
