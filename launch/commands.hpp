#pragma once

#include <CLI/CLI.hpp>

#include <functional>
#include <string>

namespace arcus {

/// What the command line asked for; returns the exit code. Set by the subcommand chosen, run after
/// the whole line was understood.
using Action = std::function<int()>;

/// For commands that one process does: under a launcher rank 0 alone, the others are done at once.
Action once(Action action);

/// The subcommand of that name, or null.
const CLI::App* find_command(const CLI::App& app, const std::string& name);

/// Each adds one subcommand to `app`; their files hold nothing else.
void add_prepare_command(CLI::App& app, Action& action);
void add_train_command(CLI::App& app, Action& action);
void add_eval_command(CLI::App& app, Action& action);
void add_generate_command(CLI::App& app, Action& action);
void add_inspect_command(CLI::App& app, Action& action);
void add_diff_command(CLI::App& app, Action& action);
void add_convert_command(CLI::App& app, Action& action);
void add_export_command(CLI::App& app, Action& action);
void add_import_command(CLI::App& app, Action& action);
void add_upcycle_command(CLI::App& app, Action& action);
void add_merge_command(CLI::App& app, Action& action);
void add_status_command(CLI::App& app, Action& action);
void add_supervise_command(CLI::App& app, Action& action);
void add_bench_command(CLI::App& app, Action& action);
void add_tokenize_command(CLI::App& app, Action& action);
void add_help_command(CLI::App& app, Action& action);

}  // namespace arcus
