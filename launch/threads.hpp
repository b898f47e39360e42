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

}  // namespace arcus
