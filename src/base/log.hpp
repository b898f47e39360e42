#pragma once

#include <spdlog/spdlog.h>

#include <filesystem>
#include <string>
#include <string_view>

namespace arcus {

/// Sets up logging for this process. Rank 0 writes information to standard error and, once
/// attach_run_log is called, to the run's log file; other ranks write warnings and errors alone,
/// with their rank in front.
void init_log(int rank, int num_ranks);
/// Writes an error to the run's log file alone; nothing where there is none.
void log_to_file(std::string_view message);
/// Adds DIR/run.log (appended to) to this process's log.
void attach_run_log(const std::filesystem::path& file);

}  // namespace arcus
