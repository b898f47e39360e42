#include <fmt/format.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
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

#include "checkpoints/checkpoint.hpp"
#include "launch/checks.hpp"
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

constexpr std::int64_t kMostRanks = 1 << 20;  ///< of a host

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
    bool number = true;
    if (colon != std::string::npos) {
      const char* last = word.data() + word.size();
      const auto [rest, error] = std::from_chars(word.data() + colon + 1, last, host.ranks);
      number = error == std::errc() && rest == last && host.ranks <= kMostRanks;
    }
    ARCUS_REQUIRE(!host.name.empty() && number && host.ranks >= 1, ExitCode::usage,
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

/// The words behind `train` of an `arcus train` command, with --key=value as two words; empty where
/// there is none.
std::vector<std::string> training_words(const std::vector<std::string>& command) {
  std::vector<std::string> words;
  const auto train = std::find(command.begin(), command.end(), "train");
  for (auto word = train; word != command.end(); ++word) {
    const std::size_t equals = word->starts_with("--") ? word->find('=') : std::string::npos;
    words.push_back(word->substr(0, equals));
    if (equals != std::string::npos) words.push_back(word->substr(equals + 1));
  }
  return words;
}

/// The run folder of the `arcus train CONFIG --set ...` inside a command; empty where there is
/// none.
std::string run_dir_of(const std::vector<std::string>& command) {
  const std::vector<std::string> words = training_words(command);
  std::string config;
  std::vector<std::string> sets;
  for (std::size_t i = 1; i < words.size(); ++i) {
    const bool takes_value = words[i] == "--set" || words[i] == "--resume";
    if (words[i] == "--set" && i + 1 < words.size()) sets.push_back(words[i + 1]);
    if (takes_value) {
      ++i;
    } else if (!words[i].starts_with("-") && config.empty()) {
      config = words[i];
    }
  }
  if (config.empty()) return {};
  const LoadedConfig loaded = try_load_config(config, sets);
  if (loaded.error) std::rethrow_exception(loaded.error);
  return loaded.config.run.dir;
}

/// What --resume asks for is meant for the first start: later ones go on from the run's latest
/// checkpoint.
void resume_automatically(std::vector<std::string>& command) {
  const auto train = std::find(command.begin(), command.end(), "train");
  for (auto word = train; word != command.end(); ++word) {
    if (word->starts_with("--resume=")) *word = "--resume=auto";
    if (*word == "--resume" && word + 1 != command.end()) *(word + 1) = "auto";
  }
}

// What signal handlers may touch.
volatile std::sig_atomic_t child_pid = 0;
volatile std::sig_atomic_t last_signal = 0;

/// A terminal's Ctrl-C reaches the child without us, and a second one would mean "at once".
extern "C" void pass_on(int number, siginfo_t* info, void* /*context*/) {
  last_signal = number;
  if (child_pid > 0 && info->si_code != SI_KERNEL) ::kill(static_cast<pid_t>(child_pid), number);
}

constexpr std::array<int, 3> kSignals{SIGUSR1, SIGTERM, SIGINT};

void set_handlers() {
  struct sigaction action = {};
  action.sa_sigaction = pass_on;
  action.sa_flags = SA_SIGINFO | SA_RESTART;
  sigemptyset(&action.sa_mask);
  for (const int number : kSignals) sigaction(number, &action, nullptr);
}

/// Starts a command and waits for it: its exit code, 128 + the signal that ended it. Signals are
/// passed on to it if it is the `main` one.
int run_command(const std::vector<std::string>& words, bool main) {
  std::vector<char*> argv;
  for (const std::string& word : words) argv.push_back(const_cast<char*>(word.c_str()));
  argv.push_back(nullptr);
  // None may come between fork and the child's own handlers, or before the child is known.
  sigset_t blocked, before;
  sigemptyset(&blocked);
  for (const int number : kSignals) sigaddset(&blocked, number);
  sigprocmask(SIG_BLOCK, &blocked, &before);
  if (main && last_signal != 0) {
    sigprocmask(SIG_SETMASK, &before, nullptr);
    return 128 + last_signal;
  }
  const pid_t pid = ::fork();
  if (pid == 0) {
    for (const int number : kSignals) std::signal(number, SIG_DFL);
    sigprocmask(SIG_SETMASK, &before, nullptr);
    ::execvp(argv[0], argv.data());
    fmt::print(stderr, "arcus: error: cannot start {}: {}\n", words[0], std::strerror(errno));
    ::_exit(static_cast<int>(ExitCode::usage));
  }
  child_pid = main && pid > 0 ? pid : 0;
  sigprocmask(SIG_SETMASK, &before, nullptr);
  ARCUS_REQUIRE(pid > 0, ExitCode::usage, "cannot start {}: {}", words[0], std::strerror(errno));
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
        command_(arguments.command),
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
    set_handlers();
    const std::string saved_before = latest_save();
    for (std::int64_t restarts = 0;; ++restarts) {
      const std::int64_t before = last_step(run_);
      const auto log_before = log_size();
      const auto words = command();
      // Without hosts: as if it had been tried.
      const int code = words.empty() ? static_cast<int>(ExitCode::comm) : run_command(words, true);
      if (last_signal != 0 || is_final(code)) return code;
      const std::int64_t step = last_step(run_);
      say(fmt::format("the command ended with {} after step {}", describe(code), step));
      const bool began = log_size() != log_before;
      if (began && failed_ == std::pair(step, code)) {
        say(fmt::format("that is the second time at step {} in the same way: giving up", step + 1));
        return code;
      }
      // What ends before the run has begun (a node that is not back yet) is no failure of a step.
      if (began) failed_ = std::pair(step, code);
      if (restarts == arguments_.retries) {
        say(fmt::format("started again {} times (--retries): giving up", restarts));
        return code;
      }
      wait(step > before);
      if (last_signal != 0) return 128 + last_signal;
      // Until the run has saved something of its own, the checkpoint that was named counts.
      if (latest_save() != saved_before) resume_automatically(command_);
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

  /// Tells one save from the next: the latest checkpoint and when it was made.
  std::string latest_save() const {
    std::error_code error;
    const auto latest = find_latest(run_);
    if (!latest) return {};
    const auto written = fs::last_write_time(*latest / "CHECKSUMS", error);
    return fmt::format("{} {}", latest->string(), written.time_since_epoch().count());
  }

  /// run.log grows when a run begins.
  std::uintmax_t log_size() const {
    std::error_code error;
    const std::uintmax_t size = fs::file_size(run_ / "run.log", error);
    return error ? 0 : size;
  }

  /// The command on the hosts that answer; empty where none does.
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
    if (!hosts_.empty() && ranks == 0) {
      say("no host answers the probe");
      return {};
    }
    std::vector<std::string> words = command_;
    if (hosts_.empty()) return words;
    for (std::string& word : words) {
      word = replaced(replaced(word, "{hosts}", names), "{ranks}", std::to_string(ranks));
    }
    return words;
  }

  bool answers(const Host& host) const {
    if (arguments_.probe.empty()) return true;
    return run_command({"sh", "-c", replaced(arguments_.probe, "{host}", host.name)}, false) == 0;
  }

  const Arguments& arguments_;
  std::vector<std::string> command_;
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
      ->check(whole_number(0))
      ->type_name("N");
  command
      ->add_option("--backoff", args->backoff_s,
                   "seconds to wait, doubled as long as nothing gets on")
      ->capture_default_str()
      ->check(number_of_at_least(0))
      ->type_name("S");
  command->footer(kFooter);
  command->callback([&action, args] { action = [args] { return Supervisor(*args).run(); }; });
}

}  // namespace arcus
