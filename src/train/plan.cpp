#include "src/train/plan.hpp"

#include <algorithm>

namespace arcus {
namespace {

/// A rank of a world that does not exist: knows its place, refuses to communicate.
class PlannedCommunicator final : public Communicator {
 public:
  PlannedCommunicator(int rank, int size) : Communicator(rank, size, {}) {}
  [[noreturn]] void abort(ExitCode code, std::string_view message) override {
    ARCUS_FAIL(code, "{}", message);
  }

 private:
  [[noreturn]] static void refuse() {
    ARCUS_FAIL(ExitCode::internal, "a plan does not communicate");
  }
  Event do_all_to_all_v(const AllToAllV&) override { refuse(); }
  Event do_all_reduce(const AllReduce&) override { refuse(); }
  Event do_all_gather_v(const AllGatherV&) override { refuse(); }
  Event do_reduce_scatter_v(const ReduceScatterV&) override { refuse(); }
  Event do_broadcast(const Broadcast&) override { refuse(); }
  void do_barrier() override { refuse(); }
  std::unique_ptr<Communicator> do_split(int, int) override { refuse(); }
};

void add_advice(const TrainerOptions& options, TrainPlan& plan) {
  if (!plan.segments.empty() && plan.segments.front().rows < 256) {
    plan.advice.push_back(fmt::format(
        "an expert gets about {} rows of a micro-batch; matrix products and order-independent sums "
        "are efficient from 256: raise train.micro_batch_seqs (now {})",
        plan.segments.front().rows, options.train.micro_batch_seqs));
  }
  if (plan.micro_batches % plan.num_ranks != 0) {
    plan.advice.push_back(fmt::format(
        "{} micro-batches on {} ranks leave {} idle in the last round of a step; "
        "train.global_batch_seqs = {} would not",
        plan.micro_batches, plan.num_ranks, plan.rounds * plan.num_ranks - plan.micro_batches,
        plan.rounds * plan.num_ranks * options.train.micro_batch_seqs));
  }
}

void add_segments(const TrainerOptions& options, TrainPlan& plan) {
  const ModelConfig& model = options.model;
  for (std::int64_t l = model.first_k_dense; l < model.num_layers; ++l) {
    const LayerRouting layer = routing_of_layer(model, options.routing, options.overrides, l);
    const RoutingConfig& routing = layer.routing;
    // A first level may let tokens pass by.
    const std::int64_t tokens =
        find_stream(routing.stream).predicts
            ? expert_capacity(routing.stream_capacity_factor, 0, 1, plan.micro_batch_tokens, 1)
            : plan.micro_batch_tokens;
    const SegmentPlan segment{
        .first_layer = l,
        .rows = tokens * layer.topk / model.num_experts,
        .capacity = expert_capacity(routing.capacity_factor, routing.min_capacity, layer.topk,
                                    tokens, model.num_experts),
        .padded = routing.pad_to_capacity};
    const bool known =
        std::any_of(plan.segments.begin(), plan.segments.end(),
                    [&](const SegmentPlan& other) { return other.same_rows(segment); });
    if (!known) plan.segments.push_back(segment);
  }
}

/// What the products of adapters add to the model's own, less the weight gradients that frozen
/// weights do without; per token.
double flops_beside(const ParamRegistry& registry, bool tied) {
  double flops = 0;
  for (const ParamRow& row : registry.rows()) {
    const bool lookup = row.name == "model.embed_tokens.weight" && !tied;
    const bool matrix = row.shape.size() >= (row.kind == ParamKind::expert ? 3U : 2U);
    if (!matrix || lookup) continue;
    const auto elements = static_cast<double>(row.active_units * row.unit_elements());
    if (row.adapter) {
      flops += (row.trainable ? 6 : 4) * elements;
    } else if (!row.trainable) {
      flops -= 2 * elements;
    }
  }
  return flops;
}

std::string segments_text(const TrainPlan& plan) {
  if (plan.segments.empty()) return "segments     none, all layers are dense\n";
  std::string text;
  for (const SegmentPlan& segment : plan.segments) {
    const std::string layers =
        plan.segments.size() == 1 ? "" : fmt::format(" (layer {}...)", segment.first_layer);
    text += fmt::format("segments     {} rows per expert and micro-batch when even, {}{}\n",
                        grouped_digits(segment.rows),
                        segment.capacity == 0
                            ? "dropless"
                            : fmt::format("{} {}", segment.padded ? "filled up to" : "at most",
                                          grouped_digits(segment.capacity)),
                        layers);
  }
  return text;
}

}  // namespace

std::string grouped_digits(std::int64_t value) {
  if (value < 0) return fmt::format("-{}", grouped_digits(-value));
  if (value < 1000) return fmt::format("{}", value);
  return fmt::format("{},{:03}", grouped_digits(value / 1000), value % 1000);
}

std::string bytes_text(std::int64_t bytes) {
  const char* const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  auto value = static_cast<double>(bytes);
  std::size_t unit = 0;
  while (value >= 1024 && unit + 1 < std::size(units)) {
    value /= 1024;
    ++unit;
  }
  return unit == 0 ? fmt::format("{} B", bytes) : fmt::format("{:.1f} {}", value, units[unit]);
}

std::int64_t TrainPlan::even_bytes() const {
  std::int64_t sum = 0;
  for (const ByteRow& row : bytes) sum += row.balanced;
  return sum;
}

std::int64_t TrainPlan::worst_bytes() const {
  std::int64_t sum = 0;
  for (const ByteRow& row : bytes) sum += row.worst;
  return sum;
}

namespace {

std::int64_t bytes_of(std::span<const StateView> views) {
  std::int64_t bytes = 0;
  for (const StateView& view : views) {
    for (const StateSlice& slice : view.slices) {
      bytes += (slice.rows.end - slice.rows.begin) * view.spec.cols() *
               static_cast<std::int64_t>(size_of(view.spec.dtype));
    }
  }
  return bytes;
}

}  // namespace

TrainPlan make_plan(const TrainerOptions& options, int num_ranks, int ranks_per_node,
                    std::int64_t ep_size, int threads_per_rank) {
  TrainPlan plan;
  plan.num_ranks = num_ranks;
  plan.ep_size = resolve_ep_size(ep_size, num_ranks, options.model.num_experts);
  plan.threads_per_rank = threads_per_rank;
  PlannedCommunicator world(0, num_ranks);
  ProcessGroups groups{&world, std::make_unique<PlannedCommunicator>(0, plan.ep_size),
                       std::make_unique<PlannedCommunicator>(0, num_ranks / plan.ep_size)};
  Stream stream(1);
  // Nobody is there to share memory with: planned as messages to every rank, and compared below.
  InstanceOptions planned = instance_options(options);
  planned.dispatch_path = DispatchPath::flat;
  ModelInstance instance(std::move(groups), stream, planned);
  Optimizer optimizer(instance, options.train);

  plan.total_parameters = instance.registry().total_parameters();
  plan.active_parameters = instance.registry().active_parameters();
  plan.trained_parameters = instance.registry().trained_parameters();
  const ExpertPartition experts(options.model.num_experts, plan.ep_size);
  for (int r = 0; r < plan.ep_size; ++r) plan.experts_per_rank.push_back(experts.count(r));
  plan.tokens_per_step = options.train.global_batch_seqs * options.train.seq_len;
  plan.micro_batches = options.train.global_batch_seqs / options.train.micro_batch_seqs;
  plan.rounds = MicroBatchSchedule{plan.micro_batches, num_ranks}.rounds();
  plan.micro_batch_tokens = instance.micro_batch_tokens();
  add_segments(options, plan);
  plan.training_flops_per_token =
      instance.transformer().training_flops_per_token(options.train.seq_len) +
      flops_beside(instance.registry(), options.model.tie_embeddings);
  plan.bytes = instance.byte_rows();
  if (plan.ep_size > 1 && options.dispatch_path != DispatchPath::flat) {
    // Whether a node's ranks can share memory shows when they meet: the larger of the two ways.
    const std::int64_t shared =
        shared_dispatcher_bytes(instance.dispatcher().options(), plan.ep_size, ranks_per_node);
    for (ByteRow& row : plan.bytes) {
      if (row.purpose != "exchange buffers") continue;
      row.balanced = std::max(row.balanced, shared);
      row.worst = std::max(row.worst, shared);
    }
  }
  plan.bytes.insert(plan.bytes.begin() + 2,
                    {"optimizer (moments, master weights)", optimizer.bytes(), optimizer.bytes()});
  plan.state_bytes = bytes_of(optimizer.state()) + bytes_of(instance.balance().state());
  add_advice(options, plan);
  return plan;
}

std::string to_text(const TrainPlan& plan) {
  const auto [least, most] =
      std::minmax_element(plan.experts_per_rank.begin(), plan.experts_per_rank.end());
  std::string text = fmt::format(
      "parameters   {} total, {} active per token, {}{:.1f} MFLOP per token and step\n"
      "ranks        {} = EP {} x EDP {}, {} experts per rank, {} thread{} each\n"
      "step         {} tokens in {} micro-batches of {}, {} round{}\n",
      grouped_digits(plan.total_parameters), grouped_digits(plan.active_parameters),
      plan.trained_parameters == plan.total_parameters
          ? ""
          : grouped_digits(plan.trained_parameters) + " trained, ",
      plan.training_flops_per_token / 1e6, plan.num_ranks, plan.ep_size,
      plan.num_ranks / plan.ep_size,
      *least == *most ? std::to_string(*most) : fmt::format("{} or {}", *least, *most),
      plan.threads_per_rank, plan.threads_per_rank == 1 ? "" : "s",
      grouped_digits(plan.tokens_per_step), plan.micro_batches,
      grouped_digits(plan.micro_batch_tokens), plan.rounds, plan.rounds == 1 ? "" : "s");
  text += segments_text(plan);
  text += fmt::format("\n{:<40} {:>12} {:>12}\n", "memory of a rank", "even load", "worst case");
  for (const ByteRow& row : plan.bytes) {
    text += fmt::format("{:<40} {:>12} {:>12}\n", row.purpose, bytes_text(row.balanced),
                        bytes_text(row.worst));
  }
  text += fmt::format("{:<40} {:>12} {:>12}\n", "sum", bytes_text(plan.even_bytes()),
                      bytes_text(plan.worst_bytes()));
  for (const std::string& sentence : plan.advice) text += fmt::format("note: {}\n", sentence);
  return text;
}

}  // namespace arcus
