#include <fmt/format.h>

#include <memory>
#include <string>

#include "launch/commands.hpp"
#include "launch/option_table.hpp"
#include "launch/run_config.hpp"
#include "src/base/error.hpp"
#include "src/model/routing_rules.hpp"

namespace arcus {
namespace {

constexpr const char* kExitCodes =
    "Exit codes of arcus:\n"
    "   0  done\n"
    "   1  `arcus diff`: the runs differ\n"
    "  64  command line or configuration; also a run that was given up because its steps are not\n"
    "      finite or explode (run.max_bad_steps)\n"
    "  65  training text, token files, tokenizers\n"
    "  66  a checkpoint is missing, damaged, does not fit, or could not be written at the end\n"
    "  69  communication failed or a rank is lost\n"
    "  70  a defect of Arcus (the message names file and line)\n"
    "  75  stopped by a signal, everything saved: start the same command again (mpirun itself\n"
    "      gives 1 where it was told by TERM or Ctrl-C)\n";

int print_help(const CLI::App& app, const std::string& topic) {
  if (topic.empty()) {
    // App::help() would give the help of the subcommand that was chosen, which is this one.
    fmt::print("{}", app.get_formatter()->make_help(&app, "arcus", CLI::AppFormatMode::Normal));
  } else if (topic == "config") {
    fmt::print("{}", config_help());
  } else if (topic == "routing") {
    fmt::print("{}", combinations_text());
  } else if (topic == "exit-codes") {
    fmt::print("{}", kExitCodes);
  } else if (const CLI::App* command = find_command(app, topic)) {
    fmt::print("{}", command->help("arcus"));
  } else {
    ARCUS_FAIL(
        ExitCode::usage,
        "no help on \"{}\"; topics are config, routing, exit-codes and the commands that `arcus "
        "--help` lists",
        topic);
  }
  return static_cast<int>(ExitCode::ok);
}

}  // namespace

void add_help_command(CLI::App& app, Action& action) {
  CLI::App* command =
      app.add_subcommand("help", "Help on a command, `config`, `routing` or `exit-codes`");
  auto topic = std::make_shared<std::string>();
  command->add_option(
      "topic", *topic,
      "a command, `config` (every key of a configuration file), `routing` (what goes "
      "with what) or `exit-codes`");
  command->footer(
      "Examples:\n"
      "  arcus help train\n"
      "  arcus help config > my.toml      # every key with its default");
  command->callback(
      [&app, &action, topic] { action = once([&app, topic] { return print_help(app, *topic); }); });
}

}  // namespace arcus
