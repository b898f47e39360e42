#include <gtest/gtest.h>

#include "tests/comm/dispatch_laws.hpp"
#include "tests/support/mpi_test.hpp"

namespace arcus {
namespace {

TEST(Dispatch, LawsOver200Routings) { laws::check_situations(*test_session().world(), 200); }

TEST(Dispatch, LawsThroughSharedMemory) {
  laws::check_situations(
      *test_session().world(), 200,
      test_session().world()->size() > 1 ? DispatchPath::shared : DispatchPath::automatic);
}

TEST(Dispatch, LawsWhenChecked) {
  laws::check_situations(*test_session().world({.checked = true}), 20);
}

}  // namespace
}  // namespace arcus
