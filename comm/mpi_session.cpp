#include <spdlog/spdlog.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <exception>

#include "comm/backends.hpp"
#include "comm/mpi_comm.hpp"

namespace arcus {

MpiSession::MpiSession(int* argc, char*** argv) {
  int provided = 0;
  ARCUS_MPI(MPI_Init_thread(argc, argv, MPI_THREAD_MULTIPLE, &provided));
  ARCUS_REQUIRE(provided == MPI_THREAD_MULTIPLE, ExitCode::comm,
                "{} was built without MPI_THREAD_MULTIPLE, which the watchdog needs",
                library_version());
  ARCUS_MPI(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN));
}

MpiSession::~MpiSession() {
  if (std::uncaught_exceptions() > 0) {
    // The others may be inside a collective for ever; MPI_Finalize would wait for them.
    spdlog::error("MPI is left by an exception");
    MPI_Abort(MPI_COMM_WORLD, static_cast<int>(ExitCode::internal));
  }
  MPI_Finalize();
}

bool MpiSession::launched() {
  constexpr std::array<const char*, 4> kVariables = {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK",
                                                     "PMI_RANK", "MPI_LOCALRANKID"};
  return std::any_of(kVariables.begin(), kVariables.end(),
                     [](const char* name) { return std::getenv(name) != nullptr; });
}

std::string MpiSession::library_version() {
  std::array<char, MPI_MAX_LIBRARY_VERSION_STRING> text{};
  int length = 0;
  MPI_Get_library_version(text.data(), &length);
  const std::string_view all(text.data(), static_cast<std::size_t>(length));
  return std::string(all.substr(0, all.find(',')));
}

std::unique_ptr<Communicator> MpiSession::world(CommunicatorOptions options) {
  MPI_Comm copy = MPI_COMM_NULL;
  ARCUS_MPI(MPI_Comm_dup(MPI_COMM_WORLD, &copy));
  return std::make_unique<MpiComm>(MpiHandle(copy), options);
}

}  // namespace arcus
