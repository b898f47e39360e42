#include "launch/routing_trace.hpp"

#include <fmt/format.h>

#include <utility>
#include <vector>

#include "src/base/error.hpp"

namespace arcus {
namespace {

/// A view without padding between its rows, written as it is.
void write_view(h5::File& file, const std::string& name, ConstTensorView view) {
  ARCUS_CHECK(view.contiguous(), "{} has padded rows", name);
  file.create_dataset(name, view.dtype, {view.rows, view.cols}).write_rows(0, view.rows, view.data);
}

}  // namespace

RoutingTrace::RoutingTrace(std::filesystem::path run_dir, int rank)
    : dir_(std::move(run_dir) / "routing"), rank_(rank) {}

void RoutingTrace::begin_step(std::int64_t step) {
  const auto folder = dir_ / fmt::format("step-{:08}", step);
  std::filesystem::create_directories(folder);
  file_.emplace(h5::File::create(folder / fmt::format("rank-{:05}.h5", rank_), ExitCode::usage));
  file_->write_attribute("format", "arcus-routing-trace");
  file_->write_attribute("format_version", std::int64_t{1});
  file_->write_attribute("step", step);
}

void RoutingTrace::record(std::int64_t layer, const MicroBatch& batch, const Routing& routing) {
  ARCUS_CHECK(file_.has_value(), "routing recorded outside of a traced step");
  const std::string group = fmt::format("micro_batch-{:05}/layer-{:03}/", batch.number, layer);
  write_view(*file_, group + "logits", routing.z);
  write_view(*file_, group + "scores", routing.s);
  write_view(*file_, group + "topk_idx", routing.topk_idx);
  write_view(*file_, group + "topk_weight", routing.weight);
  const ConstTensorView slots = routing.expert_of_slot;
  std::vector<std::uint8_t> kept;
  for (std::int64_t t = 0; t < slots.rows; ++t) {
    for (std::int64_t k = 0; k < slots.cols; ++k) {
      kept.push_back(slots.row<std::int32_t>(t)[k] >= 0 ? 1 : 0);
    }
  }
  file_->write(group + "kept", {slots.rows, slots.cols}, kept.data());
  file_->write(group + "capacity", {1}, &routing.capacity);
}

void RoutingTrace::end_step() {
  file_->flush();
  file_.reset();
}

}  // namespace arcus
