#include "launch/threads.hpp"

#include <fmt/format.h>
#include <hwloc.h>
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <utility>
#include <vector>

#include "src/base/error.hpp"
#include "src/base/host.hpp"

namespace arcus {
namespace {

using Bitmap = std::unique_ptr<hwloc_bitmap_s, void (*)(hwloc_bitmap_t)>;
Bitmap make_bitmap() { return {hwloc_bitmap_alloc(), hwloc_bitmap_free}; }

/// The machine as hwloc sees it.
class Machine {
 public:
  Machine() {
    if (hwloc_topology_init(&topology_) != 0) return;
    loaded_ = hwloc_topology_load(topology_) == 0;
  }
  ~Machine() {
    if (topology_ != nullptr) hwloc_topology_destroy(topology_);
  }
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;

  /// The processors this process is bound to; empty = unknown.
  Bitmap binding() const {
    Bitmap binding = make_bitmap();
    if (loaded_ && hwloc_get_cpubind(topology_, binding.get(), HWLOC_CPUBIND_PROCESS) != 0) {
      hwloc_bitmap_copy(binding.get(), hwloc_topology_get_allowed_cpuset(topology_));
    }
    return binding;
  }
  /// Its cores, each as the processors of it that belong to `binding`.
  std::vector<Bitmap> cores(const Bitmap& binding) const {
    std::vector<Bitmap> cores;
    hwloc_obj_t core = nullptr;
    while (loaded_ && (core = hwloc_get_next_obj_by_type(topology_, HWLOC_OBJ_CORE, core))) {
      Bitmap own = make_bitmap();
      hwloc_bitmap_and(own.get(), core->cpuset, binding.get());
      if (!hwloc_bitmap_iszero(own.get())) cores.push_back(std::move(own));
    }
    return cores;
  }
  /// False where the system does not let the calling thread be bound.
  bool bind_this_thread(const Bitmap& processors) const {
    return hwloc_set_cpubind(topology_, processors.get(), HWLOC_CPUBIND_THREAD) == 0;
  }

 private:
  hwloc_topology_t topology_ = nullptr;
  bool loaded_ = false;
};

std::string text_of(const Bitmap& bitmap) {
  char* text = nullptr;
  if (hwloc_bitmap_asprintf(&text, bitmap.get()) < 0) return {};
  std::string copy = text;
  std::free(text);
  return copy;
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
  const Machine machine;
  const int cores = std::max(1, static_cast<int>(machine.cores(machine.binding()).size()));
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

/// Which of the ranks that may use the same cores of the same host this one is, and how many.
struct Sharers {
  int index = 0, count = 1;
};

Sharers find_sharers(const Bitmap& binding, Communicator& comm, Stream& stream) {
  const std::string place = fmt::format("{} {}", machine_name(), text_of(binding));
  const std::vector<std::string> places = gather_texts(comm, stream, place);
  const auto before = std::count(places.begin(), places.begin() + comm.rank(), place);
  return {static_cast<int>(before),
          static_cast<int>(std::count(places.begin(), places.end(), place))};
}

void bind_threads(int threads, Communicator& comm, Stream& stream) {
  const Machine machine;
  const Bitmap binding = machine.binding();
  const std::vector<Bitmap> cores = machine.cores(binding);
  const Sharers sharers = find_sharers(binding, comm, stream);
  ARCUS_REQUIRE(
      static_cast<std::size_t>(sharers.count) * static_cast<std::size_t>(threads) <= cores.size(),
      ExitCode::usage,
      "parallel.bind is \"cores\", but {} rank{} of {} thread{} share {} core{} of {}; "
      "set it to \"none\", or start fewer ranks or threads there",
      sharers.count, sharers.count == 1 ? "" : "s", threads, threads == 1 ? "" : "s", cores.size(),
      cores.size() == 1 ? "" : "s", machine_name());
  std::atomic<int> failed{0};
#pragma omp parallel num_threads(threads)
  {
    const int core = sharers.index * threads + omp_get_thread_num();
    if (!machine.bind_this_thread(cores[static_cast<std::size_t>(core)])) ++failed;
  }
  ARCUS_REQUIRE(failed == 0, ExitCode::usage,
                "parallel.bind is \"cores\", but this system does not let threads be bound; set it "
                "to \"none\"");
}

}  // namespace

int threads_per_rank(const ParallelConfig& parallel, Communicator& comm, Stream& stream) {
  if (parallel.threads > 0) return checked_threads("parallel.threads", parallel.threads);
  if (const int threads = threads_from_environment(); threads > 0) {
    return checked_threads("OMP_NUM_THREADS", threads);
  }
  const Sharers sharers = find_sharers(Machine().binding(), comm, stream);
  return std::max(1, available_cores() / sharers.count);
}

int set_up_threads(const ParallelConfig& parallel, Communicator& comm, Stream& stream) {
  const int threads = threads_per_rank(parallel, comm, stream);
  if (parallel.bind == "cores") bind_threads(threads, comm, stream);
  return threads;
}

}  // namespace arcus
