#include "launch/signals.hpp"

#include <atomic>
#include <csignal>

namespace arcus {
namespace {

std::atomic<int> received{0};
std::atomic<bool> ignored{false};
static_assert(std::atomic<int>::is_always_lock_free, "used in a signal handler");

extern "C" void on_stop_signal(int number) {
  int none = 0;
  const bool first = received.compare_exchange_strong(none, number);
  // The user insists: give the signal its default meaning back and send it again.
  if (!first && number == SIGINT) {
    std::signal(number, SIG_DFL);
    std::raise(number);
  }
}

void set_handler(int number, void (*handler)(int)) {
  struct sigaction action = {};
  action.sa_handler = handler;
  sigemptyset(&action.sa_mask);
  action.sa_flags = SA_RESTART;
  sigaction(number, &action, nullptr);
}

}  // namespace

void install_signal_handlers() {
  for (const int number : {SIGUSR1, SIGTERM, SIGINT}) set_handler(number, on_stop_signal);
  // A file that grows past `ulimit -f` is then an error of write, reported like a full disk.
  std::signal(SIGXFSZ, SIG_IGN);
}

void ignore_stop_requests() {
  ignored = true;
  for (const int number : {SIGUSR1, SIGTERM, SIGINT}) set_handler(number, SIG_DFL);
}

bool stop_requested() { return received.load() != 0 && !ignored.load(); }

const char* stop_signal_name() {
  switch (received.load()) {
    case SIGUSR1:
      return "USR1";
    case SIGTERM:
      return "TERM";
    case SIGINT:
      return "INT";
    default:
      return "";
  }
}

}  // namespace arcus
