#include "launch/metrics_file.hpp"

#include <cerrno>
#include <cstring>

#include "src/base/error.hpp"
#include "src/train/metrics.hpp"

namespace arcus {

MetricsFile::MetricsFile(const std::filesystem::path& file, std::int64_t step) : path_(file) {
  if (std::filesystem::exists(file)) cut_metrics(file.string(), step);
  file_.reset(std::fopen(file.c_str(), "a"));
  ARCUS_REQUIRE(file_ != nullptr, ExitCode::usage, "cannot write {}: {}", file.string(),
                std::strerror(errno));
}

void MetricsFile::write(const std::string& line) {
  const bool written = std::fputs(line.c_str(), file_.get()) >= 0 &&
                       std::fputc('\n', file_.get()) >= 0 && std::fflush(file_.get()) == 0;
  ARCUS_REQUIRE(written, ExitCode::usage,
                "cannot write {}: {}; make room and start the same command again", path_.string(),
                std::strerror(errno));
}

}  // namespace arcus
