#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace arcus {

/// Tells one run from all others.
std::string new_run_id();

/// The end of a run's metrics.jsonl (src/train/FORMAT.md), readable while the run writes it.
struct RecentMetrics {
  std::vector<nlohmann::json> steps;  ///< ascending
  nlohmann::json eval;                ///< the last evaluation, or null
};
RecentMetrics read_recent_metrics(const std::filesystem::path& run, std::size_t most_steps);

/// A file of a JSON object a line with a number "step", lines read when they are wanted: such files
/// grow for as long as a run does.
class StepLines {
 public:
  using Position = std::streamoff;
  /// A file that is not there has no lines.
  explicit StepLines(const std::filesystem::path& file);
  /// By step; of evaluations those that have an "eval". Later lines of a step stand for earlier
  /// ones.
  const std::map<std::int64_t, Position>& steps() const { return steps_; }
  const std::map<std::int64_t, Position>& evaluations() const { return evaluations_; }
  std::string read(Position line);

 private:
  std::ifstream file_;
  std::map<std::int64_t, Position> steps_, evaluations_;
};

/// Step of the last line; 0 where there is none.
std::int64_t last_step(const std::filesystem::path& run);

}  // namespace arcus
