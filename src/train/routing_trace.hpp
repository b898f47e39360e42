#pragma once

#include <filesystem>

#include "src/base/hdf5.hpp"
#include "src/model/pass.hpp"

namespace arcus {

/// Writes the routing of this rank's micro-batches of one step to
/// RUN/trace/step-NNNNNNNN/rank-NNNNN.h5, from which anyone can check routing and drops. Layout:
/// src/train/FORMAT.md.
class RoutingTrace {
 public:
  RoutingTrace(const std::filesystem::path& run_dir, std::int64_t step, int rank, int num_ranks);
  void add(std::int64_t layer, const MicroBatch& batch, const Routing& routing);

 private:
  h5::File file_;
};

}  // namespace arcus
