#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <thread>

#include "comm/backends.hpp"
#include "comm/watchdog.hpp"
#include "src/base/log.hpp"

/// A job of several ranks that goes wrong in the way its argument names; failing_job.sh looks at
/// how it ends.
namespace arcus {
namespace {

void sum(Communicator& comm, Stream& stream) {
  std::int64_t x = 1;
  stream.wait(comm.all_reduce(stream, {TensorView(&x, DType::i64, 1, 1)}));
}

void fail(const std::string& how) {
  if (how == "throw") ARCUS_FAIL(ExitCode::internal, "rank 2 has no more ink");
  if (how == "data") ARCUS_FAIL(ExitCode::data, "rank 2 cannot read");
  if (how == "sleep") std::this_thread::sleep_for(std::chrono::seconds(60));
  if (how == "silent") {
    std::this_thread::sleep_for(std::chrono::milliseconds(500));  // its last heartbeat is out
    std::raise(SIGSTOP);
  }
}

void run(const std::string& how, Communicator& comm) {
  Stream stream(1);
  const auto watchdog = make_watchdog(comm, how == "silent" || how == "sleep" ? 1.0 : 30.0);
  for (int step = 0; step < 5; ++step) {
    for (int layer = 0; layer < 3; ++layer) {
      const bool here = step == 3 && layer == 1;
      if (here && comm.rank() == 2) fail(how);
      if (here && how == "agreed") {
        agree_on_errors(comm, stream, [&] {
          ARCUS_REQUIRE(comm.rank() < 1, ExitCode::checkpoint, "the file of {} is torn",
                        comm.rank());
        });
      }
      watchdog->beat(step, layer, "all_reduce");
      sum(comm, stream);
      watchdog->beat(step, layer, "compute");
    }
  }
}

int main_of(int argc, char** argv) {
  MpiSession mpi(&argc, &argv);
  const auto world = mpi.world();
  init_log(world->rank(), world->size());
  try {
    if (const char* file = std::getenv("ARCUS_TEST_STARTED");
        file != nullptr && world->rank() == 0) {
      std::ofstream(file) << "started\n";
    }
    run(argc > 1 ? argv[1] : "", *world);
    if (world->rank() == 0) std::puts("all well");
    return 0;
  } catch (const Error& error) {
    world->abort(error.code(), error.what());
    return 1;
  }
}

}  // namespace
}  // namespace arcus

int main(int argc, char** argv) { return arcus::main_of(argc, argv); }
