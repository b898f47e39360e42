#include <gtest/gtest.h>

#include <cstdlib>
#include <new>
#include <vector>

#include "comm/token_dispatcher.hpp"
#include "tests/comm/collective_laws.hpp"
#include "tests/support/mpi_test.hpp"

namespace {
thread_local std::int64_t num_allocations = 0;
}  // namespace

// Every allocation of C++ code passes here; the MPI library allocates by malloc and is not counted.
void* operator new(std::size_t bytes) {
  ++num_allocations;
  if (void* memory = std::malloc(bytes)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t /*bytes*/) noexcept { std::free(memory); }

namespace arcus {
namespace {

/// Allocations of one warm call of `fn`.
template <class Fn>
std::int64_t allocations_of(Fn&& fn) {
  fn();
  const std::int64_t before = num_allocations;
  fn();
  return num_allocations - before;
}

TEST(Collectives, AllocateNothingOnceWarm) {
  for (const bool checked : {false, true}) {
    const auto comm = test_session().world({.checked = checked});
    Stream stream(1);
    const auto size = static_cast<std::size_t>(comm->size());
    const laws::Counts counts(size, 3), offsets = laws::prefix_sum(counts);
    std::vector<std::int64_t> a(size * 3), b(size * 3);
    const TensorView view(a.data(), DType::i64, 1, static_cast<std::int64_t>(a.size()));
    EXPECT_EQ(allocations_of([&] {
                stream.wait(comm->all_reduce(stream, {view}));
                stream.wait(comm->broadcast(stream, {view}));
                stream.wait(comm->all_gather_v(stream, {view, counts, offsets}));
                stream.wait(comm->reduce_scatter_v(stream, {view, counts, offsets}));
                stream.wait(comm->all_to_all_v(
                    stream, {a.data(), counts, offsets, b.data(), counts, offsets, 8}));
                comm->barrier(stream);
              }),
              0);
  }
}

void expect_no_allocations(Communicator& comm, DispatchPath path) {
  Stream stream(1);
  constexpr std::int64_t kTokens = 50, kSlots = 2, kHidden = 16;
  const auto dispatcher = make_dispatcher(
      comm,
      {.num_experts = 5, .max_tokens = kTokens, .slots_per_token = kSlots, .hidden_size = kHidden},
      path);
  Arena arena("test", std::int64_t{1} << 22);
  Arena memory = dispatcher->make_row_memory(std::int64_t{1} << 22);
  DispatchPlan plan = dispatcher->make_plan_storage(arena);
  const TensorView experts = arena.allocate(DType::i32, kTokens, kSlots);
  for (std::int64_t i = 0; i < kTokens * kSlots; ++i) {
    experts.as<std::int32_t>()[i] = static_cast<std::int32_t>((i * 7 + i / 3) % 6 - 1);
  }
  const TensorView tokens = arena.allocate(DType::f32, kTokens, kHidden);
  const TensorView weight = arena.allocate(DType::f32, kTokens, kSlots);
  const std::int64_t most = dispatcher->max_recv_rows();
  const TensorView rows = memory.allocate(DType::f32, most + kWgradRowPadding, kHidden);
  const TensorView scalars = memory.allocate(DType::f32, 1, most);
  SlotRows back;
  EXPECT_EQ(allocations_of([&] {
              dispatcher->make_plan(stream, experts, comm.rank(), {}, plan);
              const TensorView x = rows.row_range(0, plan.num_recv_rows);
              const TensorView w = scalars.col_range(0, plan.num_recv_rows);
              stream.wait(dispatcher->dispatch(stream, plan, tokens, weight, x, w));
              stream.wait(dispatcher->combine(stream, plan, x, w, back));
              dispatcher->finish_combine();
            }),
            0);
}

TEST(Dispatcher, AllocatesNothingOnceWarm) {
  expect_no_allocations(*test_session().world(), DispatchPath::flat);
}

TEST(Dispatcher, AllocatesNothingThroughSharedMemoryAndOverNodes) {
  for (const int ranks_per_node : {0, 1, 2}) {
    const auto comm = test_session().world({.ranks_per_node = ranks_per_node});
    if (comm->size() == 1) return;
    if (comm->share_memory(4096) == nullptr) GTEST_SKIP() << "processes cannot share memory here";
    expect_no_allocations(*comm, DispatchPath::shared);
  }
}

}  // namespace
}  // namespace arcus
