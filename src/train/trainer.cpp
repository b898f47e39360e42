#include "src/train/trainer.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <numeric>

#include "src/base/log.hpp"

namespace arcus {

InstanceOptions instance_options(const TrainerOptions& o) {
  return {.model = o.model,
          .routing = o.routing,
          .overrides = o.overrides,
          .compute = dtype_from_name(o.train.dtype),
          .sum_dtype = o.reproducible ? DType::i64 : DType::f32,
          .training = true,
          .recompute = o.train.recompute,
          .micro_batch_seqs = o.train.micro_batch_seqs,
          .seq_len = o.train.seq_len,
          .num_micro_batches = o.train.global_batch_seqs / o.train.micro_batch_seqs,
          .seed = o.seed,
          .weight_decay = o.train.weight_decay,
          .groups = o.groups,
          .lora = o.lora,
          .dispatch_path = o.dispatch_path};
}

Trainer::Trainer(ModelInstance& instance, const TrainerOptions& options)
    : instance_(&instance),
      options_(options),
      optimizer_(instance, options.train),
      schedule_{instance.options().num_micro_batches, instance.world().size()},
      workspace_(instance.transformer().make_workspace()),
      buffers_(options.train.micro_batch_seqs, options.train.seq_len),
      stats_(instance.transformer().make_stats()) {
  const auto ranks = static_cast<std::size_t>(instance.world().size());
  const std::int64_t part = schedule_.rounds() * record_size();
  scalars_.resize(ranks * static_cast<std::size_t>(part));
  gather_counts_.assign(ranks, part);
  for (std::size_t r = 0; r < ranks; ++r) {
    gather_offsets_.push_back(static_cast<std::int64_t>(r) * part);
  }
  counts_.resize(dropped_begin() + 2 * static_cast<std::size_t>(options.model.num_layers) +
                 2 * ranks + 1);
}

/// Where the dropped assignments stand in counts_: behind demand and score counts. Tokens routed
/// and rows received come next.
std::size_t Trainer::dropped_begin() const {
  return stats_.demand.size() + stats_.score_counts.size();
}

/// Token loss, then aux, z, entropy, the predictor's loss and the stream's gate of every layer.
std::int64_t Trainer::record_size() const { return 1 + 5 * options_.model.num_layers; }

void Trainer::set_heartbeat(Heartbeat heartbeat) {
  heartbeat_ = std::move(heartbeat);
  layer_heartbeat_ = [this](std::int64_t layer, const char* what) {
    heartbeat_(counters_[kStepsDone], layer, what);
  };
}

void Trainer::initialize() {
  instance_->initialize_parameters();
  optimizer_.adopt_parameters();
}

std::vector<StateView> Trainer::state() {
  std::vector<StateView> views = optimizer_.state();
  for (StateView& view : instance_->balance().state()) views.push_back(std::move(view));
  const auto add = [&](const char* name, DType dtype, void* data) {
    StateView& view = views.emplace_back();
    view.spec.name = name;
    view.spec.dtype = dtype;
    view.replicated = true;
    view.slices.push_back({{0, 1}, data});
  };
  add("counters/steps_done", DType::i64, &counters_[kStepsDone]);
  add("counters/updates", DType::i64, &counters_[kUpdates]);
  add("counters/bad_steps_in_a_row", DType::i64, &counters_[kBadSteps]);
  add("counters/samples_ahead", DType::i64, &counters_[kSamplesAhead]);
  add("counters/times_back", DType::i64, &counters_[kTimesBack]);
  add("counters/loss_average", DType::f64, &loss_average_);
  return views;
}

void Trainer::finish_reading() { optimizer_.publish_parameters(); }

void Trainer::run_round(const BatchSampler& sampler, std::int64_t round) {
  const TrainConfig& train = options_.train;
  const std::int64_t rank = instance_->world().rank();
  const std::int64_t number = schedule_.number(round, rank);
  MicroBatch batch = buffers_.idle();
  if (number >= 0) {
    const Span span(instance_->stream(), "data");
    batch = buffers_.fill(sampler, number, train.micro_batch_seqs,
                          first_sample() + number * train.micro_batch_seqs);
    batch.loss_scale = 1.0 / static_cast<double>(metrics_.targets);
    batch.weight = 1.0 / static_cast<double>(schedule_.num_micro_batches);
  }
  PassContext ctx = instance_->pass(batch, stats_);
  ctx.step = counters_[kStepsDone];
  if (number >= 0 && observer_) ctx.observer = &observer_;
  if (heartbeat_) ctx.heartbeat = &layer_heartbeat_;
  instance_->transformer().train(ctx, instance_->params(), instance_->dispatcher(), workspace_,
                                 train.recompute);
  // Into this rank's part of the gathered records, and onto the step's counts.
  double* record = scalars_.data() + (rank * schedule_.rounds() + round) * record_size();
  const auto layers = static_cast<std::size_t>(options_.model.num_layers);
  *record++ = number >= 0 ? stats_.token_loss_sum : 0;
  for (const auto* values : {&stats_.aux_loss, &stats_.z_loss, &stats_.entropy_sum,
                             &stats_.predictor_loss, &stats_.stream_gate}) {
    for (std::size_t l = 0; l < layers; ++l) *record++ = number >= 0 ? (*values)[l] : 0;
  }
  if (number >= 0) {
    const auto add = [this](std::size_t begin, const std::vector<std::int64_t>& values) {
      for (std::size_t i = 0; i < values.size(); ++i) counts_[begin + i] += values[i];
    };
    add(0, stats_.demand);
    add(stats_.demand.size(), stats_.score_counts);
    add(dropped_begin(), stats_.dropped);
    add(dropped_begin() + layers, stats_.routed);
  }
  counts_[dropped_begin() + 2 * layers + static_cast<std::size_t>(rank)] +=
      std::accumulate(stats_.recv_rows.begin(), stats_.recv_rows.end(), std::int64_t{0});
}

void Trainer::gather_scalars() {
  const Span span(instance_->stream(), "metrics");
  instance_->world().meet(instance_->stream());
  Stream& stream = instance_->stream();
  stream.wait(instance_->world().all_gather_v(
      stream,
      {.buffer = {scalars_.data(), DType::f64, 1, static_cast<std::int64_t>(scalars_.size())},
       .counts = gather_counts_,
       .offsets = gather_offsets_}));
  const auto layers = static_cast<std::size_t>(options_.model.num_layers);
  double token_loss = 0;
  for (std::int64_t n = 0; n < schedule_.num_micro_batches; ++n) {
    const std::int64_t rank = n % schedule_.num_ranks;
    const std::int64_t round = n / schedule_.num_ranks;
    const double* record = scalars_.data() + (rank * schedule_.rounds() + round) * record_size();
    token_loss += record[0];
    for (std::size_t l = 0; l < layers; ++l) {
      metrics_.aux_loss += record[1 + l];
      metrics_.z_loss += record[1 + layers + l];
      metrics_.layers[l].entropy += record[1 + 2 * layers + l];
      metrics_.layers[l].predictor_loss += record[1 + 3 * layers + l];
      metrics_.layers[l].stream_gate += record[1 + 4 * layers + l];
    }
  }
  metrics_.ce = token_loss / static_cast<double>(metrics_.targets);
  metrics_.loss = metrics_.ce + metrics_.aux_loss + metrics_.z_loss;
}

void Trainer::reduce_counts(std::int64_t sent_before, double comm_before) {
  const Span span(instance_->stream(), "metrics");
  Stream& stream = instance_->stream();
  const auto ranks = static_cast<std::size_t>(schedule_.num_ranks);
  const auto own = static_cast<std::size_t>(instance_->world().rank());
  counts_[counts_.size() - 1 - ranks + own] =
      static_cast<std::int64_t>((instance_->comm_seconds() - comm_before) * 1e6);
  counts_.back() = instance_->sent_bytes() - sent_before;
  stream.wait(instance_->world().all_reduce(
      stream,
      {.buffer = {counts_.data(), DType::i64, 1, static_cast<std::int64_t>(counts_.size())}}));
  const auto experts = static_cast<std::size_t>(options_.model.num_experts);
  for (std::size_t l = 0; l < metrics_.layers.size(); ++l) {
    if (static_cast<std::int64_t>(l) < options_.model.first_k_dense) continue;
    LayerMetrics& layer = metrics_.layers[l];
    const auto demand = std::span(counts_).subspan(l * experts, experts);
    layer.tokens_per_expert.assign(demand.begin(), demand.end());
    layer.dropped = counts_[dropped_begin() + l];
    const std::int64_t routed = counts_[dropped_begin() + metrics_.layers.size() + l];
    layer.entropy /= static_cast<double>(std::max<std::int64_t>(1, routed));
    layer.stream_share = static_cast<double>(routed) / static_cast<double>(metrics_.tokens);
    layer.max_mean_load = max_mean_load(demand);
  }
  const auto rows = std::span(counts_).last(2 * ranks + 1).first(ranks);
  const auto micros = std::span(counts_).last(ranks + 1).first(ranks);
  const auto all = std::accumulate(rows.begin(), rows.end(), std::int64_t{0});
  const auto most = *std::max_element(rows.begin(), rows.end());
  metrics_.timing.rank_load =
      all > 0 ? static_cast<double>(most * schedule_.num_ranks) / static_cast<double>(all) : 1;
  metrics_.timing.comm_bytes = counts_.back();
  const auto [least_wait, most_wait] = std::minmax_element(micros.begin(), micros.end());
  metrics_.timing.comm_ms = static_cast<double>(*most_wait) / 1e3;
  // Who waits least is who the others wait for.
  metrics_.timing.straggler = least_wait - micros.begin();
  metrics_.timing.straggler_ms = static_cast<double>(*most_wait - *least_wait) / 1e3;
}

std::int64_t Trainer::agree(StepRequests& requests) {
  const Span span(instance_->stream(), "metrics");
  // The largest of the negated keys is the lowest key.
  std::int64_t news[4] = {-instance_->params().bad_leaf().load(), requests.stop ? 1 : 0,
                          requests.time_up ? 1 : 0, saving_ && saving_() ? 1 : 0};
  Stream& stream = instance_->stream();
  stream.wait(instance_->world().all_reduce(
      stream, {.buffer = {news, DType::i64, 1, 4}, .op = ReduceOp::max}));
  requests = {news[1] != 0, news[2] != 0, news[3] != 0};
  return -news[0];
}

/// Leaves parameters, moments and the count of updates as they are; all ranks come to the same
/// conclusion.
void Trainer::skip(const std::string& what, const std::string& where) {
  metrics_.applied = false;
  metrics_.bad_tensor = where;
  ++counters_[kBadSteps];
  if (instance_->world().rank() != 0) return;
  spdlog::warn("step {} {}; skipped on all ranks, {} in a row", metrics_.step, what,
               counters_[kBadSteps]);
}

void Trainer::update(std::int64_t bad_leaf) {
  const auto not_finite = [this](const std::string& where) {
    metrics_.grad_norm = std::numeric_limits<double>::quiet_NaN();
    skip(fmt::format("is not finite (first seen in {})", where), where);
  };
  if (bad_leaf != kNoBadLeaf) {
    return not_finite(fmt::format("{}, micro-batch {}",
                                  instance_->registry().unit_name(bad_leaf >> 32),
                                  bad_leaf & 0xffffffff));
  }
  if (!std::isfinite(metrics_.loss)) return not_finite("the loss");
  optimizer_.reduce_gradients();
  metrics_.grad_norm = optimizer_.gradient_norm();
  // Sums that are not order-independent carry no flag.
  if (!std::isfinite(metrics_.grad_norm)) return not_finite("the gradient norm");
  const double most = options_.train.max_grad_norm;
  if (most > 0 && metrics_.grad_norm > most) {
    return skip(fmt::format("explodes: its gradient norm of {} exceeds train.max_grad_norm ({})",
                            metrics_.grad_norm, most),
                "the gradient norm");
  }
  counters_[kBadSteps] = 0;
  const double clip = options_.train.grad_clip;
  const double factor = clip > 0 && metrics_.grad_norm > clip
                            ? static_cast<double>(static_cast<float>(clip / metrics_.grad_norm))
                            : 1;
  optimizer_.apply(metrics_.lr, factor, ++counters_[kUpdates]);
}

bool Trainer::spiked(double factor) const {
  constexpr std::int64_t kSettled = 32;
  return metrics_.applied && counters_[kUpdates] > kSettled &&
         metrics_.loss > factor * average_before_;
}

void Trainer::average_loss() {
  constexpr double kWeight = 1.0 / 32;
  average_before_ = loss_average_;
  const double difference = metrics_.loss - loss_average_;
  loss_average_ += counters_[kUpdates] == 1 ? difference : kWeight * difference;
}

/// Of the step to come.
std::int64_t Trainer::first_sample() const {
  return (counters_[kStepsDone] + counters_[kSamplesAhead]) * options_.train.global_batch_seqs;
}

/// Targets of the step to come, known to every rank from the data.
std::int64_t Trainer::count_targets(const BatchSampler& sampler) const {
  const std::int64_t targets =
      sampler.num_targets(first_sample(), options_.train.global_batch_seqs);
  ARCUS_REQUIRE(
      targets > 0, ExitCode::data,
      "step {} has nothing to learn: all of its {} tokens are prompts; raise "
      "train.global_batch_seqs ({}) or train.seq_len ({}), so that every step has answers",
      counters_[kStepsDone] + 1, metrics_.tokens, options_.train.global_batch_seqs,
      options_.train.seq_len);
  return targets;
}

/// Clears the last step's numbers, keeping their memory.
void Trainer::start_metrics() {
  std::vector<LayerMetrics> layers = std::move(metrics_.layers);
  layers.resize(static_cast<std::size_t>(options_.model.num_layers));
  for (LayerMetrics& layer : layers) {
    layer.dropped = 0;
    layer.entropy = layer.max_mean_load = layer.predictor_loss = layer.stream_gate = 0;
    layer.stream_share = 1;
    layer.tokens_per_expert.clear();
  }
  metrics_ = StepMetrics{.step = counters_[kStepsDone] + 1,
                         .lr = learning_rate(options_.train, counters_[kStepsDone]),
                         .tokens = options_.train.global_batch_seqs * options_.train.seq_len};
  metrics_.layers = std::move(layers);
}

const StepMetrics& Trainer::step(const BatchSampler& sampler, StepRequests& requests) {
  const auto begin = std::chrono::steady_clock::now();
  const std::int64_t sent_before = instance_->sent_bytes();
  const double comm_before = instance_->comm_seconds();
  start_metrics();
  metrics_.targets = count_targets(sampler);
  instance_->params().start_sums(instance_->stream());
  std::fill(counts_.begin(), counts_.end(), 0);
  for (std::int64_t round = 0; round < schedule_.rounds(); ++round) run_round(sampler, round);

  gather_scalars();
  const std::int64_t bad_leaf = agree(requests);
  if (before_update_) before_update_();
  update(bad_leaf);
  reduce_counts(sent_before, comm_before);
  if (metrics_.applied) {
    average_loss();
    const auto counts = std::span<const std::int64_t>(counts_);
    instance_->balance().update(instance_->world(), instance_->stream(),
                                counts.first(stats_.demand.size()),
                                counts.subspan(stats_.demand.size(), stats_.score_counts.size()));
  }
  ++counters_[kStepsDone];
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  metrics_.timing.step_ms = seconds.count() * 1e3;
  metrics_.timing.tokens_per_s = static_cast<double>(metrics_.tokens) / seconds.count();
  return metrics_;
}

}  // namespace arcus
