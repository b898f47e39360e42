#pragma once

#include <cstdint>
#include <string>

#include "launch/run_config.hpp"
#include "launch/session.hpp"
#include "src/train/memory_fit.hpp"

namespace arcus {

/// Bytes that each of `ranks_here` ranks may take of what this machine has left; 0 = unknown.
std::int64_t memory_per_rank(int ranks_here);

/// Whether checkpoints can be written in the background: asked for, the copy of the state fits into
/// `memory` too (0 = unknown), and the HDF5 library can be used by two threads. The copy becomes a
/// row of the plan then.
bool plan_background_saves(TrainPlan& plan, const Config& config, std::int64_t memory);

/// A run's plan, on rank 0 alone.
struct CheckedPlan {
  TrainPlan plan;
  std::string tight;  ///< what may not fit at worst, with settings that would; empty: all fits
  bool background_saves = false;  ///< plan_background_saves, on all ranks alike
};
/// Refuses (usage, on all ranks, unless run.check_memory is off) what does not fit into the memory
/// of its machines even with evenly loaded experts. Collective.
CheckedPlan checked_plan(Session& session, const Config& config, const TrainerOptions& options,
                         int num_threads);

}  // namespace arcus
