#include "launch/run_folder.hpp"

#include <algorithm>
#include <charconv>
#include <fstream>
#include <random>
#include <string>
#include <string_view>
#include <utility>

#include "src/base/hash.hpp"

namespace arcus {
namespace {

using Json = nlohmann::json;

/// Enough for many steps of any model, little to read.
constexpr std::int64_t kTailBytes = std::int64_t{1} << 20;

/// The last lines of a file, whole ones.
std::vector<std::string> last_lines(const std::filesystem::path& file) {
  std::ifstream in(file, std::ios::binary | std::ios::ate);
  std::vector<std::string> lines;
  if (!in) return lines;
  const auto size = static_cast<std::int64_t>(in.tellg());
  const std::int64_t begin = std::max<std::int64_t>(0, size - kTailBytes);
  in.seekg(begin);
  std::string line;
  if (begin > 0) std::getline(in, line);
  while (std::getline(in, line)) lines.push_back(line);
  return lines;
}

}  // namespace

std::string new_run_id() {
  std::random_device device;
  return hex((static_cast<std::uint64_t>(device()) << 32) | device());
}

RecentMetrics read_recent_metrics(const std::filesystem::path& run, std::size_t most_steps) {
  RecentMetrics recent;
  for (const std::string& text : last_lines(run / "metrics.jsonl")) {
    Json json = Json::parse(text, nullptr, false);
    if (!json.is_object() || !json.contains("step") || !json["step"].is_number_integer()) continue;
    if (json.contains("eval")) {
      if (!json["eval"].is_object()) continue;
      recent.eval = std::move(json);
    } else {
      recent.steps.push_back(std::move(json));
    }
  }
  if (recent.steps.size() > most_steps) {
    recent.steps.erase(recent.steps.begin(),
                       recent.steps.end() - static_cast<std::ptrdiff_t>(most_steps));
  }
  return recent;
}

StepLines::StepLines(const std::filesystem::path& file) : file_(file) {
  Position begin = 0;
  for (std::string line; std::getline(file_, line);) {
    const Position next = begin + static_cast<Position>(line.size()) + 1;
    // Found without parsing, which would take long: both stand at a line's beginning.
    const std::string head = line.substr(0, 64);
    constexpr std::string_view kStep = "\"step\":";
    const std::size_t at = head.find(kStep);
    std::int64_t step = 0;
    const char* const digits = at == std::string::npos ? nullptr : &head[at + kStep.size()];
    if (digits != nullptr &&
        std::from_chars(digits, head.data() + head.size(), step).ec == std::errc()) {
      (head.find("\"eval\":") == std::string::npos ? steps_ : evaluations_)[step] = begin;
    }
    begin = next;
  }
}

std::string StepLines::read(Position line) {
  file_.clear();
  file_.seekg(line);
  std::string text;
  std::getline(file_, text);
  return text;
}

std::int64_t last_step(const std::filesystem::path& run) {
  const RecentMetrics recent = read_recent_metrics(run, 1);
  return recent.steps.empty() ? 0 : recent.steps.back()["step"].get<std::int64_t>();
}

}  // namespace arcus
