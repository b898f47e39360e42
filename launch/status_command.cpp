#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "checkpoints/checkpoint.hpp"
#include "launch/commands.hpp"
#include "launch/progress.hpp"
#include "launch/run_config.hpp"
#include "launch/run_folder.hpp"
#include "launch/run_setup.hpp"
#include "src/base/error.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

struct Arguments {
  std::string path;
  bool json = false;
};

constexpr const char* kFooter =
    "Reads the run's folder only, so it works from any machine that sees it, while the run goes "
    "on.\n"
    "\n"
    "Examples:\n"
    "  arcus status runs/first\n"
    "  arcus status runs/first --json | jq .step";

constexpr std::size_t kRecentSteps = 20;

/// What can be seen of a run from outside.
struct Status {
  std::string holder;  ///< "process 7 on node3"; empty = nobody has the folder
  RecentMetrics recent;
  std::int64_t total_steps = 0;  ///< 0 = unknown
  double seconds_since = 0;      ///< the last line of metrics
  std::optional<fs::path> latest;
};

/// Who holds the run's lock, as far as this machine can tell.
std::string lock_holder(const fs::path& run) {
  const int descriptor = ::open((run / "lock").c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) return {};
  std::string holder;
  if (::flock(descriptor, LOCK_SH | LOCK_NB) != 0) {
    std::ifstream text(run / "lock");
    std::getline(text, holder);
    if (holder.empty()) holder = "another process";
  }
  ::close(descriptor);
  return holder;
}

Status read_status(const fs::path& run) {
  ARCUS_REQUIRE(fs::is_directory(run), ExitCode::usage,
                "{} is no run folder; give the run.dir of a run", run.string());
  const fs::path metrics = run / "metrics.jsonl";
  ARCUS_REQUIRE(fs::exists(metrics) || fs::exists(run / "lock"), ExitCode::usage,
                "{} holds no run: neither metrics.jsonl nor lock is there", run.string());
  Status status{.holder = lock_holder(run),
                .recent = read_recent_metrics(run, kRecentSteps),
                .latest = find_latest(run)};
  std::error_code error;
  const auto written = fs::last_write_time(metrics, error);
  if (!error) {
    status.seconds_since =
        std::chrono::duration<double>(fs::file_time_type::clock::now() - written).count();
  }
  const fs::path config = run / "config.toml";
  if (fs::exists(config)) {
    const LoadedConfig loaded = try_load_config(config.string(), {});
    if (!loaded.error) status.total_steps = loaded.config.train.steps;
  }
  return status;
}

double mean_of(const std::vector<Json>& steps, const char* key) {
  double sum = 0;
  std::int64_t count = 0;
  for (const Json& step : steps) {
    const Json& timing = step.value("timing", Json::object());
    if (!timing.contains(key) || !timing[key].is_number()) continue;
    sum += timing[key].get<double>();
    ++count;
  }
  return count > 0 ? sum / static_cast<double>(count) : 0;
}

/// The rank that the others waited for most often in the recent steps.
std::int64_t usual_straggler(const std::vector<Json>& steps) {
  std::map<std::int64_t, int> times;
  for (const Json& step : steps) ++times[step.value("/timing/straggler"_json_pointer, 0)];
  std::int64_t most = 0;
  for (const auto& [rank, count] : times) {
    if (count > times[most]) most = rank;
  }
  return most;
}

Json to_json(const Status& status) {
  Json json = {{"running", !status.holder.empty()},
               {"holder", status.holder},
               {"total_steps", status.total_steps},
               {"seconds_since_last_line", status.seconds_since},
               {"latest_checkpoint", status.latest ? status.latest->filename().string() : ""}};
  if (!status.recent.eval.is_null()) json["last_evaluation"] = status.recent.eval;
  if (status.recent.steps.empty()) return json;
  json["step"] = status.recent.steps.back()["step"];
  json["loss"] = status.recent.steps.back().value("loss", Json());
  json["step_ms"] = mean_of(status.recent.steps, "step_ms");
  json["tokens_per_s"] = mean_of(status.recent.steps, "tokens_per_s");
  return json;
}

void print_steps(const Status& status) {
  if (status.recent.steps.empty()) {
    fmt::print("steps       none yet\n");
    return;
  }
  const Json& last = status.recent.steps.back();
  const auto step = last["step"].get<std::int64_t>();
  std::string left;
  if (status.total_steps > step) {
    left = fmt::format(", about {} left",
                       format_duration(mean_of(status.recent.steps, "step_ms") / 1e3 *
                                       static_cast<double>(status.total_steps - step)));
  }
  fmt::print("step        {}{}, loss {}, {} tokens/s, last one {} ago{}\n", step,
             status.total_steps > 0 ? fmt::format(" of {}", status.total_steps) : "",
             last.value("loss", Json()).dump(),
             format_count(mean_of(status.recent.steps, "tokens_per_s")),
             format_duration(status.seconds_since), left);
  const double waited = mean_of(status.recent.steps, "straggler_ms");
  const double step_ms = mean_of(status.recent.steps, "step_ms");
  if (waited > 0 && step_ms > 0) {
    fmt::print("slowest     rank {}; the others wait {:.1f} ms a step for the slowest, {:.1f} %\n",
               usual_straggler(status.recent.steps), waited, 100 * waited / step_ms);
  }
}

int print_status(const Arguments& arguments) {
  const Status status = read_status(arguments.path);
  if (arguments.json) {
    fmt::print("{}\n", to_json(status).dump(2));
    return static_cast<int>(ExitCode::ok);
  }
  fmt::print("run         {}, {}\n", arguments.path,
             status.holder.empty() ? "nobody holds it (as far as this machine can see)"
                                   : "in use by " + status.holder);
  print_steps(status);
  if (!status.recent.eval.is_null()) {
    std::string text;
    for (const auto& [domain, values] : status.recent.eval["eval"].items()) {
      if (!values.is_object()) continue;
      text +=
          fmt::format("  {} {} bits/byte", domain, values.value("bits_per_byte", Json()).dump());
    }
    fmt::print("held out    step {}:{}\n", status.recent.eval["step"].dump(), text);
  }
  fmt::print("checkpoint  {}\n", status.latest ? status.latest->filename().string() : "none yet");
  return static_cast<int>(ExitCode::ok);
}

}  // namespace

void add_status_command(CLI::App& app, Action& action) {
  CLI::App* command =
      app.add_subcommand("status", "How far a run is, read from its folder while it goes on");
  auto args = std::make_shared<Arguments>();
  command->add_option("path", args->path, "run folder")->required()->type_name("RUN");
  command->add_flag("--json", args->json, "one JSON object");
  command->footer(kFooter);
  command->callback([&action, args] { action = once([args] { return print_status(*args); }); });
}

}  // namespace arcus
