#include "launch/commands.hpp"

#include <utility>

#include "launch/session.hpp"
#include "src/base/error.hpp"

namespace arcus {

Action once(Action action) {
  return [action = std::move(action)] {
    return launcher_rank() == 0 ? action() : static_cast<int>(ExitCode::ok);
  };
}

const CLI::App* find_command(const CLI::App& app, const std::string& name) {
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; })) {
    if (command->check_name(name)) return command;
  }
  return nullptr;
}

}  // namespace arcus
