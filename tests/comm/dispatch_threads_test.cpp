#include <gtest/gtest.h>

#include "comm/backends.hpp"
#include "tests/comm/dispatch_laws.hpp"

namespace arcus {
namespace {

class Dispatch : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Ranks, Dispatch, testing::Values(1, 2, 3, 4, 7));

TEST_P(Dispatch, LawsOver200Routings) {
  run_on_threads(GetParam(), {}, [](Communicator& comm) { laws::check_situations(comm, 200); });
}
TEST_P(Dispatch, LawsThroughSharedMemory) {
  const DispatchPath path = GetParam() > 1 ? DispatchPath::shared : DispatchPath::automatic;
  run_on_threads(GetParam(), {},
                 [=](Communicator& comm) { laws::check_situations(comm, 200, path); });
}
// Nodes of one, two and three ranks; the last one may be smaller.
TEST_P(Dispatch, LawsOverNodes) {
  for (const int ranks_per_node : {1, 2, 3}) {
    if (GetParam() <= ranks_per_node) continue;
    SCOPED_TRACE(fmt::format("{} ranks a node", ranks_per_node));
    run_on_threads(GetParam(), {.ranks_per_node = ranks_per_node}, [](Communicator& comm) {
      laws::check_situations(comm, 200, DispatchPath::shared);
    });
  }
}
TEST_P(Dispatch, LawsWhenChecked) {
  run_on_threads(GetParam(), {.checked = true},
                 [](Communicator& comm) { laws::check_situations(comm, 20); });
}

// Ranks that wait for a flag of one that has failed end with its message.
TEST(SharedDispatch, NobodyWaitsForAFailedRank) {
  for (const int failing : {0, 1, 2}) {
    try {
      run_on_threads(3, {}, [=](Communicator& comm) {
        Stream stream(1);
        const auto dispatcher = make_dispatcher(
            comm, {.num_experts = 3, .max_tokens = 2, .slots_per_token = 1, .hidden_size = 4},
            DispatchPath::shared);
        Arena memory = dispatcher->make_row_memory(1 << 16);
        Arena arena("plan", std::int64_t{1} << 16);
        auto plan = dispatcher->make_plan_storage(arena);
        std::vector<std::int32_t> experts = {1, 2};
        dispatcher->make_plan(stream, {experts.data(), DType::i32, 2, 1}, comm.rank(), {}, plan);
        if (comm.rank() == failing) ARCUS_FAIL(ExitCode::data, "rank {} gives up", failing);
        laws::check_without_scalars<float>(stream, *dispatcher, plan, memory);
      });
      ADD_FAILURE() << "nothing was thrown";
    } catch (const Error& error) {
      EXPECT_EQ(std::string(error.what()), fmt::format("rank {} gives up", failing));
    }
  }
}

TEST(SharedDispatch, RowsElsewhereAreRefused) {
  EXPECT_THROW(
      run_on_threads(
          2, {},
          [](Communicator& comm) {
            Stream stream(1);
            const auto dispatcher = make_dispatcher(
                comm, {.num_experts = 2, .max_tokens = 1, .slots_per_token = 2, .hidden_size = 4},
                DispatchPath::shared);
            Arena memory = dispatcher->make_row_memory(1 << 16);
            Arena other("elsewhere", 1 << 16);
            auto plan = dispatcher->make_plan_storage(other);
            std::vector<std::int32_t> experts = {0, 1};
            dispatcher->make_plan(stream, {experts.data(), DType::i32, 1, 2}, comm.rank(), {},
                                  plan);
            laws::check_without_scalars<float>(stream, *dispatcher, plan, other);
          }),
      Error);
}

TEST(DispatchSelf, Laws) { laws::check_situations(*make_self_communicator(), 50); }

/// The 200 situations must contain what they are there for.
TEST(DispatchLaws, SituationsCoverTheEdges) {
  for (const int ranks : {1, 2, 3, 4, 7}) {
    int idle = 0, empty = 0, all_chosen = 0, one_expert = 0, drops = 0, uneven = 0, whole = 0;
    for (int seed = 0; seed < 200; ++seed) {
      const auto s = laws::Situation::draw(seed, ranks);
      all_chosen += s.options.slots_per_token == s.options.num_experts;
      one_expert += s.skew == laws::Skew::one_expert;
      uneven += s.options.num_experts % ranks != 0;
      for (int rank = 0; rank < ranks; ++rank) {
        idle += s.micro_batch(0, rank) < 0;
        empty += s.micro_batch(0, rank) >= 0 && s.num_tokens(0, rank) == 0;
        whole += s.num_tokens(0, rank) == s.options.max_tokens;
        const auto experts = s.expert_of_slot(0, rank);
        drops += std::count(experts.begin(), experts.end(), -1) > 0;
      }
    }
    for (const int n : {idle, empty, all_chosen, one_expert, drops, whole}) EXPECT_GT(n, 3);
    EXPECT_GT(uneven, ranks == 1 ? -1 : 20);
  }
}

// What leaves a node is every token once for each other node that has experts of it, and little
// beside: lists of copies, message headers.
TEST(SharedDispatch, SendsATokenOnceToANode) {
  run_on_threads(4, {.ranks_per_node = 2}, [](Communicator& comm) {
    constexpr std::int64_t kTokens = 64, kSlots = 4, kExperts = 8, kHidden = 512;
    Stream stream(1);
    const auto dispatcher = make_dispatcher(comm,
                                            {.num_experts = kExperts,
                                             .max_tokens = kTokens,
                                             .slots_per_token = kSlots,
                                             .hidden_size = kHidden},
                                            DispatchPath::shared);
    Arena memory = dispatcher->make_row_memory(std::int64_t{1} << 23);
    Arena arena("plan", std::int64_t{1} << 22);
    auto plan = dispatcher->make_plan_storage(arena);
    const TensorView experts = arena.allocate(DType::i32, kTokens, kSlots);
    const TensorView tokens = arena.allocate(DType::f32, kTokens, kHidden);
    const int node = comm.rank() / 2;
    std::int64_t leaving = 0;
    std::int64_t inside = 0;
    for (std::int64_t t = 0; t < kTokens; ++t) {
      bool leaves = false;
      for (std::int64_t k = 0; k < kSlots; ++k) {
        // Odd tokens stay on their node; the others have half of their experts there.
        const std::int64_t there = t % 2 == 1 || k < 2 ? node : 1 - node;
        const std::int64_t expert = there * 4 + (t / 2 + k) % 4;
        experts.row<std::int32_t>(t)[k] = static_cast<std::int32_t>(expert);
        leaves = leaves || there != node;
        inside += there == node && expert / 2 != comm.rank() ? 1 : 0;
      }
      leaving += leaves ? 1 : 0;
    }
    ASSERT_EQ(leaving, kTokens / 2);
    dispatcher->make_plan(stream, experts, comm.rank(), {}, plan);
    const std::int64_t before = comm.sent_bytes();
    const TensorView rows =
        memory.allocate(DType::f32, plan.num_recv_rows + kWgradRowPadding, kHidden);
    stream.wait(
        dispatcher->dispatch(stream, plan, tokens, {}, rows.row_range(0, plan.num_recv_rows), {}));
    const std::int64_t row_bytes = kHidden * 4;
    const auto sent = static_cast<double>(comm.sent_bytes() - before - inside * row_bytes);
    EXPECT_GE(sent, static_cast<double>(leaving * row_bytes));
    EXPECT_LE(sent, 1.02 * static_cast<double>(leaving * row_bytes));
    comm.barrier(stream);  // a rank that leaves counts as failed to those that still wait
  });
}

TEST(DispatchPlan, HoldsTheDocumentedOrder) {
  run_on_threads(2, {}, [](Communicator& comm) {
    Stream stream(1);
    const auto dispatcher = make_flat_dispatcher(
        comm, {.num_experts = 3, .max_tokens = 2, .slots_per_token = 2, .hidden_size = 4});
    Arena arena("plan", std::int64_t{1} << 16);
    auto plan = dispatcher->make_plan_storage(arena);
    // Rank 0 holds experts 0 and 1, rank 1 expert 2; rank 0 has the later micro-batch.
    std::vector<std::int32_t> experts = {2, 0, 0, -1};
    if (comm.rank() == 1) experts = {1, 0, 2, 0};
    dispatcher->make_plan(stream, {experts.data(), DType::i32, 2, 2}, 5 - comm.rank(), {}, plan);
    const auto list = [](auto span) { return std::vector<std::int64_t>(span.begin(), span.end()); };
    using List = std::vector<std::int64_t>;
    const bool first = comm.rank() == 0;
    EXPECT_EQ(list(plan.row_of_slot), first ? List({2, 0, 1, -1}) : List({2, 0, 3, 1}));
    EXPECT_EQ(list(plan.slot_of_row), first ? List({1, 2, 0}) : List({1, 3, 0, 2}));
    EXPECT_EQ(list(plan.send_counts), first ? List({2, 1}) : List({3, 1}));
    EXPECT_EQ(list(plan.recv_counts), first ? List({2, 3}) : List({1, 1}));
    EXPECT_EQ(list(plan.recv_offsets), first ? List({0, 2}) : List({0, 1}));
    List begins, rows;
    for (const Segment& s : plan.segments) {
      begins.push_back(s.row_begin);
      rows.push_back(s.rows);
    }
    // Expert 0: micro-batch 4 of rank 1 (rows 2, 3), then 5 of rank 0 (rows 0, 1); expert 1: row 4.
    EXPECT_EQ(begins, first ? List({2, 0, 4}) : List({1, 0}));
    EXPECT_EQ(rows, first ? List({2, 2, 1}) : List({1, 1}));
    EXPECT_EQ(plan.num_padded_rows, first ? 96 : 64);
  });
}

TEST(DispatchPlan, CountingArenaPlansItsBytes) {
  const auto comm = make_self_communicator();
  const DispatcherOptions options = {
      .num_experts = 4, .max_tokens = 100, .slots_per_token = 2, .hidden_size = 8};
  const auto dispatcher = make_flat_dispatcher(*comm, options);
  auto counting = Arena::counting("plan");
  dispatcher->make_plan_storage(counting);
  Arena arena("plan", counting.peak());
  EXPECT_NO_THROW(dispatcher->make_plan_storage(arena));
  EXPECT_EQ(dispatcher->max_recv_rows(), 200);
  EXPECT_EQ(dispatcher->max_padded_rows(), 200 + 4 * 31);
  EXPECT_EQ(dispatcher->buffer_bytes(), 200 * (2 * 32 + 3 * 4 + 8));
}

TEST(DispatchBounds, FollowCapacityAndExperts) {
  DispatcherOptions options = {
      .num_experts = 8, .max_tokens = 100, .slots_per_token = 4, .hidden_size = 8};
  EXPECT_EQ(max_recv_rows(options, 0, 3), 3 * 100 * 3);  // 3 experts
  EXPECT_EQ(max_recv_rows(options, 2, 3), 3 * 100 * 2);  // 2 experts
  EXPECT_EQ(max_recv_rows(options, 0, 1), 100 * 4);
  options.capacity = 10;
  EXPECT_EQ(max_recv_rows(options, 0, 3), 3 * 10 * 3);
  EXPECT_EQ(max_padded_rows(options, 0, 3), 9 * 32);
}

/// A communicator that passes everything on and falsifies the counts that rank 1 sends to rank 0.
class Falsified final : public Communicator {
 public:
  Falsified(Communicator& inner, std::size_t field)
      : Communicator(inner.rank(), inner.size(), inner.options()), inner_(inner), field_(field) {}
  [[noreturn]] void abort(ExitCode code, std::string_view message) override {
    ARCUS_FAIL(code, "{}", message);
  }

 protected:
  Event do_all_to_all_v(const AllToAllV& args) override {
    if (rank() == 1) ++static_cast<std::int64_t*>(const_cast<void*>(args.send))[field_];
    return inner_.all_to_all_v(stream_, args);
  }
  Event do_all_reduce(const AllReduce& args) override { return inner_.all_reduce(stream_, args); }
  Event do_all_gather_v(const AllGatherV& args) override {
    return inner_.all_gather_v(stream_, args);
  }
  Event do_reduce_scatter_v(const ReduceScatterV& args) override {
    return inner_.reduce_scatter_v(stream_, args);
  }
  Event do_broadcast(const Broadcast& args) override { return inner_.broadcast(stream_, args); }
  void do_barrier() override { inner_.barrier(stream_); }
  std::unique_ptr<Communicator> do_split(int color, int key) override {
    return inner_.split(color, key);
  }

 private:
  Communicator& inner_;
  Stream stream_{1};
  std::size_t field_;
};

struct PlanCase {
  DispatcherOptions options = {
      .num_experts = 6, .max_tokens = 2, .slots_per_token = 2, .hidden_size = 4};
  std::vector<std::int32_t> experts = {0, 5, 1, 2};
  std::int64_t micro_batch = 0;
  PlanTag tag = {7, 2};
};

/// What planning says when rank 1 of 3 differs as `change` tells.
std::string plan_error(const std::function<void(PlanCase&)>& change, int falsified_field = -1) {
  try {
    run_on_threads(3, {}, [&](Communicator& world) {
      PlanCase c;
      c.micro_batch = world.rank();
      if (world.rank() == 1) change(c);
      std::unique_ptr<Communicator> falsified;
      if (falsified_field >= 0) {
        falsified = std::make_unique<Falsified>(world, static_cast<std::size_t>(falsified_field));
      }
      Communicator& comm = falsified ? *falsified : world;
      Stream stream(1);
      const auto dispatcher = make_flat_dispatcher(comm, c.options);
      Arena arena("plan", std::int64_t{1} << 16);
      auto plan = dispatcher->make_plan_storage(arena);
      const auto tokens = static_cast<std::int64_t>(c.experts.size()) / c.options.slots_per_token;
      dispatcher->make_plan(stream,
                            {c.experts.data(), DType::i32, tokens, c.options.slots_per_token},
                            c.micro_batch, c.tag, plan);
    });
    return "none";
  } catch (const Error& error) {
    return error.what();
  }
}

TEST(DispatchPlan, CrossCheckNamesRankAndLayer) {
  const auto expect = [](const std::string& message, const std::string& part) {
    EXPECT_NE(message.find(part), std::string::npos) << message;
  };
  EXPECT_EQ(plan_error([](PlanCase&) {}), "none");
  expect(plan_error([](PlanCase& c) { c.tag.layer = 3; }),
         "rank 1 is at step 7, layer 3 while rank 0 is at step 7, layer 2");
  expect(plan_error([](PlanCase& c) { c.tag.step = 8; }), "rank 1 is at step 8, layer 2");
  expect(plan_error([](PlanCase& c) { c.micro_batch = 0; }),
         "step 7, layer 2: ranks 0 and 1 both have micro-batch 0");
  expect(plan_error([](PlanCase& c) { c.options.capacity = 1; }),
         "step 7, layer 2: rank 1 has another dispatch configuration than rank 0");
  expect(plan_error([](PlanCase& c) { c.experts[2] = 6; }),
         "token 1, choice 0 goes to expert 6 of 6");
  expect(plan_error([](PlanCase& c) { c.experts[2] = -2; }), "goes to expert -2");
  expect(plan_error([](PlanCase& c) { c.experts.resize(8); }), "made for 2 x 2");
  expect(plan_error([](PlanCase& c) { c.micro_batch = -1; }), "2 tokens of micro-batch -1");
  // Two tokens, both choices of each to expert 0: more rows than tokens.
  expect(plan_error([](PlanCase& c) {
           c.experts = {0, 0, 0, 0};
         }),
         "rank 1 (micro-batch 1) announces an impossible number of rows for one expert of rank 0");
  expect(plan_error([](PlanCase&) {}, 3),
         "rank 1 announces 3 rows for rank 0, its counts per expert add up to 2");
  expect(plan_error([](PlanCase&) {}, 5),
         "rank 1 announces 2 rows for rank 0, its counts per expert add up to 3");
}

TEST(Dispatch, RefusesBuffersThatDoNotFitThePlan) {
  const auto comm = make_self_communicator();
  Stream stream(1);
  const auto dispatcher = make_flat_dispatcher(
      *comm, {.num_experts = 2, .max_tokens = 2, .slots_per_token = 1, .hidden_size = 4});
  Arena arena("plan", std::int64_t{1} << 16);
  auto plan = dispatcher->make_plan_storage(arena);
  std::vector<std::int32_t> experts = {1, 0};
  dispatcher->make_plan(stream, {experts.data(), DType::i32, 2, 1}, 0, {}, plan);
  std::vector<float> memory(1024);
  const TensorView good(memory.data(), DType::f32, 2, 4), few(memory.data(), DType::f32, 1, 4),
      narrow(memory.data(), DType::f32, 2, 3), doubles(memory.data(), DType::f64, 2, 4),
      rows(memory.data() + 100, DType::f32, 2, 4),
      strided(memory.data() + 100, DType::f32, 2, 4, 8);
  EXPECT_NO_THROW(dispatcher->dispatch(stream, plan, good, {}, rows, {}));
  for (const auto& bad : {few, narrow, doubles}) {
    EXPECT_THROW(dispatcher->dispatch(stream, plan, bad, {}, rows, {}), Error);
    EXPECT_THROW(dispatcher->dispatch(stream, plan, good, {}, bad, {}), Error);
  }
  EXPECT_THROW(dispatcher->dispatch(stream, plan, good, {}, strided, {}), Error);
  EXPECT_THROW(dispatcher->dispatch(stream, plan, good, good, rows, {}), Error);
  SlotRows back;
  EXPECT_THROW(dispatcher->combine(stream, plan, strided, {}, back), Error);
  EXPECT_THROW(dispatcher->combine(stream, plan, rows, good, back), Error);
}

}  // namespace
}  // namespace arcus
