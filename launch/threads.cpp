#include "launch/threads.hpp"

#include <fmt/format.h>
#include <hwloc.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <vector>

#include "src/base/error.hpp"

namespace arcus {
namespace {

struct Cores {
  int count = 1;
  std::string mask;  ///< the processors this process is bound to
};

/// Cores that intersect the process's binding.
Cores bound_cores() {
  Cores cores;
  hwloc_topology_t topology = nullptr;
  if (hwloc_topology_init(&topology) != 0) return cores;
  const std::unique_ptr<hwloc_topology, void (*)(hwloc_topology_t)> topology_owner(
      topology, hwloc_topology_destroy);
  if (hwloc_topology_load(topology) != 0) return cores;
  const std::unique_ptr<hwloc_bitmap_s, void (*)(hwloc_bitmap_t)> binding(hwloc_bitmap_alloc(),
                                                                          hwloc_bitmap_free);
  if (hwloc_get_cpubind(topology, binding.get(), HWLOC_CPUBIND_PROCESS) != 0) {
    hwloc_bitmap_copy(binding.get(), hwloc_topology_get_allowed_cpuset(topology));
  }
  int count = 0;
  hwloc_obj_t core = nullptr;
  while ((core = hwloc_get_next_obj_by_type(topology, HWLOC_OBJ_CORE, core)) != nullptr) {
    count += hwloc_bitmap_intersects(core->cpuset, binding.get());
  }
  cores.count = std::max(1, count);
  char* text = nullptr;
  if (hwloc_bitmap_asprintf(&text, binding.get()) >= 0) {
    cores.mask = text;
    std::free(text);
  }
  return cores;
}

/// The container's limit on processor time, in cores; 0 = none.
int quota_cores() {
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  double quota = 0;
  double period = 0;
  // The file says "max 100000" where there is no limit, which is no number.
  if (!(file >> quota >> period) || period <= 0) return 0;
  return std::max(1, static_cast<int>(std::ceil(quota / period)));
}

std::string host_name() {
  char name[256] = {};
  gethostname(name, sizeof(name) - 1);
  return name;
}

/// OMP_NUM_THREADS (its first number), 0 when unset.
int threads_from_environment() {
  const char* text = std::getenv("OMP_NUM_THREADS");
  if (text == nullptr || *text == '\0') return 0;
  const int threads = std::atoi(text);
  ARCUS_REQUIRE(threads > 0, ExitCode::usage,
                "OMP_NUM_THREADS is \"{}\"; set it to a number of at least 1 or unset it", text);
  return threads;
}

}  // namespace

int available_cores() {
  const int quota = quota_cores();
  const int cores = bound_cores().count;
  return quota > 0 ? std::min(quota, cores) : cores;
}

namespace {

/// A few threads more than cores are legal (tests do it); thousands bring a machine down.
int checked_threads(const char* key, std::int64_t threads) {
  const std::int64_t most = std::max<std::int64_t>(16, 4 * available_cores());
  ARCUS_REQUIRE(threads <= most, ExitCode::usage,
                "{} is {}, but this machine has {} cores for the process; set it to {} or less, or "
                "to 0",
                key, threads, available_cores(), available_cores());
  return static_cast<int>(threads);
}

}  // namespace

int threads_per_rank(const ParallelConfig& parallel, Communicator& comm, Stream& stream) {
  if (parallel.threads > 0) return checked_threads("parallel.threads", parallel.threads);
  if (const int threads = threads_from_environment(); threads > 0) {
    return checked_threads("OMP_NUM_THREADS", threads);
  }
  const std::string place = fmt::format("{} {}", host_name(), bound_cores().mask);
  const std::vector<std::string> places = gather_texts(comm, stream, place);
  const auto sharers = std::count(places.begin(), places.end(), place);
  return std::max(1, available_cores() / static_cast<int>(std::max<std::ptrdiff_t>(1, sharers)));
}

}  // namespace arcus
