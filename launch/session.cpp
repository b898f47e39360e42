#include "launch/session.hpp"

#include <fmt/format.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "launch/signals.hpp"
#include "src/base/error.hpp"
#include "src/base/log.hpp"

namespace arcus {
namespace {

void print_error(const std::string& message) {
  std::fflush(stdout);
  spdlog::default_logger()->flush();
  try {
    log_to_file(message);
  } catch (const std::exception&) {
    // The terminal has to do.
  }
  fmt::print(stderr, "arcus: error: {}\n", message);
  std::fflush(stderr);
}

}  // namespace

Session::Session(CommunicatorOptions options) {
  if (MpiSession::launched()) {
    int argc = 0;
    char** argv = nullptr;
    mpi_ = std::make_unique<MpiSession>(&argc, &argv);
    comm_ = mpi_->world(options);
  } else {
    // srun without a PMI that this MPI knows starts every task as a world of its own.
    const char* const tasks = std::getenv("SLURM_STEP_NUM_TASKS");
    ARCUS_REQUIRE(tasks == nullptr || std::atoi(tasks) <= 1, ExitCode::comm,
                  "this is one of {} Slurm tasks that cannot see each other; start them with `srun "
                  "--mpi=pmix` (`srun --mpi=list` shows what there is) or with mpirun",
                  tasks);
    comm_ = make_self_communicator(options);
  }
  init_log(comm_->rank(), comm_->size());
}

void Session::together(const std::function<void()>& fn) {
  try {
    agree_on_errors(*comm_, stream_, fn);
  } catch (const Error& error) {
    // When communication itself failed the ranks share nothing any more.
    agreed_ = error.code() != ExitCode::comm;
    throw;
  }
}

int run_session(CommunicatorOptions options, const std::function<ExitCode(Session&)>& body) {
  Session session(options);
  try {
    return static_cast<int>(body(session));
  } catch (const std::exception& exception) {
    const Error error = as_error(exception);
    if (error.code() == ExitCode::comm) ignore_stop_requests();
    if (session.comm().size() > 1 && !session.agreed_) {
      session.comm().abort(error.code(), error.report());
    }
    if (session.is_root()) print_error(error.report());
    // The launcher ends everybody once a rank is gone with an error: print first, then leave.
    session.comm().barrier(session.stream());
    return static_cast<int>(error.code());
  }
}

int report_failure(const std::exception& exception) {
  const Error error = as_error(exception);
  print_error(error.report());
  return static_cast<int>(error.code());
}

int launcher_rank() {
  for (const char* name : {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"}) {
    if (const char* text = std::getenv(name)) return std::atoi(text);
  }
  return 0;
}

}  // namespace arcus
