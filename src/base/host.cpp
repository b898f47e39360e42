#include "src/base/host.hpp"

#include <sched.h>
#include <unistd.h>

#include <array>
#include <cstdlib>

namespace arcus {
namespace {

/// Of the process, before anything was bound.
const cpu_set_t processors_at_start = [] {
  cpu_set_t processors;
  CPU_ZERO(&processors);
  sched_getaffinity(0, sizeof processors, &processors);
  return processors;
}();

}  // namespace

void use_all_processors() {
  if (CPU_COUNT(&processors_at_start) > 0) {
    sched_setaffinity(0, sizeof processors_at_start, &processors_at_start);
  }
}

std::string machine_name() {
  std::array<char, 256> name{};
  return ::gethostname(name.data(), name.size() - 1) == 0 ? name.data() : "unknown host";
}

std::string node_name() {
  const char* node = std::getenv("SLURMD_NODENAME");
  return node != nullptr ? node : machine_name();
}

}  // namespace arcus
