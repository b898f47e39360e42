#include "src/base/log.hpp"

#include <spdlog/pattern_formatter.h>
#include <spdlog/sinks/basic_file_sink.h>
#include <spdlog/sinks/stdout_color_sinks.h>

#include "src/base/error.hpp"

namespace arcus {
namespace {

/// What stands in front of a message: nothing for information, "warning: ", "arcus: error: ".
class LevelPrefix : public spdlog::custom_flag_formatter {
 public:
  void format(const spdlog::details::log_msg& message, const std::tm&,
              spdlog::memory_buf_t& out) override {
    const std::string_view prefix = message.level >= spdlog::level::err    ? "arcus: error: "
                                    : message.level >= spdlog::level::warn ? "warning: "
                                                                           : "";
    out.append(prefix.data(), prefix.data() + prefix.size());
  }
  std::unique_ptr<spdlog::custom_flag_formatter> clone() const override {
    return std::make_unique<LevelPrefix>();
  }
};

}  // namespace

void init_log(int rank, int num_ranks) {
  auto sink = std::make_shared<spdlog::sinks::stderr_color_sink_mt>();
  auto logger = std::make_shared<spdlog::logger>("arcus", sink);
  logger->set_level(rank == 0 ? spdlog::level::info : spdlog::level::warn);
  auto formatter = std::make_unique<spdlog::pattern_formatter>();
  formatter->add_flag<LevelPrefix>('*').set_pattern(
      num_ranks > 1 && rank > 0 ? fmt::format("%^%*%$rank {}: %v", rank) : "%^%*%$%v");
  logger->set_formatter(std::move(formatter));
  logger->flush_on(spdlog::level::info);
  // A log that cannot be written (a full disk) is no reason for lines of its own.
  logger->set_error_handler([](const std::string&) {});
  spdlog::set_default_logger(std::move(logger));
}

void log_to_file(std::string_view message) {
  const auto& sinks = spdlog::default_logger()->sinks();
  for (std::size_t i = 1; i < sinks.size(); ++i) {
    sinks[i]->log({"arcus", spdlog::level::err, {message.data(), message.size()}});
    sinks[i]->flush();
  }
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
