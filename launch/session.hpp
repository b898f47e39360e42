#pragma once

#include <exception>
#include <functional>
#include <memory>

#include "comm/backends.hpp"
#include "comm/communicator.hpp"

namespace arcus {

/// The ranks that one command runs on: the MPI world when an MPI launcher started this process,
/// else this process alone, without MPI.
class Session {
 public:
  explicit Session(CommunicatorOptions options = {});

  Communicator& comm() { return *comm_; }
  /// For collectives outside the training loop, on one thread.
  Stream& stream() { return stream_; }
  int rank() const { return comm_->rank(); }
  bool is_root() const { return comm_->rank() == 0; }

  /// Runs `fn` on every rank. If it throws anywhere, every rank throws the lowest such rank's
  /// error, which is then reported once and the job ends in order.
  void together(const std::function<void()>& fn);

 private:
  friend int run_session(CommunicatorOptions options,
                         const std::function<ExitCode(Session&)>& body);
  std::unique_ptr<MpiSession> mpi_;  ///< outlives the communicator
  std::unique_ptr<Communicator> comm_;
  Stream stream_{1};
  bool agreed_ = false;  ///< the error under way is known to every rank
};

/// Runs `body` on all ranks and returns the process's exit code. An exception that all ranks share
/// (Session::together) is printed once; any other ends the ranks of the whole job, its message
/// being the last line printed.
int run_session(CommunicatorOptions options, const std::function<ExitCode(Session&)>& body);

/// Prints "arcus: error: ..." and returns the exit code.
int report_failure(const std::exception& exception);

/// This process's rank as the launcher's environment tells it; 0 without a launcher. For messages
/// before (or without) MPI.
int launcher_rank();

}  // namespace arcus
