#include <gtest/gtest.h>

#include "tests/comm/dispatch_laws.hpp"
#include "tests/support/mpi_test.hpp"

namespace arcus {
namespace {

TEST(Dispatch, LawsOver200Routings) { laws::check_situations(*test_session().world(), 200); }

TEST(Dispatch, LawsThroughSharedMemory) {
  const auto world = test_session().world();
  if (world->size() > 1 && world->share_memory(4096) == nullptr) {
    GTEST_SKIP() << "processes cannot share memory here";
  }
  laws::check_situations(*world, 200,
                         world->size() > 1 ? DispatchPath::shared : DispatchPath::automatic);
}

// Ranks as if on nodes of one and of two.
TEST(Dispatch, LawsOverNodes) {
  for (const int ranks_per_node : {1, 2}) {
    const auto world = test_session().world({.ranks_per_node = ranks_per_node});
    if (world->size() <= ranks_per_node) continue;
    if (world->share_memory(4096) == nullptr) {
      GTEST_SKIP() << "processes cannot share memory here";
    }
    laws::check_situations(*world, 200, DispatchPath::shared);
  }
}

TEST(Dispatch, LawsWhenChecked) {
  laws::check_situations(*test_session().world({.checked = true}), 20);
}

}  // namespace
}  // namespace arcus
