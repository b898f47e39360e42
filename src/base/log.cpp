#include "src/base/log.hpp"

#include <spdlog/sinks/basic_file_sink.h>
#include <spdlog/sinks/stdout_color_sinks.h>

#include "src/base/error.hpp"

namespace arcus {

void init_log(int rank, int num_ranks) {
  auto sink = std::make_shared<spdlog::sinks::stderr_color_sink_mt>();
  auto logger = std::make_shared<spdlog::logger>("arcus", sink);
  logger->set_level(rank == 0 ? spdlog::level::info : spdlog::level::warn);
  logger->set_pattern(num_ranks > 1 && rank > 0 ? fmt::format("[rank {}] %^%l%$: %v", rank)
                                                : "%^%l%$: %v");
  logger->flush_on(spdlog::level::info);
  spdlog::set_default_logger(std::move(logger));
}

void attach_run_log(const std::filesystem::path& file) {
  try {
    auto sink = std::make_shared<spdlog::sinks::basic_file_sink_mt>(file.string(), false);
    sink->set_pattern("%Y-%m-%d %H:%M:%S %l %v");
    spdlog::default_logger()->sinks().push_back(std::move(sink));
  } catch (const spdlog::spdlog_ex& error) {
    ARCUS_FAIL(ExitCode::usage, "cannot write the log {}: {}", file.string(), error.what());
  }
}

}  // namespace arcus
