#pragma once

#include <string>

#include "src/train/plan.hpp"

namespace arcus {

/// Whether a run fits into the memory that there is.
struct MemoryFit {
  bool fits_even = true;   ///< with experts evenly loaded
  bool fits_worst = true;  ///< whatever the experts get
  /// Empty where fits_worst; else what is needed, what there is, and a table of settings that would
  /// do (or come nearest) with what they need.
  std::string text;
};

/// `available`: bytes that each rank may take. `plan` is of the same options and layout, of which
/// `ep_size` was configured (0 = auto).
MemoryFit memory_fit(const TrainerOptions& options, const TrainPlan& plan, int ranks_per_node,
                     std::int64_t ep_size, std::int64_t available);

}  // namespace arcus
