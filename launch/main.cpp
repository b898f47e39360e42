#include <fmt/format.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "launch/commands.hpp"
#include "launch/option_table.hpp"
#include "launch/session.hpp"
#include "launch/version.hpp"
#include "src/base/error.hpp"

namespace arcus {
namespace {

constexpr const char* kDescription =
    "Arcus trains mixture-of-experts language models: every MPI rank owns a subset of the experts.";

constexpr const char* kFooter =
    "A first run:\n"
    "  arcus prepare --out data/books --domain prose=~/books\n"
    "  mpirun -np 2 arcus train run.toml --set run.data=data/books\n"
    "  arcus generate runs/first --prompt \"In the beginning\"\n"
    "\n"
    "`arcus COMMAND --help` explains a command, `arcus help config` every key of a run's\n"
    "configuration, `arcus help exit-codes` what the exit code means.";

/// The command nearest to a misspelt one, or "".
std::string suggestion(const CLI::App& app, const std::string& word) {
  std::vector<std::string> names;
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; }))
    names.push_back(command->get_name());
  const std::vector<std::string> near = nearest_names(word, names);
  return near.empty() ? "" : fmt::format("; did you mean `arcus {}`?", near.front());
}

/// Prints what is wrong with the command line. Under a launcher one rank speaks for all; the others
/// leave a little later, since a launcher ends everybody once the first rank is gone.
int report_usage(const CLI::App& app, const CLI::ParseError& error, int argc, char** argv) {
  if (error.get_exit_code() == 0) {  // --help, --version
    return once([&] { return app.exit(error); })();
  }
  if (launcher_rank() == 0) {
    const bool command_unknown =
        argc > 1 && argv[1][0] != '-' && find_command(app, argv[1]) == nullptr;
    if (command_unknown) {
      fmt::print(stderr, "arcus: error: unknown command \"{}\"{}\n", argv[1],
                 suggestion(app, argv[1]));
    } else {
      const std::string command = argc > 1 && argv[1][0] != '-' ? fmt::format(" {}", argv[1]) : "";
      fmt::print(stderr, "arcus: error: {}; `arcus{} --help` shows what it takes\n", error.what(),
                 command);
    }
  } else {
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
  }
  return static_cast<int>(ExitCode::usage);
}

int run(int argc, char** argv) {
  CLI::App app(kDescription, "arcus");
  app.footer(kFooter);
  app.set_version_flag("--version", version_text, "version, commit, instruction sets, libraries");
  app.require_subcommand(0, 1);
  app.get_formatter()->column_width(34);
  Action action;
  add_prepare_command(app, action);
  add_train_command(app, action);
  add_eval_command(app, action);
  add_generate_command(app, action);
  add_inspect_command(app, action);
  add_diff_command(app, action);
  add_convert_command(app, action);
  add_export_command(app, action);
  add_import_command(app, action);
  add_upcycle_command(app, action);
  add_merge_command(app, action);
  add_status_command(app, action);
  add_supervise_command(app, action);
  add_bench_command(app, action);
  add_tokenize_command(app, action);
  add_help_command(app, action);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return report_usage(app, error, argc, argv);
  }
  if (!action) {
    action = once([&] {
      fmt::print("{}", app.help());
      return static_cast<int>(ExitCode::ok);
    });
  }
  return action();
}

}  // namespace
}  // namespace arcus

int main(int argc, char** argv) {
  try {
    const int code = arcus::run(argc, argv);
    // What was printed may matter as much as a file: a full disk behind a pipe is an error.
    ARCUS_REQUIRE(std::fflush(stdout) == 0 && std::ferror(stdout) == 0, arcus::ExitCode::usage,
                  "cannot write standard output: {}", std::strerror(errno));
    return code;
  } catch (const std::exception& error) {
    return arcus::report_failure(error);
  }
}
