#include "src/base/host.hpp"

#include <unistd.h>

#include <array>
#include <cstdlib>

namespace arcus {

std::string machine_name() {
  std::array<char, 256> name{};
  return ::gethostname(name.data(), name.size() - 1) == 0 ? name.data() : "unknown host";
}

std::string node_name() {
  const char* node = std::getenv("SLURMD_NODENAME");
  return node != nullptr ? node : machine_name();
}

}  // namespace arcus
