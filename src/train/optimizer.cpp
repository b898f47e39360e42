#include "src/train/optimizer.hpp"

#include <algorithm>
#include <cmath>

#include "kernels/elementwise.hpp"

namespace arcus {

Optimizer::Optimizer(ModelInstance& instance, const TrainConfig& config)
    : instance_(&instance), config_(config) {
  const DType acc = accumulate_dtype(instance.options().compute);
  for (const FlatId id : kFlatIds) {
    Flat& flat = flats_[index_of(id)];
    const auto rank = static_cast<std::size_t>(instance.group(id).rank());
    flat.id = id;
    flat.begin = instance.shards(id).offsets[rank];
    flat.count = instance.shards(id).counts[rank];
    const auto allocate = [&](const char* name) {
      flat.memory.push_back(
          std::make_unique<Arena>(name, flat.count * static_cast<std::int64_t>(size_of(acc))));
      return flat.memory.back()->allocate(acc, 1, flat.count);
    };
    flat.master = instance.params().dtype(id) == acc
                      ? instance.params().flat_values(id).col_range(flat.begin, flat.count)
                      : allocate("master weights");
    if (instance.registry().is_trained(id)) {
      flat.m = allocate("first moments");
      flat.v = allocate("second moments");
    }
    for (const ParamBlock& block : instance.shards(id).owned(instance.group(id).rank())) {
      flat.blocks.push_back({block.begin - flat.begin, block.count});
    }
  }
  plan_norm();
}

/// Which (unit, block) every rank contributes, in its order, so that the gathered partial sums can
/// be added in registry order.
void Optimizer::plan_norm() {
  const ParamRegistry& registry = instance_->registry();
  const ExpertPartition& experts = instance_->dispatcher().experts();
  const int ep = experts.num_ranks();
  const int world = instance_->world().size();
  const auto expert_shards = [&](FlatId flat, int ep_rank) {
    return make_shards(registry.blocks(flat, experts.begin(ep_rank), experts.count(ep_rank)),
                       registry.expert_flat_size(flat, experts.count(ep_rank)), world / ep);
  };
  std::array<std::vector<FlatShards>, kFlatIds.size()> by_ep_rank;
  for (const FlatId flat : kFlatIds) {
    if (!is_by_expert(flat) || !registry.is_trained(flat)) continue;
    for (int r = 0; r < ep; ++r) by_ep_rank[index_of(flat)].push_back(expert_shards(flat, r));
  }
  std::int64_t position = 0;
  for (int rank = 0; rank < world; ++rank) {
    norm_offsets_.push_back(position);
    const auto add = [&](std::span<const ParamBlock> blocks) {
      for (const ParamBlock& block : blocks) {
        const ParamRow& row = registry.rows()[static_cast<std::size_t>(block.row_idx)];
        norm_order_.push_back({row.first_unit_idx + block.unit, block.block_in_unit, position++});
      }
    };
    for (const FlatId flat : kFlatIds) {
      if (!registry.is_trained(flat)) continue;
      if (is_by_expert(flat)) {
        add(by_ep_rank[index_of(flat)][static_cast<std::size_t>(rank % ep)].owned(rank / ep));
      } else {
        add(instance_->shards(flat).owned(rank));
      }
    }
    norm_counts_.push_back(position - norm_offsets_.back());
  }
  norm_parts_.resize(static_cast<std::size_t>(position));
  std::sort(norm_order_.begin(), norm_order_.end(), [](const NormBlock& a, const NormBlock& b) {
    return std::pair(a.unit_idx, a.block) < std::pair(b.unit_idx, b.block);
  });
}

void Optimizer::reduce_gradients() {
  Stream& stream = instance_->stream();
  const Span span(stream, "reduction");
  instance_->params().complete_sums(stream);
  instance_->world().meet(stream);
  const TensorView parts(norm_parts_.data(), DType::f64, 1, std::ssize(norm_parts_));
  std::int64_t position = norm_offsets_[static_cast<std::size_t>(instance_->world().rank())];
  for (Flat& flat : flats_) {
    const auto blocks = static_cast<std::int64_t>(flat.blocks.size());
    if (!instance_->registry().is_trained(flat.id)) continue;
    const TensorView sums = instance_->params().flat_sums(flat.id);
    const FlatShards& shards = instance_->shards(flat.id);
    stream.wait(instance_->group(flat.id).reduce_scatter_v(
        stream, {.buffer = sums, .counts = shards.counts, .offsets = shards.offsets}));
    gradient_squares(stream, {.sum = sums.col_range(flat.begin, flat.count),
                              .sums_of_squares = parts.col_range(position, blocks),
                              .blocks = flat.blocks});
    position += blocks;
  }
}

double Optimizer::gradient_norm() {
  Stream& stream = instance_->stream();
  const Span span(stream, "gradient norm");
  const TensorView parts(norm_parts_.data(), DType::f64, 1, std::ssize(norm_parts_));
  stream.wait(instance_->world().all_gather_v(
      stream, {.buffer = parts, .counts = norm_counts_, .offsets = norm_offsets_}));
  double sum = 0;
  for (const NormBlock& block : norm_order_) {
    sum += norm_parts_[static_cast<std::size_t>(block.position)];
  }
  return std::sqrt(sum);
}

/// Calls fn(begin, count, row) for runs of owned elements whose rows share their hyperparameters.
template <class Fn>
void Optimizer::for_each_run(const Flat& flat, Fn&& fn) const {
  const auto owned = instance_->shards(flat.id).owned(instance_->group(flat.id).rank());
  const auto& rows = instance_->registry().rows();
  const auto row_of = [&](const ParamBlock& block) -> const ParamRow& {
    return rows[static_cast<std::size_t>(block.row_idx)];
  };
  for (std::size_t i = 0; i < owned.size();) {
    const ParamRow& row = row_of(owned[i]);
    std::size_t last = i;
    while (last + 1 < owned.size()) {
      const ParamRow& next = row_of(owned[last + 1]);
      if (next.lr_scale != row.lr_scale || next.weight_decay != row.weight_decay ||
          next.trainable != row.trainable) {
        break;
      }
      ++last;
    }
    fn(owned[i].begin, owned[last].begin + owned[last].count - owned[i].begin, row);
    i = last + 1;
  }
}

TensorView Optimizer::compute_part(const Flat& flat, std::int64_t begin, std::int64_t count) {
  const TensorView values = instance_->params().flat_values(flat.id);
  return values.dtype == flat.master.dtype ? TensorView() : values.col_range(begin, count);
}

void Optimizer::apply(double lr, double clip_factor, std::int64_t update) {
  const double correction1 = 1 - std::pow(config_.beta1, static_cast<double>(update));
  const double correction2 = 1 - std::pow(config_.beta2, static_cast<double>(update));
  for (Flat& flat : flats_) {
    const TensorView sums = instance_->params().flat_sums(flat.id);
    for_each_run(flat, [&](std::int64_t begin, std::int64_t count, const ParamRow& row) {
      if (!row.trainable) return;
      const std::int64_t at = begin - flat.begin;
      adamw(instance_->stream(), {.master = flat.master.col_range(at, count),
                                  .m = flat.m.col_range(at, count),
                                  .v = flat.v.col_range(at, count),
                                  .sum = sums.col_range(begin, count),
                                  .compute = compute_part(flat, begin, count),
                                  .clip_factor = clip_factor,
                                  .lr = lr * row.lr_scale,
                                  .beta1 = config_.beta1,
                                  .beta2 = config_.beta2,
                                  .eps = config_.eps,
                                  .weight_decay = row.weight_decay,
                                  .bias_correction1 = correction1,
                                  .bias_correction2 = correction2});
    });
  }
  const Span span(instance_->stream(), "reduction");
  instance_->world().meet(instance_->stream());
  instance_->gather_parameters(/*trained_only=*/true);
}

void Optimizer::adopt_parameters() {
  // bf16 parameters were rounded from these numbers, so the master is made again, not widened.
  const ParamRegistry& registry = instance_->registry();
  for (const Flat& flat : flats_) {
    if (instance_->params().dtype(flat.id) == flat.master.dtype) continue;
    const auto owned = instance_->shards(flat.id).owned(instance_->group(flat.id).rank());
    for (const ParamBlock& block : owned) {
      initial_values(instance_->stream(), registry.rows()[static_cast<std::size_t>(block.row_idx)],
                     instance_->options().seed, block,
                     flat.master.col_range(block.begin - flat.begin, block.count));
    }
  }
}

void Optimizer::publish_parameters() {
  for (const Flat& flat : flats_) {
    const TensorView part = compute_part(flat, flat.begin, flat.count);
    if (part.data != nullptr && flat.count > 0) {
      cast(instance_->stream(), {.y = part, .x = flat.master});
    }
  }
  instance_->gather_parameters(/*trained_only=*/false);
}

void Optimizer::append_state(const std::string& prefix, TensorView Flat::*member,
                             std::vector<StateView>& views) {
  const ParamRegistry& registry = instance_->registry();
  const std::size_t first_view = views.size();
  for (const ParamRow& row : registry.rows()) {
    views.push_back({.spec = row.spec(flats_[index_of(row.flat)].master.dtype)});
    views.back().spec.name = prefix + row.name;
  }
  for (const Flat& flat : flats_) {
    const auto owned = instance_->shards(flat.id).owned(instance_->group(flat.id).rank());
    for (const ParamBlock& block : owned) {
      StateView& view = views[first_view + static_cast<std::size_t>(block.row_idx)];
      const std::int64_t begin =
          block.unit * view.spec.unit_rows() + block.block_in_unit * block_rows(view.spec);
      const RowRange rows{begin, begin + block.count / view.spec.cols()};
      if (!view.slices.empty() && view.slices.back().rows.end == begin && block.block_in_unit > 0) {
        view.slices.back().rows.end = rows.end;  // the next block of the same unit
        continue;
      }
      view.slices.push_back({rows, (flat.*member).col_range(block.begin - flat.begin, 0).data});
    }
  }
}

std::vector<StateView> Optimizer::state() {
  std::vector<StateView> views;
  append_state("", &Flat::master, views);
  append_state("optimizer/m/", &Flat::m, views);
  append_state("optimizer/v/", &Flat::v, views);
  // Frozen parameters have no moments.
  std::erase_if(views, [&](const StateView& view) {
    const auto& rows = instance_->registry().rows();
    return view.spec.name.starts_with("optimizer/") &&
           std::any_of(rows.begin(), rows.end(), [&](const ParamRow& row) {
             return !row.trainable && view.spec.name.substr(12) == row.name;
           });
  });
  return views;
}

std::int64_t Optimizer::bytes() const {
  std::int64_t bytes = 0;
  for (const Flat& flat : flats_) {
    for (const auto& arena : flat.memory) bytes += arena->capacity();
  }
  return bytes;
}

}  // namespace arcus
