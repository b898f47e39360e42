#pragma once

#include <cstdint>
#include <memory>

#include "comm/communicator.hpp"

namespace arcus {

/// Keys of [parallel].
struct ParallelConfig {
  std::int64_t ep_size = 0;       ///< ranks that jointly hold one copy of all experts; 0 = "auto"
  std::string comm = "auto";      ///< "auto" | "nccl" | "mpi"
  std::string dispatch = "auto";  ///< how tokens reach experts: "auto" | "flat" | "shared"
  std::int64_t threads = 0;   ///< CPU threads per rank; 0 = the node's cores shared by its ranks
  std::string bind = "none";  ///< "cores": every thread keeps to a core of its own
};

/// Experts 0..num_experts-1 in blocks of consecutive ones over num_ranks ranks, sizes differing by
/// at most one (the first num_experts mod num_ranks ranks hold one more).
class ExpertPartition {
 public:
  ExpertPartition(std::int64_t num_experts, int num_ranks);
  std::int64_t begin(int rank) const;
  std::int64_t count(int rank) const { return begin(rank + 1) - begin(rank); }
  std::int64_t num_experts() const { return num_experts_; }
  int num_ranks() const { return num_ranks_; }

 private:
  std::int64_t num_experts_;
  int num_ranks_;
};

/// The EP size a run uses: `ep_size`, or for 0 the largest divisor of num_ranks that is <=
/// num_experts. Throws (usage) when it does not divide the ranks or exceeds the experts.
int resolve_ep_size(std::int64_t ep_size, int num_ranks, std::int64_t num_experts);

/// World = EP x EDP. EP ranks are consecutive; the EDP group of a rank holds the same experts.
struct ProcessGroups {
  Communicator* world = nullptr;
  std::unique_ptr<Communicator> ep;
  std::unique_ptr<Communicator> edp;
};
/// Collective over `world`, which must outlive the result.
ProcessGroups make_process_groups(Communicator& world, int ep_size);

}  // namespace arcus
