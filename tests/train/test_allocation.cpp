// Law: once warm, a step neither allocates memory nor builds a primitive. Every allocation of the
// process is counted by replacing malloc and its relatives. oneDNN 2.6 puts the arguments of each
// dnnl_primitive_execute into a hash map: those few dozen bytes a call cannot be avoided from
// outside; they are counted apart, and nothing larger is let through.

#include <dlfcn.h>
#include <gtest/gtest.h>
#include <oneapi/dnnl/dnnl.h>

#include <atomic>
#include <cerrno>

#include "tests/support/gpt2_blocks.hpp"
#include "tests/support/routing_cases.hpp"
#include "tests/support/training_fixture.hpp"

// glibc's own entry points, so that counting does not recurse.
extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);
}

namespace {
std::atomic<bool> counting{false};
struct Counter {
  std::atomic<std::int64_t> allocations{0}, bytes{0}, largest{0};

  void add(std::int64_t size) {
    ++allocations;
    bytes += size;
    std::int64_t seen = largest.load();
    while (seen < size && !largest.compare_exchange_weak(seen, size)) {
    }
  }
  void reset() { allocations = bytes = largest = 0; }
};
Counter elsewhere, in_execute;
std::atomic<std::int64_t> executions{0};
thread_local bool executing = false;

void count(std::size_t bytes) {
  if (!counting.load(std::memory_order_relaxed)) return;
  (executing ? in_execute : elsewhere).add(static_cast<std::int64_t>(bytes));
}
}  // namespace

extern "C" {
void* malloc(std::size_t bytes) {
  count(bytes);
  return __libc_malloc(bytes);
}
void* calloc(std::size_t n, std::size_t bytes) {
  count(n * bytes);
  return __libc_calloc(n, bytes);
}
void* realloc(void* old, std::size_t bytes) {
  count(bytes);
  return __libc_realloc(old, bytes);
}
void* aligned_alloc(std::size_t alignment, std::size_t bytes) {
  count(bytes);
  return __libc_memalign(alignment, bytes);
}
void* memalign(std::size_t alignment, std::size_t bytes) {
  count(bytes);
  return __libc_memalign(alignment, bytes);
}
int posix_memalign(void** out, std::size_t alignment, std::size_t bytes) {
  count(bytes);
  *out = __libc_memalign(alignment, bytes);
  return *out == nullptr ? ENOMEM : 0;
}
}

extern "C" dnnl_status_t dnnl_primitive_execute(const_dnnl_primitive_t primitive,
                                                dnnl_stream_t stream, int nargs,
                                                const dnnl_exec_arg_t* args) {
  static const auto real = reinterpret_cast<decltype(&dnnl_primitive_execute)>(
      dlsym(RTLD_NEXT, "dnnl_primitive_execute"));
  ++executions;
  executing = true;
  const dnnl_status_t status = real(primitive, stream, nargs, args);
  executing = false;
  return status;
}

namespace arcus::testing {
namespace {

void count_in_steps(const TokenDataset& dataset, const TrainerOptions& options) {
  auto self = make_self_communicator();
  TrainingRun run(*self, 1, options, dataset);
  run.trainer().set_observer({});
  run.trainer().initialize();
  run.instance().build_primitives();
  StepRequests requests;
  for (int step = 0; step < 3; ++step) run.trainer().step(run.sampler(), requests);
  elsewhere.reset();
  in_execute.reset();
  executions = 0;
  counting = true;
  for (int step = 0; step < 5; ++step) run.trainer().step(run.sampler(), requests);
  counting = false;
  EXPECT_EQ(late_primitives(run.stream()), 0);
}

TEST(Allocation, TheCounterCounts) {
  counting = true;
  std::free(std::malloc(77));
  counting = false;
  EXPECT_GE(elsewhere.allocations.load(), 1);
}

void expect_nothing_allocated(const std::string& what) {
  EXPECT_EQ(elsewhere.allocations.load(), 0)
      << what << ": " << elsewhere.bytes << " bytes, largest " << elsewhere.largest;
  EXPECT_GT(executions.load(), 0);
  EXPECT_LE(in_execute.largest.load(), 128);
  EXPECT_LE(in_execute.allocations.load(), 8 * executions.load());
}

TEST(Allocation, AWarmStepAllocatesNothing) {
  const TemporaryFolder folder("arcus_allocation");
  const TokenDataset dataset = small_dataset(folder.path());
  for (const char* dtype : compute_dtypes()) {
    for (const double capacity_factor : {0.0, 1.0}) {
      TrainerOptions options = small_training();
      options.train.dtype = dtype;
      options.routing.capacity_factor = capacity_factor;
      options.model.num_shared_experts = 1;
      count_in_steps(dataset, options);
      expect_nothing_allocated(fmt::format("{}, capacity_factor {}", dtype, capacity_factor));
    }
  }
}

TEST(Allocation, NorWithBlocksLikeGpt2s) {
  const TemporaryFolder folder("arcus_allocation");
  const TokenDataset dataset = small_dataset(folder.path());
  for (const char* dtype : compute_dtypes()) {
    for (const bool recompute : {false, true}) {
      TrainerOptions options = small_training();
      options.train.dtype = dtype;
      options.train.recompute = recompute;
      use_gpt2_blocks(options.model, options.train.seq_len);
      options.model.num_shared_experts = 1;
      options.model.first_k_dense = 1;
      count_in_steps(dataset, options);
      expect_nothing_allocated(fmt::format("{}, recompute {}", dtype, recompute));
    }
  }
}

TEST(Allocation, NorWithAdapters) {
  const TemporaryFolder folder("arcus_allocation");
  const TokenDataset dataset = small_dataset(folder.path());
  for (const char* dtype : compute_dtypes()) {
    TrainerOptions options = small_training();
    options.train.dtype = dtype;
    options.model.num_shared_experts = 1;
    options.model.first_k_dense = 1;
    options.lora = {.rank = 6, .match = "_proj"};
    count_in_steps(dataset, options);
    expect_nothing_allocated(dtype);
    use_gpt2_blocks(options.model, options.train.seq_len);
    count_in_steps(dataset, options);
    expect_nothing_allocated(fmt::format("{}, blocks like GPT-2's", dtype));
  }
}

TEST(Allocation, NorWithAnyRouting) {
  const TemporaryFolder folder("arcus_allocation");
  const TokenDataset dataset = small_dataset(folder.path());
  for (const RoutingCase& routing : routing_cases()) {
    TrainerOptions options = small_training();
    routing.apply(options.model, options.routing);
    count_in_steps(dataset, options);
    expect_nothing_allocated(routing.name);
  }
}

}  // namespace
}  // namespace arcus::testing
