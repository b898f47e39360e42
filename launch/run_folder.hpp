#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
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

/// Step of the last line; 0 where there is none.
std::int64_t last_step(const std::filesystem::path& run);

}  // namespace arcus
