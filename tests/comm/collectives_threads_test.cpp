#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "comm/backends.hpp"
#include "tests/comm/collective_laws.hpp"

namespace arcus {
namespace {

class Threads : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Ranks, Threads, testing::Values(1, 2, 3, 4, 7));

TEST_P(Threads, Conforms) { run_on_threads(GetParam(), {}, laws::conform); }
TEST_P(Threads, ConformsWhenChecked) {
  run_on_threads(GetParam(), {.checked = true}, [](Communicator& comm) {
    laws::conform(comm);
    laws::refusals(comm);
    laws::mismatches(comm);
  });
}
TEST_P(Threads, AddsFloatsWhenNotReproducible) {
  run_on_threads(GetParam(), {.reproducible = false}, laws::conform_floats);
}
TEST_P(Threads, RefusesWrongArguments) { run_on_threads(GetParam(), {}, laws::refusals); }

TEST(Self, Conforms) {
  const auto comm = make_self_communicator({.checked = true});
  laws::conform(*comm);
  laws::refusals(*comm);
  laws::conform_floats(*make_self_communicator({.reproducible = false}));
}

/// What the caller of run_on_threads gets to see.
std::string error_of(int ranks, const std::function<void(Communicator&)>& body) {
  try {
    run_on_threads(ranks, {}, body);
    return "none";
  } catch (const std::exception& error) {
    return error.what();
  }
}

TEST(ThreadErrors, OneRankEndsTheCollectivesOfAll) {
  std::atomic<int> ended = 0;
  const auto begin = std::chrono::steady_clock::now();
  const std::string message = error_of(7, [&](Communicator& comm) {
    Stream stream(1);
    const auto part = comm.split(comm.rank() / 4, 0);
    if (comm.rank() == 5) throw std::runtime_error("rank 5 is out of paper");
    try {
      // Rank 5 is in the second part; the first one is stopped as well.
      for (;;) part->barrier(stream);
    } catch (const Error&) {
      ++ended;
      throw;
    }
  });
  EXPECT_EQ(message, "rank 5 is out of paper");
  EXPECT_EQ(ended, 6);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(5));
}

TEST(ThreadErrors, LowestOriginalErrorIsReported) {
  EXPECT_EQ(error_of(4,
                     [](Communicator& comm) {
                       Stream stream(1);
                       comm.barrier(stream);
                       if (comm.rank() >= 2)
                         comm.abort(ExitCode::data, fmt::format("I am {}", comm.rank()));
                       comm.barrier(stream);
                     }),
            "I am 2");
}

TEST(ThreadErrors, ARankThatLeavesEarlyIsNoHang) {
  const std::string message = error_of(3, [](Communicator& comm) {
    Stream stream(1);
    if (comm.rank() != 1) comm.barrier(stream);
  });
  EXPECT_NE(message.find("rank 1 of 3 has left"), std::string::npos) << message;
}

TEST(ThreadErrors, DifferentCallsAreNoHang) {
  const std::string message = error_of(3, [](Communicator& comm) {
    Stream stream(1);
    std::int64_t x = 0;
    const TensorView view(&x, DType::i64, 1, 1);
    if (comm.rank() == 1) {
      comm.broadcast(stream, {view});
    } else {
      comm.all_reduce(stream, {view});
    }
  });
  EXPECT_NE(message.find("different collectives"), std::string::npos) << message;
}

TEST(ThreadErrors, WrongCountsAreNamed) {
  const std::string message = error_of(2, [](Communicator& comm) {
    Stream stream(1);
    std::vector<std::int64_t> send(4), recv(4);
    const laws::Counts send_counts = {0, comm.rank() == 0 ? 1 : 0}, recv_counts = {0, 0},
                       offsets = {0, 2};
    laws::Counts received = recv_counts;
    if (comm.rank() == 1) received = {2, 0};
    comm.all_to_all_v(stream,
                      {send.data(), send_counts, offsets, recv.data(), received, offsets, 8});
  });
  EXPECT_NE(message.find("rank 0 sends 1 rows of 8 bytes, rank 1 expects 2"), std::string::npos)
      << message;
}

}  // namespace
}  // namespace arcus
