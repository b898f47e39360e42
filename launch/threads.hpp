#pragma once

#include <string>

#include "comm/communicator.hpp"
#include "comm/process_groups.hpp"

namespace arcus {

/// Processor cores that this process may run on (hyper-threads of one core count once), limited by
/// the container's quota.
int available_cores();

/// CPU threads of this rank: [parallel] threads, else OMP_NUM_THREADS, else the cores that it may
/// use, shared with the other ranks bound to the same ones. Collective.
int threads_per_rank(const ParallelConfig& parallel, Communicator& comm, Stream& stream);

/// threads_per_rank; with [parallel] bind = "cores" the calling thread and the team that it leads
/// in ops are bound too, one to a core: ranks that may use the same cores take them in turn, in
/// rank order. Throws (usage) where there are fewer cores than threads. To be called once, before
/// the first op: threads made later by the calling one start on its core. Collective.
int set_up_threads(const ParallelConfig& parallel, Communicator& comm, Stream& stream);

}  // namespace arcus
