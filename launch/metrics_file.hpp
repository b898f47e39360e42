#pragma once

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>

namespace arcus {

/// metrics.jsonl of a run: one JSON object a line, on disk as soon as it is written.
class MetricsFile {
 public:
  /// Appends to `file` what follows step `step`; later lines of an interrupted run are cut off.
  MetricsFile(const std::filesystem::path& file, std::int64_t step);
  void write(const std::string& line);

 private:
  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  std::filesystem::path path_;
  std::unique_ptr<std::FILE, Close> file_;
};

}  // namespace arcus
