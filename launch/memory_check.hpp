#pragma once

#include <cstdint>

#include "launch/session.hpp"
#include "src/train/memory_fit.hpp"

namespace arcus {

/// Bytes that each of `ranks_here` ranks may take of what this machine has left; 0 = unknown.
std::int64_t memory_per_rank(int ranks_here);

/// Refuses (usage, on all ranks) a run that does not fit into the memory of its machines even with
/// evenly loaded experts, and warns of one that might not, each with a table of settings that
/// would. `plan` is needed on rank 0. Collective.
void check_memory(Session& session, const TrainerOptions& options, const TrainPlan& plan);

}  // namespace arcus
