#include <gtest/gtest.h>

#include "comm/backends.hpp"
#include "tests/comm/collective_laws.hpp"
#include "tests/support/mpi_test.hpp"

namespace arcus {
namespace {

TEST(Mpi, Conforms) { laws::conform(*test_session().world()); }

TEST(Mpi, ConformsWhenChecked) {
  const auto comm = test_session().world({.checked = true});
  laws::conform(*comm);
  laws::refusals(*comm);
  laws::mismatches(*comm);
}

TEST(Mpi, AddsFloatsWhenNotReproducible) {
  laws::conform_floats(*test_session().world({.reproducible = false}));
}

TEST(Mpi, RefusesWrongArguments) { laws::refusals(*test_session().world()); }

TEST(Mpi, LargeCollectivesGoInPieces) {
  const auto comm = test_session().world({.max_call_elements = 37});
  laws::reduce_all<std::int64_t>(*comm, 1000);
  laws::broadcast_all(*comm, 1000);
  laws::gather_all<std::int64_t>(*comm, 400, 2);
  laws::reduce_parts<std::int64_t>(*comm, 400, 3);
}

TEST(Mpi, ExchangeMovesOnWhilePolled) {
  const auto comm = test_session().world();
  Stream stream(1);
  const auto size = static_cast<std::size_t>(comm->size());
  constexpr std::int64_t kRows = 300, kWidth = 512;
  const laws::Counts counts(size, kRows), offsets = laws::prefix_sum(counts);
  std::vector<std::int64_t> send(size * kRows * kWidth, comm->rank()), recv(send.size(), -1);
  const Event event = comm->all_to_all_v(
      stream, {send.data(), counts, offsets, recv.data(), counts, offsets, kWidth * 8});
  // A collective of another kind may pass an exchange under way.
  laws::reduce_all<std::int64_t>(*comm, 3);
  while (!event.test()) {
  }
  EXPECT_TRUE(event.test());
  stream.wait(event);
  std::int64_t wrong = 0;
  for (std::size_t i = 0; i < recv.size(); ++i) {
    wrong += recv[i] != static_cast<std::int64_t>(i / (kRows * kWidth));
  }
  EXPECT_EQ(wrong, 0);
}

TEST(Mpi, LibraryExchangeMovesTheSameRows) {
  const auto comm = test_session().world();
  const auto size = static_cast<std::size_t>(comm->size());
  const laws::Counts counts(size, 2), offsets = laws::prefix_sum(counts);
  std::vector<std::int64_t> send(size * 2), recv(send.size());
  for (std::size_t i = 0; i < send.size(); ++i) {
    send[i] = laws::code(comm->rank(), static_cast<int>(i / 2), static_cast<int>(i % 2));
  }
  library_all_to_all_v(*comm, {send.data(), counts, offsets, recv.data(), counts, offsets, 8});
  for (std::size_t i = 0; i < recv.size(); ++i) {
    EXPECT_EQ(recv[i], laws::code(static_cast<int>(i / 2), comm->rank(), static_cast<int>(i % 2)));
  }
  const AllToAllV rows = {send.data(), counts, offsets, recv.data(), counts, offsets, 8};
  EXPECT_THROW(library_all_to_all_v(*make_self_communicator(), rows), Error);
}

TEST(Mpi, KnowsItsNode) {
  const auto comm = test_session().world();
  EXPECT_EQ(comm->node_size(), comm->size());  // tests run on one node
  EXPECT_EQ(comm->node_local_rank(), comm->rank());
  EXPECT_TRUE(MpiSession::launched());
  EXPECT_FALSE(MpiSession::library_version().empty());
}

}  // namespace
}  // namespace arcus
