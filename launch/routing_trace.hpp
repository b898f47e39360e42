#pragma once

#include <filesystem>
#include <optional>

#include "src/base/hdf5.hpp"
#include "src/model/pass.hpp"

namespace arcus {

/// Writes what every gate decided in chosen steps, so that routing and drops can be checked from
/// outside; launch/FORMAT.md describes the files. Every rank writes its own micro-batches.
class RoutingTrace {
 public:
  RoutingTrace(std::filesystem::path run_dir, int rank);

  /// Starts the file of step `step`.
  void begin_step(std::int64_t step);
  /// Records one MoE layer's routing of one micro-batch.
  void record(std::int64_t layer, const MicroBatch& batch, const Routing& routing);
  void end_step();

 private:
  std::filesystem::path dir_;
  int rank_;
  std::optional<h5::File> file_;
};

}  // namespace arcus
