#include <gtest/gtest.h>
#include <mpi.h>

#include <cstdio>
#include <exception>

#include "src/base/log.hpp"
#include "tests/support/mpi_test.hpp"

namespace arcus {
namespace {

MpiSession* session = nullptr;

/// Makes ranks agree on each test's outcome, on a communicator of its own.
class AgreeOnResults : public testing::EmptyTestEventListener {
 public:
  explicit AgreeOnResults(MPI_Comm comm) : comm_(comm) { MPI_Comm_rank(comm, &rank_); }

  void OnTestPartResult(const testing::TestPartResult& result) override {
    if (rank_ == 0 || !result.failed()) return;
    std::fprintf(stderr, "[rank %d] %s:%d: %s\n", rank_,
                 result.file_name() == nullptr ? "?" : result.file_name(), result.line_number(),
                 result.message());
  }

  void OnTestEnd(const testing::TestInfo& info) override {
    // Lowest failed rank; all ranks come here, since an exception ends the job.
    int size = 0;
    MPI_Comm_size(comm_, &size);
    int mine = info.result()->Failed() ? rank_ : size, lowest = size;
    MPI_Allreduce(&mine, &lowest, 1, MPI_INT, MPI_MIN, comm_);
    if (rank_ == 0 && lowest != size && mine == size) {
      ADD_FAILURE() << "failed on rank " << lowest << " of " << size;
    }
  }

 private:
  MPI_Comm comm_;
  int rank_ = 0;
};

/// The other ranks are inside a collective: end them too.
[[noreturn]] void end_job() {
  try {
    if (auto error = std::current_exception()) std::rethrow_exception(error);
    std::fprintf(stderr, "terminated without an exception\n");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "uncaught: %s\n", error.what());
  } catch (...) {
    std::fprintf(stderr, "uncaught exception of unknown type\n");
  }
  std::fflush(stderr);
  MPI_Abort(MPI_COMM_WORLD, 1);
  std::abort();
}

int run_tests() {
  MPI_Comm comm = MPI_COMM_NULL;
  MPI_Comm_dup(MPI_COMM_WORLD, &comm);
  int rank = 0, size = 1;
  MPI_Comm_rank(comm, &rank);
  MPI_Comm_size(comm, &size);
  init_log(rank, size);
  auto& listeners = testing::UnitTest::GetInstance()->listeners();
  if (rank != 0) delete listeners.Release(listeners.default_result_printer());
  listeners.Append(new AgreeOnResults(comm));
  int failed = RUN_ALL_TESTS();
  MPI_Allreduce(MPI_IN_PLACE, &failed, 1, MPI_INT, MPI_MAX, comm);
  MPI_Comm_free(&comm);
  return failed;
}

}  // namespace

MpiSession& test_session() { return *session; }

}  // namespace arcus

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  arcus::MpiSession mpi(&argc, &argv);
  arcus::session = &mpi;
  std::set_terminate(arcus::end_job);
  GTEST_FLAG_SET(catch_exceptions, false);
  return arcus::run_tests();
}
