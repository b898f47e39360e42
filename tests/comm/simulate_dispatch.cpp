// Small exchanges of the flat and of the shared dispatcher under SimGrid's SMPI, which runs the
// ranks of a described cluster as contexts of one process and moves a clock of its own. Built and
// run by simulate_dispatch.sh.
//
//   simulate_dispatch RANKS_PER_NODE EXPERTS TOKENS...
//
// One line for every number of tokens a rank: nanoseconds of plan and of dispatch with combine.

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <exception>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "comm/mpi_comm.hpp"
#include "comm/token_dispatcher.hpp"
#include "src/base/rng.hpp"

extern "C" int smpi_nanosleep(const timespec* duration, timespec* rest);

namespace {

void sleep_simulated(std::int64_t nanoseconds) {
  const timespec duration = {.tv_sec = nanoseconds / 1'000'000'000,
                             .tv_nsec = nanoseconds % 1'000'000'000};
  smpi_nanosleep(&duration, nullptr);
}

/// What a look at a flag in shared memory costs, and so the time after which it is seen at most:
/// as much as a message inside a node.
constexpr std::int64_t kLookNanoseconds = 500;

}  // namespace

/// Ranks that wait for a flag yield their core, which lets other processes run. The other ranks are
/// contexts of this process here: they run when simulated time passes. Linked with
/// --wrap=sched_yield.
extern "C" int __wrap_sched_yield() {  // NOLINT(bugprone-reserved-identifier)
  sleep_simulated(kLookNanoseconds);
  return 0;
}

namespace arcus {
namespace {

constexpr std::int64_t kChoices = 4;
constexpr std::int64_t kHidden = 512;
/// Longer than anything takes that may still be under way.
constexpr std::int64_t kPauseNanoseconds = 10'000'000;

std::int64_t now() { return static_cast<std::int64_t>(MPI_Wtime() * 1e9); }

/// One dispatcher with a plan for T tokens of uniformly random routing, and its buffers.
class Exchange {
 public:
  Exchange(Communicator& comm, std::unique_ptr<TokenDispatcher> dispatcher)
      : comm_(comm),
        dispatcher_(std::move(dispatcher)),
        row_memory_(
            dispatcher_->make_row_memory((most_rows() + kWgradRowPadding) * kHidden * 4 + 4096)),
        arena_("simulated", std::int64_t{1} << 24) {
    const std::int64_t tokens = dispatcher_->options().max_tokens;
    plan_ = dispatcher_->make_plan_storage(arena_);
    expert_of_slot_ = arena_.allocate(DType::i32, tokens, kChoices);
    tokens_ = arena_.allocate(DType::f32, tokens, kHidden);
    rows_ = row_memory_.allocate(DType::f32, most_rows() + kWgradRowPadding, kHidden);
    const std::int64_t experts = dispatcher_->options().num_experts;
    const Rng rng(1, "simulated", fmt::format("rank {}", comm.rank()));
    std::vector<std::int32_t> order(static_cast<std::size_t>(experts));
    for (std::size_t e = 0; e < order.size(); ++e) order[e] = static_cast<std::int32_t>(e);
    for (std::int64_t t = 0; t < tokens; ++t) {
      // The first K of a shuffle: any K different experts.
      for (std::int64_t k = 0; k < kChoices; ++k) {
        const float draw =
            rng.uniform(static_cast<std::uint64_t>(k), static_cast<std::uint64_t>(t));
        const auto other = k + static_cast<std::int64_t>(draw * static_cast<float>(experts - k));
        std::swap(order[static_cast<std::size_t>(k)], order[static_cast<std::size_t>(other)]);
        expert_of_slot_.row<std::int32_t>(t)[k] = order[static_cast<std::size_t>(k)];
      }
      std::fill_n(tokens_.row<float>(t), kHidden, name_of_token(t));
    }
  }

  void make_plan() { dispatcher_->make_plan(stream_, expert_of_slot_, comm_.rank(), {}, plan_); }
  void there_and_back() {
    const TensorView received = rows_.row_range(0, plan_.num_recv_rows);
    stream_.wait(dispatcher_->dispatch(stream_, plan_, tokens_, {}, received, {}));
    SlotRows slot_rows;
    stream_.wait(dispatcher_->combine(stream_, plan_, received, {}, slot_rows));
    check(slot_rows);
    dispatcher_->finish_combine();
  }

 private:
  std::int64_t most_rows() const { return dispatcher_->max_recv_rows(); }
  /// Tells any two tokens of a run apart.
  float name_of_token(std::int64_t t) const {
    return static_cast<float>(comm_.rank() * dispatcher_->options().max_tokens + t + 1);
  }
  /// Experts change nothing here: every choice has to bring the token itself back.
  void check(const SlotRows& slot_rows) const {
    for (std::size_t slot = 0; slot < slot_rows.rows.size(); ++slot) {
      const float expected = name_of_token(static_cast<std::int64_t>(slot) / kChoices);
      const auto* row = static_cast<const float*>(slot_rows.rows[slot]);
      ARCUS_CHECK(std::count(row, row + kHidden, expected) == kHidden,
                  "rank {}: slot {} did not bring its token back", comm_.rank(), slot);
    }
  }

  Communicator& comm_;
  std::unique_ptr<TokenDispatcher> dispatcher_;
  Stream stream_{1};
  Arena row_memory_;
  Arena arena_;
  DispatchPlan plan_;
  TensorView expert_of_slot_, tokens_, rows_;
};

/// Nanoseconds from a common start to the end on the last rank.
std::int64_t measure(Communicator& comm, const std::function<void()>& fn) {
  Stream stream(1);
  const auto last = [&](std::int64_t time) {
    stream.wait(comm.all_reduce(stream, {{&time, DType::i64, 1, 1}, ReduceOp::max}));
    return time;
  };
  fn();  // what is made at first use; after that every turn takes the same time
  // All ranks read one clock, so they can begin at the same time, when no message is under way.
  const std::int64_t begin = last(now()) + kPauseNanoseconds;
  sleep_simulated(begin - now());
  fn();
  return last(now()) - begin;
}

struct Times {
  std::int64_t plan, exchange;
};

Times simulate(Communicator& comm, std::unique_ptr<TokenDispatcher> dispatcher) {
  ARCUS_CHECK(dispatcher != nullptr, "simulated ranks of one node cannot share memory");
  Exchange exchange(comm, std::move(dispatcher));
  Times times{};
  times.plan = measure(comm, [&] { exchange.make_plan(); });
  times.exchange = measure(comm, [&] { exchange.there_and_back(); });
  return times;
}

void simulate_all(int argc, char** argv) {
  MPI_Comm copy = MPI_COMM_NULL;
  ARCUS_MPI(MPI_Comm_dup(MPI_COMM_WORLD, &copy));
  // Told, not found out: SMPI's MPI_Comm_split_type lists the ranks that run when it is called.
  const int ranks_per_node = std::atoi(argv[1]);
  MpiComm comm(MpiHandle(copy), {.ranks_per_node = ranks_per_node});
  ARCUS_CHECK(comm.node_size() == ranks_per_node, "{} ranks on a node of the platform, not {}",
              comm.node_size(), ranks_per_node);
  for (int i = 3; i < argc; ++i) {
    const DispatcherOptions options = {.num_experts = std::atoll(argv[2]),
                                       .max_tokens = std::atoll(argv[i]),
                                       .slots_per_token = kChoices,
                                       .hidden_size = kHidden};
    const Times flat = simulate(comm, make_flat_dispatcher(comm, options));
    const Times rails = simulate(comm, make_shared_dispatcher(comm, options));
    if (comm.rank() != 0) continue;
    fmt::print("{} {} {} {} {}\n", options.max_tokens, flat.plan, rails.plan, flat.exchange,
               rails.exchange);
    std::fflush(stdout);
  }
}

}  // namespace
}  // namespace arcus

int main(int argc, char** argv) {
  // Not MpiSession, which asks for MPI_THREAD_MULTIPLE: a simulated rank has one thread.
  MPI_Init(&argc, &argv);
  try {
    arcus::simulate_all(argc, argv);
  } catch (const std::exception& error) {
    fmt::print(stderr, "simulate_dispatch: {}\n", error.what());
    std::_Exit(70);  // all ranks at once: they are one process
  }
  MPI_Finalize();
  return 0;
}
