#include "src/model/param_registry.hpp"

#include <algorithm>
#include <utility>

#include "kernels/elementwise.hpp"
#include "kernels/random.hpp"
#include "src/base/rng.hpp"

namespace arcus {
namespace {

/// Elements to which tensors are aligned in a flat.
constexpr std::int64_t kAlignment = 32;

std::int64_t align(std::int64_t elements) {
  return (elements + kAlignment - 1) / kAlignment * kAlignment;
}

FlatId flat_of_dense(const ParamRow& row) {
  if (row.adapter) return FlatId::dense_adapter;
  return row.keep_accumulate_type ? FlatId::dense_accumulate : FlatId::dense_compute;
}
FlatId flat_of_experts(const ParamRow& row) {
  if (row.adapter) return FlatId::expert_adapter;
  return row.keep_accumulate_type ? FlatId::expert_accumulate : FlatId::expert_compute;
}

}  // namespace

ParamPart part_of(const ParamRow& row) {
  const auto has = [&](std::string_view part) { return row.name.find(part) != std::string::npos; };
  if (row.adapter) return ParamPart::adapters;
  if (row.kind == ParamKind::expert) return ParamPart::experts;
  if (has(".mlp.gate.") || has(".stream_gate.")) return ParamPart::router;
  if (has("norm.")) return ParamPart::norms;
  if (has("model.embed_") || has("lm_head.")) return ParamPart::embeddings;
  return ParamPart::dense;
}

ParamRegistry::ParamRegistry(std::int64_t num_experts, std::int64_t first_local_expert,
                             std::int64_t num_local_experts, LoraConfig lora)
    : num_experts_(num_experts),
      first_local_expert_(first_local_expert),
      num_local_experts_(num_local_experts),
      lora_(std::move(lora)) {}

ParamRef ParamRegistry::add(ParamRow row) {
  row.flat = flat_of_dense(row);
  std::int64_t& size = sizes_[index_of(row.flat)];
  row.offset = row.follows_previous ? size : align(size);
  size = row.offset + row.unit_elements();
  row.first_unit_idx = num_units_++;
  rows_.push_back(std::move(row));
  return {static_cast<int>(rows_.size()) - 1};
}

std::vector<ParamRef> ParamRegistry::add_experts(std::vector<ParamRow> rows) {
  const FlatId flat = flat_of_experts(rows.front());
  std::int64_t stride = 0;
  for (ParamRow& row : rows) {
    ARCUS_CHECK(flat_of_experts(row) == flat, "{} does not stand in one flat with {}", row.name,
                rows.front().name);
    ARCUS_CHECK(row.shape[0] == num_experts_, "{} has {} experts, the model {}", row.name,
                row.shape[0], num_experts_);
    row.kind = ParamKind::expert;
    row.flat = flat;
    row.expert_offset = stride;
    stride += row.unit_elements();
  }
  std::int64_t& strides = expert_strides_[index_of(flat)];
  std::vector<ParamRef> refs;
  for (ParamRow& row : rows) {
    row.strides_before = strides;
    row.expert_stride = align(stride);
    row.offset = num_local_experts_ * row.strides_before + row.expert_offset;
    row.first_unit_idx = num_units_;
    num_units_ += num_experts_;
    rows_.push_back(std::move(row));
    refs.push_back({static_cast<int>(rows_.size()) - 1});
  }
  strides += align(stride);
  sizes_[index_of(flat)] = expert_flat_size(flat, num_local_experts_);
  return refs;
}

std::string ParamRegistry::unit_name(std::int64_t unit_idx) const {
  for (const ParamRow& row : rows_) {
    const std::int64_t unit = unit_idx - row.first_unit_idx;
    if (unit >= 0 && unit < row.num_units()) {
      return row.kind == ParamKind::expert ? fmt::format("{}[{}]", row.name, unit) : row.name;
    }
  }
  return fmt::format("tensor {}", unit_idx);
}

std::vector<ParamBlock> ParamRegistry::blocks(FlatId flat, std::int64_t first_expert,
                                              std::int64_t num_experts) const {
  std::vector<ParamBlock> result;
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    const ParamRow& row = rows_[i];
    if (row.flat != flat) continue;
    const TensorSpec spec = row.spec(DType::f32);
    const bool expert = row.kind == ParamKind::expert;
    const std::int64_t units = expert ? num_experts : 1;
    const std::int64_t offset =
        expert ? num_experts * row.strides_before + row.expert_offset : row.offset;
    for (std::int64_t local = 0; local < units; ++local) {
      for (std::int64_t b = 0; b < blocks_per_unit(spec); ++b) {
        const RowRange range = block_range(spec, b);  // rows of unit 0
        result.push_back({static_cast<int>(i), expert ? first_expert + local : 0, b,
                          offset + local * row.expert_stride + range.begin * spec.cols(),
                          (range.end - range.begin) * spec.cols()});
      }
    }
  }
  std::stable_sort(result.begin(), result.end(),
                   [](const ParamBlock& a, const ParamBlock& b) { return a.begin < b.begin; });
  return result;
}

std::int64_t ParamRegistry::total_parameters() const {
  std::int64_t total = 0;
  for (const ParamRow& row : rows_) total += row.num_units() * row.unit_elements();
  return total;
}

std::int64_t ParamRegistry::active_parameters() const {
  std::int64_t total = 0;
  for (const ParamRow& row : rows_) total += row.active_units * row.unit_elements();
  return total;
}

bool ParamRegistry::is_trained(FlatId flat) const {
  return std::any_of(rows_.begin(), rows_.end(),
                     [&](const ParamRow& row) { return row.flat == flat && row.trainable; });
}

std::int64_t ParamRegistry::trained_parameters() const {
  std::int64_t total = 0;
  for (const ParamRow& row : rows_) {
    total += row.trainable ? row.num_units() * row.unit_elements() : 0;
  }
  return total;
}

ParamStore::ParamStore(const ParamRegistry& registry, DType compute, DType sum_dtype, bool training)
    : registry_(&registry),
      compute_(compute),
      sum_dtype_(sum_dtype),
      training_(training),
      stale_(std::make_unique<std::uint8_t[]>(static_cast<std::size_t>(registry.num_units()))),
      bad_leaf_(std::make_unique<BadLeafFlag>(kNoBadLeaf)) {
  for (const FlatId flat : kFlatIds) {
    const std::int64_t n = registry.flat_size(flat);
    values_.emplace_back("parameters", n * static_cast<std::int64_t>(size_of(dtype(flat))));
    value_views_[index_of(flat)] = values_.back().allocate(dtype(flat), 1, n);
    sum_views_[index_of(flat)].dtype = sum_dtype;
    if (!training || !registry.is_trained(flat)) continue;
    sums_.emplace_back("gradient sums", n * static_cast<std::int64_t>(size_of(sum_dtype)));
    sum_views_[index_of(flat)] = sums_.back().allocate(sum_dtype, 1, n);
  }
}

TensorView ParamStore::values(ParamRef ref, std::int64_t local_expert, std::int64_t rows) const {
  if (!ref.valid()) return {};
  const ParamRow& row = registry_->row(ref);
  const TensorView flat = flat_values(row.flat);
  void* first = flat.col_range(row.offset + local_expert * row.expert_stride, 0).data;
  // A vector is one row; spanning others makes it longer instead of higher.
  if (!row.is_matrix()) return {first, flat.dtype, 1, rows > 0 ? rows : row.unit_elements()};
  return {first, flat.dtype, rows > 0 ? rows : row.unit_elements() / row.cols(), row.cols()};
}

GradientSum ParamStore::sums(ParamRef ref, std::int64_t local_expert) const {
  if (!ref.valid()) return {};
  const ParamRow& row = registry_->row(ref);
  if (!training_ || !row.trainable) return {};
  GradientSum sum;
  sum.sum = flat_sums(row.flat).col_range(row.offset + local_expert * row.expert_stride, 0).data;
  sum.dtype = sum_dtype_;
  sum.limit = leaf_limit(num_micro_batches_ * row.leaves_per_micro_batch);
  sum.tensor_idx = registry_->unit_idx(row, local_expert);
  if (row.whole_leaves) sum.stale = &stale(row, local_expert);
  sum.flag = bad_leaf_.get();
  return sum;
}

void ParamStore::set_num_micro_batches(std::int64_t num_micro_batches) {
  num_micro_batches_ = num_micro_batches;
}

std::uint8_t& ParamStore::stale(const ParamRow& row, std::int64_t local_unit) const {
  return stale_[static_cast<std::size_t>(registry_->unit_idx(row, local_unit))];
}

TensorView ParamStore::unit_sums(const ParamRow& row, std::int64_t local_unit) const {
  return flat_sums(row.flat).col_range(row.offset + local_unit * row.expert_stride,
                                       row.unit_elements());
}

template <class Fn>
void ParamStore::for_each_trained_unit(Fn&& fn) const {
  for (const ParamRow& row : registry_->rows()) {
    if (!training_ || !row.trainable) continue;
    const bool expert = row.kind == ParamKind::expert;
    const std::int64_t units = expert ? registry_->num_local_experts() : 1;
    for (std::int64_t unit = 0; unit < units; ++unit) fn(row, unit);
  }
}

void ParamStore::start_sums(Stream& stream) {
  bad_leaf_->store(kNoBadLeaf);
  const bool new_memory = std::exchange(sums_are_new_, false);
  for_each_trained_unit([&](const ParamRow& row, std::int64_t unit) {
    if (row.whole_leaves) {
      stale(row, unit) = 1;
    } else if (!new_memory) {
      fill_zero(stream, {.y = unit_sums(row, unit)});
    }
  });
}

void ParamStore::complete_sums(Stream& stream) {
  for_each_trained_unit([&](const ParamRow& row, std::int64_t unit) {
    if (!row.whole_leaves || stale(row, unit) == 0) return;
    fill_zero(stream, {.y = unit_sums(row, unit)});
    stale(row, unit) = 0;
  });
}

std::int64_t ParamStore::value_bytes() const {
  std::int64_t bytes = 0;
  for (const Arena& arena : values_) bytes += arena.capacity();
  return bytes;
}

std::int64_t ParamStore::sum_bytes() const {
  std::int64_t bytes = 0;
  for (const Arena& arena : sums_) bytes += arena.capacity();
  return bytes;
}

void initial_values(Stream& stream, const ParamRow& row, std::uint64_t seed,
                    const ParamBlock& block, TensorView out) {
  if (row.init != ParamInit::normal) {
    fill_value(stream, {.y = out, .value = row.init == ParamInit::ones ? 1.0 : 0.0});
    return;
  }
  const TensorSpec spec = row.spec(out.dtype);
  fill_normal(stream, {.out = out,
                       .key = Rng(seed, "init", row.name).key(),
                       .first_element = block.unit * row.unit_elements() +
                                        block.block_in_unit * block_rows(spec) * spec.cols(),
                       .std = static_cast<float>(row.init_std)});
}

}  // namespace arcus
