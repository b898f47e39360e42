#pragma once

#include <mpi.h>

#include <memory>

#include "comm/shared_memory.hpp"

namespace arcus {

/// `bytes` (may differ between ranks) of memory on every rank of `comm`, mapped by all. Null, on
/// all ranks alike, where one of them cannot map another's: ranks in containers of their own, say.
/// Collective over `comm`, whose ranks share a node.
std::unique_ptr<SharedMemory> share_over_processes(MPI_Comm comm, std::int64_t bytes);

}  // namespace arcus
