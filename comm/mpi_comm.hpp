#pragma once

#include <mpi.h>

#include <utility>
#include <vector>

#include "comm/communicator.hpp"

/// Runs an MPI call; a failure throws with MPI's own text.
#define ARCUS_MPI(call) ::arcus::check_mpi((call), #call, __FILE__, __LINE__)

namespace arcus {

void check_mpi(int status, const char* call, const char* file, int line);

/// Owning handle of an MPI communicator whose errors are returned, not fatal.
class MpiHandle {
 public:
  explicit MpiHandle(MPI_Comm comm);
  MpiHandle(MpiHandle&& other) noexcept : comm_(std::exchange(other.comm_, MPI_COMM_NULL)) {}
  MpiHandle& operator=(MpiHandle&&) = delete;
  ~MpiHandle();
  MPI_Comm get() const { return comm_; }

 private:
  MPI_Comm comm_;
};

/// The messages of one all_to_all_v under way.
class MpiExchange final : public Pending {
 public:
  explicit MpiExchange(int size);
  bool active() const { return num_requests_ > 0; }
  void receive(void* data, std::int64_t count, MPI_Datatype type, int peer, int tag, MPI_Comm comm);
  void send(const void* data, std::int64_t count, MPI_Datatype type, int peer, int tag,
            MPI_Comm comm);
  bool test() override;
  void wait() override;

 private:
  /// What a request was posted for; count is -1 for sends.
  struct Expected {
    MPI_Datatype type;
    std::int64_t count;
    int peer;
  };
  void finish(int status);

  int num_requests_ = 0;
  std::vector<MPI_Request> requests_;
  std::vector<MPI_Status> statuses_;
  std::vector<Expected> expected_;
};

/// Host memory over MPI.
class MpiComm final : public Communicator {
 public:
  MpiComm(MpiHandle comm, CommunicatorOptions options);
  ~MpiComm() override;

  [[noreturn]] void abort(ExitCode code, std::string_view message) override;
  std::unique_ptr<SharedMemory> share_memory(std::int64_t bytes) override;
  int node_local_rank() const override { return node_local_rank_; }
  int node_size() const override { return node_size_; }
  MPI_Comm handle() const { return comm_.get(); }
  void library_all_to_all_v(const AllToAllV& args);

 protected:
  Event do_all_to_all_v(const AllToAllV& args) override;
  Event do_all_reduce(const AllReduce& args) override;
  Event do_all_gather_v(const AllGatherV& args) override;
  Event do_reduce_scatter_v(const ReduceScatterV& args) override;
  Event do_broadcast(const Broadcast& args) override;
  void do_barrier() override;
  std::unique_ptr<Communicator> do_split(int color, int key) override;
  std::unique_ptr<Communicator> do_split_by_node() override;

 private:
  struct Step;
  /// The committed type of rows of so many bytes, made at first use.
  MPI_Datatype row_type(std::int64_t row_bytes);
  void broadcast_part(char* data, std::int64_t elements, DType dtype, int root);
  void exchange_and_add(const ReduceScatterV& args, int to, int from);

  MpiHandle comm_;
  int node_local_rank_ = 0;
  int node_size_ = 1;
  MpiExchange exchange_;
  std::vector<std::pair<std::int64_t, MPI_Datatype>> row_types_;
  std::vector<int> counts_, offsets_;  ///< of MPI_Allgatherv, sending side of MPI_Alltoallv
  std::vector<int> recv_counts_, recv_offsets_;
  std::vector<char> pieces_;  ///< two incoming pieces of reduce_scatter_v
};

}  // namespace arcus
