#include <fmt/format.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "launch/commands.hpp"
#include "launch/run_folder.hpp"
#include "launch/run_setup.hpp"
#include "src/base/error.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;

struct Arguments {
  std::vector<std::string> command;
  std::string run;
  std::string hosts;  ///< HOST[:RANKS],...
  std::string probe;
  std::int64_t retries = 10;
  double backoff_s = 5;
};

constexpr const char* kFooter =
    "COMMAND goes on from its latest checkpoint by itself, so starting it again is all there is "
    "to\n"
    "do. It is started again when a rank was lost or the program failed; not when it is done (0),\n"
    "when its command line, data or checkpoint is at fault (64, 65, 66), when a signal stopped it\n"
    "(75), and not when it fails a second time at the same step in the same way. Signals are "
    "passed\n"
    "on. With --hosts, {hosts} and {ranks} in COMMAND stand for the hosts that answer the probe "
    "and\n"
    "the sum of their ranks.\n"
    "\n"
    "Examples:\n"
    "  arcus supervise -- mpirun -np 4 arcus train my.toml\n"
    "  arcus supervise --hosts n1:8,n2:8,n3:8 --probe 'ssh -o ConnectTimeout=5 {host} true' -- \\\n"
    "    mpirun -np {ranks} --host {hosts} arcus train my.toml";

struct Host {
  std::string name;
  std::int64_t ranks = 1;
};

std::vector<Host> parse_hosts(const std::string& text) {
  std::vector<Host> hosts;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    const std::string word = text.substr(begin, end - begin);
    const std::size_t colon = word.find(':');
    Host host{word.substr(0, colon)};
    if (colon != std::string::npos) host.ranks = std::atoll(word.c_str() + colon + 1);
    ARCUS_REQUIRE(!host.name.empty() && host.ranks >= 1, ExitCode::usage,
                  "--hosts: \"{}\" is no HOST or HOST:RANKS", word);
    hosts.push_back(std::move(host));
    begin = end + 1;
  }
  return hosts;
}

std::string replaced(std::string text, const std::string& what, const std::string& by) {
  for (std::size_t at = 0; (at = text.find(what, at)) != std::string::npos; at += by.size()) {
    text.replace(at, what.size(), by);
  }
  return text;
}

/// The run folder of the `arcus train CONFIG --set ...` inside a command; empty where there is
/// none.
std::string run_dir_of(const std::vector<std::string>& command) {
  const auto train = std::find(command.begin(), command.end(), "train");
  if (train == command.end()) return {};
  std::string config;
  std::vector<std::string> sets;
  for (auto word = train + 1; word != command.end(); ++word) {
    const bool takes_value = *word == "--set" || *word == "--resume";
    if (*word == "--set" && word + 1 != command.end()) sets.push_back(*(word + 1));
    if (takes_value && word + 1 != command.end()) {
      ++word;
    } else if (!word->starts_with("-") && config.empty()) {
      config = *word;
    }
  }
  if (config.empty()) return {};
  const LoadedConfig loaded = try_load_config(config, sets);
  if (loaded.error) std::rethrow_exception(loaded.error);
  return loaded.config.run.dir;
}

// What signal handlers may touch.
volatile std::sig_atomic_t child_pid = 0;
volatile std::sig_atomic_t last_signal = 0;

extern "C" void pass_on(int number) {
  last_signal = number;
  if (child_pid > 0) ::kill(static_cast<pid_t>(child_pid), number);
}

/// Starts a command and waits for it: its exit code, 128 + the signal that ended it.
int run_command(const std::vector<std::string>& words) {
  std::vector<char*> argv;
  for (const std::string& word : words) argv.push_back(const_cast<char*>(word.c_str()));
  argv.push_back(nullptr);
  const pid_t pid = ::fork();
  ARCUS_REQUIRE(pid >= 0, ExitCode::usage, "cannot start {}: {}", words[0], std::strerror(errno));
  if (pid == 0) {
    ::execvp(argv[0], argv.data());
    fmt::print(stderr, "arcus: error: cannot start {}: {}\n", words[0], std::strerror(errno));
    ::_exit(static_cast<int>(ExitCode::usage));
  }
  child_pid = pid;
  if (last_signal != 0) ::kill(pid, last_signal);  // it came between two children
  int status = 0;
  while (::waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  child_pid = 0;
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

bool is_final(int code) {
  for (const ExitCode final : {ExitCode::ok, ExitCode::usage, ExitCode::data, ExitCode::checkpoint,
                               ExitCode::interrupted}) {
    if (code == static_cast<int>(final)) return true;
  }
  return false;
}

class Supervisor {
 public:
  explicit Supervisor(const Arguments& arguments)
      : arguments_(arguments),
        run_(!arguments.run.empty() ? arguments.run : run_dir_of(arguments.command)),
        hosts_(parse_hosts(arguments.hosts)) {
    ARCUS_REQUIRE(
        !run_.empty(), ExitCode::usage,
        "no `train CONFIG.toml` with a run.dir in the command; name the run's folder with "
        "--run");
    ARCUS_REQUIRE(arguments.probe.empty() || !hosts_.empty(), ExitCode::usage,
                  "--probe asks hosts; give them with --hosts");
  }

  int run() {
    for (const int number : {SIGUSR1, SIGTERM, SIGINT}) std::signal(number, pass_on);
    for (std::int64_t restarts = 0;; ++restarts) {
      const std::int64_t before = last_step(run_);
      const int code = run_command(command());
      if (is_final(code) || last_signal != 0) return code;
      const std::int64_t step = last_step(run_);
      say(fmt::format("the command ended with {} after step {}", describe(code), step));
      if (failed_ == std::pair(step, code)) {
        say(fmt::format("that is the second time at step {} in the same way: giving up", step + 1));
        return code;
      }
      failed_ = std::pair(step, code);
      if (restarts == arguments_.retries) {
        say(fmt::format("started again {} times (--retries): giving up", restarts));
        return code;
      }
      wait(step > before);
      if (last_signal != 0) return code;
    }
  }

 private:
  static constexpr double kLongestWait = 300;

  static void say(const std::string& text) {
    fmt::print(stderr, "arcus supervise: {}\n", text);
    std::fflush(stderr);
  }
  static std::string describe(int code) {
    return code > 128 ? fmt::format("exit code {} (signal {})", code, code - 128)
                      : fmt::format("exit code {}", code);
  }

  /// Twice as long after every failure that brought nothing on.
  void wait(bool got_on) {
    wait_s_ = got_on || wait_s_ == 0 ? arguments_.backoff_s : std::min(kLongestWait, 2 * wait_s_);
    say(fmt::format("starting it again in {:.1f} s", wait_s_));
    const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(wait_s_);
    while (std::chrono::steady_clock::now() < until && last_signal == 0) {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
  }

  /// The command on the hosts that answer.
  std::vector<std::string> command() const {
    std::string names;
    std::int64_t ranks = 0;
    for (const Host& host : hosts_) {
      if (!answers(host)) {
        say(fmt::format("{} does not answer the probe and is left out", host.name));
        continue;
      }
      names += fmt::format("{}{}:{}", names.empty() ? "" : ",", host.name, host.ranks);
      ranks += host.ranks;
    }
    ARCUS_REQUIRE(hosts_.empty() || ranks > 0, ExitCode::comm, "no host answers the probe");
    std::vector<std::string> words = arguments_.command;
    if (hosts_.empty()) return words;
    for (std::string& word : words) {
      word = replaced(replaced(word, "{hosts}", names), "{ranks}", std::to_string(ranks));
    }
    return words;
  }

  bool answers(const Host& host) const {
    if (arguments_.probe.empty()) return true;
    return run_command({"sh", "-c", replaced(arguments_.probe, "{host}", host.name)}) == 0;
  }

  const Arguments& arguments_;
  fs::path run_;
  std::vector<Host> hosts_;
  std::optional<std::pair<std::int64_t, int>> failed_;  ///< step and exit code
  double wait_s_ = 0;
};

}  // namespace

void add_supervise_command(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand(
      "supervise", "Start a training command again from its latest checkpoint when it fails");
  auto args = std::make_shared<Arguments>();
  command->add_option("command", args->command, "what to start, behind --")
      ->required()
      ->type_name("COMMAND");
  command->add_option("--run", args->run, "the run's folder, where the command does not tell")
      ->type_name("DIR");
  command->add_option("--hosts", args->hosts, "hosts and their ranks")->type_name("HOST:RANKS,...");
  command->add_option("--probe", args->probe, "command that succeeds where {host} can be used")
      ->type_name("COMMAND");
  command->add_option("--retries", args->retries, "times to start it again at most")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber)
      ->type_name("N");
  command
      ->add_option("--backoff", args->backoff_s,
                   "seconds to wait, doubled as long as nothing gets on")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber)
      ->type_name("S");
  command->footer(kFooter);
  command->callback([&action, args] { action = [args] { return Supervisor(*args).run(); }; });
}

}  // namespace arcus
