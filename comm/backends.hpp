#pragma once

#include <functional>
#include <memory>

#include "comm/communicator.hpp"

namespace arcus {

/// A single rank, without any transport.
std::unique_ptr<Communicator> make_self_communicator(CommunicatorOptions options = {});

/// Runs `body(communicator)` on `num_ranks` threads that form a world (tests, and trying out
/// layouts in one process). An exception on one rank ends the collectives of all; the first one
/// (lowest rank) is thrown again.
void run_on_threads(int num_ranks, CommunicatorOptions options,
                    const std::function<void(Communicator&)>& body);

/// MPI for the life of this object (MPI_THREAD_MULTIPLE). One per process.
class MpiSession {
 public:
  MpiSession(int* argc, char*** argv);
  ~MpiSession();
  MpiSession(const MpiSession&) = delete;
  MpiSession& operator=(const MpiSession&) = delete;
  /// True when this process was started by an MPI launcher (mpirun, srun).
  static bool launched();
  /// Name and version of the library.
  static std::string library_version();
  std::unique_ptr<Communicator> world(CommunicatorOptions options = {});
};

/// The library's own MPI_Alltoallv with these arguments (rows only), complete on return: what
/// exchanges are measured against. `comm` must be an MPI communicator.
void library_all_to_all_v(Communicator& comm, const AllToAllV& args);

}  // namespace arcus
