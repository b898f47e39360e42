#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "checkpoints/checkpoint.hpp"
#include "launch/commands.hpp"
#include "launch/digest_log.hpp"
#include "launch/run_folder.hpp"
#include "src/base/error.hpp"
#include "src/base/hash.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

struct Arguments {
  std::string a, b;
  std::int64_t most = 20;  ///< names printed
};

constexpr const char* kFooter =
    "Runs of the same configuration are equal at any number of ranks, however often they were\n"
    "stopped. This finds where two part: it compares metrics.jsonl (all but `timing`), the "
    "digests\n"
    "that `--set run.digest_every=N` logs, and checkpoints of the same step. The exit code is 0 "
    "where\n"
    "nothing differs, 1 where something does.\n"
    "\n"
    "Examples:\n"
    "  arcus diff runs/node-a runs/node-b\n"
    "  arcus diff runs/a runs/b --names 100";

/// What one comparison found.
struct Finding {
  std::int64_t compared = 0;         ///< steps that both runs have
  std::int64_t first = 0, last = 0;  ///< of them
  std::int64_t step = -1;            ///< the first that differs; -1 = none
  std::vector<std::string> what;     ///< names of what differs there
};

/// Compares what two maps hold for the same step, in ascending order, up to the first difference.
template <class Map, class Compare>
Finding compare_steps(const Map& a, const Map& b, Compare&& compare) {
  Finding finding;
  for (const auto& [step, value] : a) {
    const auto other = b.find(step);
    if (other == b.end()) continue;
    if (finding.compared++ == 0) finding.first = step;
    finding.last = step;
    if (finding.step >= 0) continue;
    finding.what = compare(value, other->second);
    if (!finding.what.empty()) finding.step = step;
  }
  return finding;
}

/// Paths in two JSON values whose values differ, with both values where they are short.
void list_differences(const Json& a, const Json& b, const std::string& path,
                      std::vector<std::string>& found) {
  if (a == b) return;
  if (a.is_object() && b.is_object()) {
    std::set<std::string> keys;
    for (const Json* each : {&a, &b}) {
      for (const auto& item : each->items()) keys.insert(item.key());
    }
    for (const std::string& key : keys) {
      const std::string name = path.empty() ? key : path + "." + key;
      if (a.contains(key) && b.contains(key)) {
        list_differences(a[key], b[key], name, found);
      } else {
        found.push_back(
            fmt::format("{} (only in the {} run)", name, a.contains(key) ? "first" : "second"));
      }
    }
    return;
  }
  if (a.is_array() && b.is_array() && a.size() == b.size() && path == "layers") {
    for (std::size_t i = 0; i < a.size(); ++i) {
      list_differences(a[i], b[i], fmt::format("layer {}", i), found);
    }
    return;
  }
  found.push_back(a.is_primitive() && b.is_primitive()
                      ? fmt::format("{}: {} against {}", path, a.dump(), b.dump())
                      : path);
}

/// What differs in two lines of metrics.jsonl besides `timing`. One that a crash cut off says
/// nothing.
std::vector<std::string> compare_metrics(const std::string& line_a, const std::string& line_b) {
  std::vector<std::string> found;
  Json a = Json::parse(line_a, nullptr, false);
  Json b = Json::parse(line_b, nullptr, false);
  if (!a.is_object() || !b.is_object()) return found;
  for (Json* each : {&a, &b}) each->erase("timing");
  list_differences(a, b, "", found);
  return found;
}

std::string unit_name(const std::string& tensor, std::size_t unit, std::size_t units) {
  return units == 1 ? tensor : fmt::format("{}[{}]", tensor, unit);
}

std::vector<std::string> compare_digests(const std::string& line_a, const std::string& line_b) {
  std::vector<std::string> found;
  const auto parsed_a = parse_digest_line(line_a);
  const auto parsed_b = parse_digest_line(line_b);
  if (!parsed_a || !parsed_b || parsed_a->digest == parsed_b->digest) return found;
  const DigestLine& a = *parsed_a;
  const DigestLine& b = *parsed_b;
  std::set<std::string> names;
  for (const DigestLine* line : {&a, &b}) {
    for (const auto& [name, units] : line->tensors) names.insert(name);
  }
  for (const std::string& name : names) {
    const auto of_a = a.tensors.find(name);
    const auto of_b = b.tensors.find(name);
    if (of_a == a.tensors.end() || of_b == b.tensors.end() ||
        of_a->second.size() != of_b->second.size()) {
      found.push_back(name + " (of another shape, or in one run only)");
      continue;
    }
    for (std::size_t unit = 0; unit < of_a->second.size(); ++unit) {
      if (of_a->second[unit] == of_b->second[unit]) continue;
      found.push_back(unit_name(name, unit, of_a->second.size()));
    }
  }
  return found;
}

std::map<std::int64_t, fs::path> checkpoints_of(const fs::path& run) {
  std::map<std::int64_t, fs::path> checkpoints;
  for (const fs::path& path : list_checkpoints(run)) {
    try {
      checkpoints[open_checkpoint(path).info.step] = path;
    } catch (const Error& error) {
      fmt::print(stderr, "arcus: warning: left out: {}\n", error.what());
    }
  }
  return checkpoints;
}

/// Tensors of two checkpoints that differ, and the first rows that do.
std::vector<std::string> compare_checkpoints(const fs::path& path_a, const fs::path& path_b) {
  const Checkpoint a = open_checkpoint(path_a);
  const Checkpoint b = open_checkpoint(path_b);
  std::vector<std::string> found;
  if (a.digest() == b.digest()) return found;
  for (const StoredTensor& tensor : b.tensors) {
    if (a.find(tensor.spec.name) == nullptr) {
      found.push_back(tensor.spec.name + " (only in the second run)");
    }
  }
  for (const StoredTensor& tensor : a.tensors) {
    const StoredTensor* other = b.find(tensor.spec.name);
    if (other == nullptr) {
      found.push_back(tensor.spec.name + " (only in the first run)");
    } else if (other->spec.shape != tensor.spec.shape || other->spec.dtype != tensor.spec.dtype) {
      found.push_back(tensor.spec.name + " (of another shape or type)");
    } else {
      const auto differing = std::mismatch(tensor.block_hashes.begin(), tensor.block_hashes.end(),
                                           other->block_hashes.begin());
      if (differing.first == tensor.block_hashes.end()) continue;
      const RowRange rows = block_range(tensor.spec, differing.first - tensor.block_hashes.begin());
      found.push_back(
          fmt::format("{}, first in rows {} to {}", tensor.spec.name, rows.begin, rows.end - 1));
    }
  }
  return found;
}

/// Prints a finding; true where something differs.
bool print(const char* what, const Finding& finding, std::int64_t most) {
  if (finding.compared == 0) {
    fmt::print("{:<12} no step that both runs have\n", what);
    return false;
  }
  if (finding.step < 0) {
    fmt::print("{:<12} equal at all {} common steps, {} to {}\n", what, finding.compared,
               finding.first, finding.last);
    return false;
  }
  fmt::print("{:<12} part at step {}{}: {} difference{}\n", what, finding.step,
             finding.step == finding.first ? ", the first common one" : "", finding.what.size(),
             finding.what.size() == 1 ? "" : "s");
  for (std::size_t i = 0; i < finding.what.size(); ++i) {
    if (static_cast<std::int64_t>(i) == most) {
      fmt::print("  ... {} more (--names)\n", finding.what.size() - i);
      break;
    }
    fmt::print("  {}\n", finding.what[i]);
  }
  return true;
}

int diff(const Arguments& arguments) {
  const fs::path a = arguments.a;
  const fs::path b = arguments.b;
  for (const fs::path& run : {a, b}) {
    ARCUS_REQUIRE(fs::is_directory(run), ExitCode::usage,
                  "{} is no run folder; give the run.dir of a run", run.string());
  }
  StepLines metrics_a(a / "metrics.jsonl"), metrics_b(b / "metrics.jsonl");
  const auto lines_of_metrics = [&](auto line_a, auto line_b) {
    return compare_metrics(metrics_a.read(line_a), metrics_b.read(line_b));
  };
  const Finding metrics = compare_steps(metrics_a.steps(), metrics_b.steps(), lines_of_metrics);
  const Finding evaluations =
      compare_steps(metrics_a.evaluations(), metrics_b.evaluations(), lines_of_metrics);
  StepLines digests_a(a / kDigestLogName), digests_b(b / kDigestLogName);
  const Finding digests =
      compare_steps(digests_a.steps(), digests_b.steps(), [&](auto line_a, auto line_b) {
        return compare_digests(digests_a.read(line_a), digests_b.read(line_b));
      });
  const Finding checkpoints =
      compare_steps(checkpoints_of(a), checkpoints_of(b), compare_checkpoints);
  ARCUS_REQUIRE(metrics.compared + digests.compared + checkpoints.compared > 0, ExitCode::usage,
                "{} and {} have no step in common; are both folders of runs?", a.string(),
                b.string());
  bool differs = print("metrics", metrics, arguments.most);
  differs = print("evaluations", evaluations, arguments.most) || differs;
  differs = print("digests", digests, arguments.most) || differs;
  differs = print("checkpoints", checkpoints, arguments.most) || differs;
  return differs ? 1 : static_cast<int>(ExitCode::ok);
}

}  // namespace

void add_diff_command(CLI::App& app, Action& action) {
  CLI::App* command =
      app.add_subcommand("diff", "Find the step, layer and tensor at which two runs part");
  auto args = std::make_shared<Arguments>();
  command->add_option("a", args->a, "run folder")->required()->type_name("RUN_A");
  command->add_option("b", args->b, "run folder")->required()->type_name("RUN_B");
  command->add_option("--names", args->most, "differences to list")
      ->capture_default_str()
      ->check(CLI::PositiveNumber)
      ->type_name("N");
  command->footer(kFooter);
  command->callback([&action, args] { action = once([args] { return diff(*args); }); });
}

}  // namespace arcus
