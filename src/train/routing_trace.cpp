#include "src/train/routing_trace.hpp"

#include <vector>

namespace arcus {
namespace {

std::filesystem::path trace_file(const std::filesystem::path& run_dir, std::int64_t step,
                                 int rank) {
  const auto folder = run_dir / "trace" / fmt::format("step-{:08}", step);
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  ARCUS_REQUIRE(!error, ExitCode::usage, "cannot create {}: {}", folder.string(), error.message());
  return folder / fmt::format("rank-{:05}.h5", rank);
}

/// An earlier run of this step may have had more ranks.
void remove_files_beyond(const std::filesystem::path& run_dir, std::int64_t step, int num_ranks) {
  std::error_code error;
  for (int rank = num_ranks; std::filesystem::remove(trace_file(run_dir, step, rank), error);) {
    ++rank;
  }
}

}  // namespace

RoutingTrace::RoutingTrace(const std::filesystem::path& run_dir, std::int64_t step, int rank,
                           int num_ranks)
    : file_(h5::File::create(trace_file(run_dir, step, rank), ExitCode::usage)) {
  if (rank == 0) remove_files_beyond(run_dir, step, num_ranks);
  file_.write_attribute("format", "arcus-routing-trace-1");
  file_.write_attribute("step", step);
  file_.write_attribute("num_ranks", std::int64_t{num_ranks});
}

void RoutingTrace::add(std::int64_t layer, const MicroBatch& batch, const Routing& routing) {
  const std::string group = fmt::format("micro_batch-{:05}/layer-{:03}/", batch.number, layer);
  const auto write = [&](const char* name, const TensorView& view) {
    file_.create_dataset(group + name, view.dtype, {view.rows, view.cols})
        .write_rows(0, view.rows, view.data);
  };
  write("logits", routing.z);
  write("scores", routing.s);
  write("topk_idx", routing.topk_idx);
  write("topk_weight", routing.weight);
  if (batch.token_idx.data != nullptr) {
    file_.write<std::int32_t>(group + "token_idx", {batch.token_idx.cols},
                              batch.token_idx.as<std::int32_t>());
    write("stream_gate", routing.stream_gate);
  }
  std::vector<std::uint8_t> kept;
  for (const std::int32_t expert : routing.expert_of_slot.span<std::int32_t>()) {
    kept.push_back(expert >= 0 ? 1 : 0);
  }
  file_.write<std::uint8_t>(group + "kept", {routing.topk_idx.rows, routing.topk_idx.cols},
                            kept.data());
  file_.write<std::int64_t>(group + "capacity", {}, &routing.capacity);
}

}  // namespace arcus
