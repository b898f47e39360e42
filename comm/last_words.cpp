#include "comm/last_words.hpp"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <thread>

namespace arcus {

void say_last_words(int rank, int size, ExitCode code, std::string_view message) {
  using std::chrono::milliseconds;
  constexpr milliseconds kHeadStart(500), kPerRank(20), kCommHeadStart(1500);
  // A handler that asks for an orderly stop would keep this process alive after the launcher's
  // TERM.
  std::signal(SIGTERM, SIG_DFL);
  if (size > 1) {
    auto delay = rank == 0 ? milliseconds(0) : kHeadStart + kPerRank * std::min(rank, 50);
    if (code == ExitCode::comm) delay += kCommHeadStart;
    std::this_thread::sleep_for(delay);
  }
  spdlog::error("{}", message);
  spdlog::default_logger()->flush();
  std::fflush(nullptr);
}

}  // namespace arcus
