#include "src/train/model_instance.hpp"

#include <algorithm>
#include <regex>

#include "kernels/elementwise.hpp"

namespace arcus {
namespace {

/// Calls fn(routing) for every MoE layer.
template <class Fn>
void for_each_routing(const InstanceOptions& o, Fn&& fn) {
  for (std::int64_t l = o.model.first_k_dense; l < o.model.num_layers; ++l) {
    fn(routing_of_layer(o.model, o.routing, o.overrides, l));
  }
}

/// Most slots of any layer.
std::int64_t max_slots(const InstanceOptions& o) {
  std::int64_t slots = 1;
  for_each_routing(o, [&](const LayerRouting& layer) {
    ModelConfig model = o.model;
    model.topk = layer.topk;
    slots = std::max(slots, num_slots(model, layer.routing));
  });
  return slots;
}

/// Most rows per expert and micro-batch in any layer; 0 = no limit. Evaluation uses the same
/// dispatcher, so the looser limit counts.
std::int64_t loosest_capacity(const InstanceOptions& o) {
  std::int64_t most = 1;
  bool dropless = false;
  for_each_routing(o, [&](const LayerRouting& layer) {
    const auto add = [&](double factor) {
      const std::int64_t capacity =
          expert_capacity(factor, layer.routing.min_capacity, layer.topk,
                          o.micro_batch_seqs * o.seq_len, o.model.num_experts);
      dropless = dropless || capacity == 0;
      most = std::max(most, capacity);
    };
    if (o.training) add(layer.routing.capacity_factor);
    add(layer.routing.eval_capacity_factor);
  });
  return dropless || o.model.first_k_dense >= o.model.num_layers ? 0 : most;
}

/// Most rows of a segment that is filled up to its capacity; 0 = none is.
std::int64_t padded_capacity(const InstanceOptions& o) {
  std::int64_t most = 0;
  for_each_routing(o, [&](const LayerRouting& layer) {
    if (!o.training || !layer.routing.pad_to_capacity) return;
    most = std::max(
        most, expert_capacity(layer.routing.capacity_factor, layer.routing.min_capacity, layer.topk,
                              o.micro_batch_seqs * o.seq_len, o.model.num_experts));
  });
  return most;
}

DispatcherOptions dispatcher_options(const InstanceOptions& o) {
  return {.num_experts = o.model.num_experts,
          .max_tokens = o.micro_batch_seqs * o.seq_len,
          .slots_per_token = max_slots(o),
          .hidden_size = o.model.hidden_size,
          .dtype = o.compute,
          .capacity = loosest_capacity(o),
          .padded_capacity = padded_capacity(o)};
}

ParamRegistry make_registry(const ProcessGroups& groups, const InstanceOptions& o) {
  const ExpertPartition experts(o.model.num_experts, groups.ep->size());
  return {o.model.num_experts, experts.begin(groups.ep->rank()), experts.count(groups.ep->rank()),
          o.lora};
}

bool belongs_to(const ParamRow& row, const ParamGroupConfig& group) {
  if (group.part != kAnyPart && group.part != kParamParts[static_cast<std::size_t>(part_of(row))]) {
    return false;
  }
  return std::regex_search(row.name, std::regex(group.match));
}

}  // namespace

InstanceOptions dropless_outside_training(InstanceOptions options) {
  options.routing.eval_capacity_factor = 0;
  for (RoutingOverride& o : options.overrides) o.with.routing.eval_capacity_factor = 0;
  return options;
}

ModelInstance::ModelInstance(ProcessGroups groups, Stream& stream, const InstanceOptions& options)
    : options_(options),
      groups_(std::move(groups)),
      stream_(&stream),
      registry_(make_registry(groups_, options)),
      balance_(options.model, options.routing, options.overrides,
               {options.training ? options.num_micro_batches : 0, micro_batch_tokens()},
               groups_.world->rank(), groups_.world->size()) {
  check_positions(options.model, options.seq_len);
  transformer_ =
      std::make_unique<Transformer>(options.model, options.routing, options.overrides,
                                    options.training ? micro_batch_tokens() : 0, registry_);
  apply_groups();
  params_ =
      std::make_unique<ParamStore>(registry_, options.compute, options.sum_dtype, options.training);
  params_->set_num_micro_batches(options.num_micro_batches);
  if (options.training && options.sum_dtype == DType::f32) let_row_bits_differ(stream);
  dispatcher_ = make_dispatcher(*groups_.ep, dispatcher_options(options), options.dispatch_path);
  const RoundMemory most = round_memory(true);
  rows_ = std::make_unique<Arena>(dispatcher_->make_row_memory(most.row_bytes));
  saved_ = std::make_unique<Arena>("saved activations", most.saved_bytes);
  scratch_ = std::make_unique<Arena>("scratch", most.scratch_bytes);
  for (const FlatId flat : kFlatIds) {
    shards_[index_of(flat)] =
        make_shards(registry_.local_blocks(flat), registry_.flat_size(flat), group(flat).size());
  }
}

PassContext ModelInstance::pass(const MicroBatch& batch, MicroBatchStats& stats) {
  return {.stream = *stream_,
          .saved = *saved_,
          .scratch = *scratch_,
          .rows = *rows_,
          .batch = batch,
          .stats = stats,
          .seed = options_.seed,
          .balance = &balance_};
}

Communicator& ModelInstance::group(FlatId flat) {
  return is_by_expert(flat) ? *groups_.edp : *groups_.world;
}

void ModelInstance::apply_groups() {
  std::vector<bool> matched(options_.groups.size());
  for (ParamRow& row : registry_.mutable_rows()) {
    // Decay applies to tensors of two or more dimensions.
    const double usual_decay = row.is_matrix() ? options_.weight_decay : 0;
    row.weight_decay = usual_decay;
    // Adapters stand for what they are added to, which stays as it is.
    row.trainable = row.adapter || !options_.lora.active();
    for (std::size_t g = 0; g < options_.groups.size(); ++g) {
      const ParamGroupConfig& group = options_.groups[g];
      if (!belongs_to(row, group)) continue;
      matched[g] = true;
      row.lr_scale = group.lr_scale;
      row.trainable = !group.frozen;
      row.weight_decay = group.weight_decay >= 0 ? group.weight_decay : usual_decay;
    }
  }
  for (std::size_t g = 0; g < matched.size(); ++g) {
    const ParamGroupConfig& group = options_.groups[g];
    ARCUS_REQUIRE(
        matched[g], ExitCode::usage,
        "train.group.{}.match = \"{}\" is found in no parameter's name{}; names are such as "
        "{}, {} and {}",
        g, group.match, group.part == kAnyPart ? "" : fmt::format(" of part \"{}\"", group.part),
        registry_.rows().front().name, registry_.rows()[registry_.rows().size() / 2].name,
        registry_.rows().back().name);
  }
  ARCUS_REQUIRE(!options_.training || registry_.trained_parameters() > 0, ExitCode::usage,
                "every parameter is frozen by [[train.group]]; leave at least one to be trained");
}

RoundMemory ModelInstance::round_memory(bool worst) const {
  const std::int64_t tokens = micro_batch_tokens();
  const std::int64_t local = registry_.num_local_experts();
  const std::int64_t balanced = max_send_rows(dispatcher_->options());
  const std::int64_t rows =
      worst ? dispatcher_->max_recv_rows() : std::min(balanced, dispatcher_->max_recv_rows());
  const std::int64_t padded =
      worst ? dispatcher_->max_padded_rows()
            : std::min(padded_rows(rows) + local * groups_.ep->size() * kWgradRowPadding / 2,
                       dispatcher_->max_padded_rows());
  RoundMemory memory = transformer_->count_round(
      tokens, rows, padded, *dispatcher_, options_.compute, options_.training, options_.recompute);
  if (options_.training) {
    // Evaluation shares the arenas.
    const RoundMemory eval = transformer_->count_round(tokens, rows, padded, *dispatcher_,
                                                       options_.compute, false, false);
    memory.saved_bytes = std::max(memory.saved_bytes, eval.saved_bytes);
    memory.scratch_bytes = std::max(memory.scratch_bytes, eval.scratch_bytes);
    memory.row_bytes = std::max(memory.row_bytes, eval.row_bytes);
  }
  return memory;
}

void ModelInstance::initialize_parameters() {
  for (const FlatId flat : kFlatIds) {
    const TensorView values = params_->flat_values(flat);
    for (const ParamBlock& block : registry_.local_blocks(flat)) {
      initial_values(*stream_, registry_.rows()[static_cast<std::size_t>(block.row_idx)],
                     options_.seed, block, values.col_range(block.begin, block.count));
    }
  }
}

void ModelInstance::gather_parameters(bool trained_only) {
  for (const FlatId flat : kFlatIds) {
    if (registry_.flat_size(flat) == 0 || (trained_only && !registry_.is_trained(flat))) continue;
    stream_->wait(group(flat).all_gather_v(*stream_, {.buffer = params_->flat_values(flat),
                                                      .counts = shards(flat).counts,
                                                      .offsets = shards(flat).offsets}));
  }
}

PrimitiveReport ModelInstance::build_primitives() {
  // The largest segment: one expert's rows of one micro-batch.
  const std::int64_t capacity = dispatcher_->options().capacity;
  const std::int64_t rows = capacity > 0 ? capacity : micro_batch_tokens();
  return transformer_->build_primitives(*stream_, options_.micro_batch_seqs, options_.seq_len, rows,
                                        options_.compute, options_.training);
}

std::vector<ByteRow> ModelInstance::byte_rows() const {
  const RoundMemory balanced = round_memory(false);
  const RoundMemory worst = round_memory(true);
  std::vector<ByteRow> rows{{"parameters", params_->value_bytes(), params_->value_bytes()}};
  if (options_.training) {
    rows.push_back({"gradient sums", params_->sum_bytes(), params_->sum_bytes()});
  }
  rows.push_back({"saved activations", balanced.saved_bytes, worst.saved_bytes});
  rows.push_back({"scratch", balanced.scratch_bytes, worst.scratch_bytes});
  rows.push_back({"received rows", balanced.row_bytes, worst.row_bytes});
  if (options_.training && balance_.bytes() > (1 << 20)) {
    rows.push_back({"scores for balancing", balance_.bytes(), balance_.bytes()});
  }
  const std::int64_t exchange = dispatcher_->buffer_bytes();
  rows.push_back({"exchange buffers", exchange, exchange});
  return rows;
}

std::vector<StateView> ModelInstance::parameter_views() {
  staging_.clear();
  std::array<TensorView, kFlatIds.size()> flats;
  for (const FlatId flat : kFlatIds) {
    flats[index_of(flat)] = params_->flat_values(flat);
    if (params_->dtype(flat) != DType::bf16) continue;
    const std::int64_t n = registry_.flat_size(flat);
    staging_.push_back(std::make_unique<Arena>("staging", n * 4));
    flats[index_of(flat)] = staging_.back()->allocate(DType::f32, 1, n);
  }
  std::vector<StateView> views;
  for (const ParamRow& row : registry_.rows()) {
    const TensorView flat = flats[index_of(row.flat)];
    StateView view{.spec = row.spec(flat.dtype)};
    const bool expert = row.kind == ParamKind::expert;
    const std::int64_t units = expert ? registry_.num_local_experts() : 1;
    const std::int64_t first = expert ? registry_.first_local_expert() : 0;
    const std::int64_t rows = view.spec.unit_rows();
    for (std::int64_t unit = 0; unit < units; ++unit) {
      view.slices.push_back({{(first + unit) * rows, (first + unit + 1) * rows},
                             flat.col_range(row.offset + unit * row.expert_stride, 0).data});
    }
    views.push_back(std::move(view));
  }
  for (StateView& view : balance_.state()) views.push_back(std::move(view));
  return views;
}

void ModelInstance::finish_reading() {
  std::size_t next = 0;
  for (const FlatId flat : kFlatIds) {
    if (params_->dtype(flat) != DType::bf16) continue;
    Arena& arena = *staging_[next++];
    arena.reset();
    cast(*stream_, {.y = params_->flat_values(flat),
                    .x = arena.allocate(DType::f32, 1, registry_.flat_size(flat))});
  }
  staging_.clear();
}

}  // namespace arcus
