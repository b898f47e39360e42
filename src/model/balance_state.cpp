#include "src/model/balance_state.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "kernels/balance.hpp"

namespace arcus {
namespace {

/// b -= mean(b), the mean in f64 in expert order.
void subtract_mean(std::span<float> bias) {
  double mean = 0;
  for (const float b : bias) mean += static_cast<double>(b);
  mean /= static_cast<double>(bias.size());
  for (float& b : bias) b = static_cast<float>(static_cast<double>(b) - mean);
}

/// b_i += rate sign(sum_n count_n - E count_i), then optionally b -= mean(b).
void apply_sign_rule(std::span<float> bias, std::span<const std::int64_t> count, double rate,
                     bool center) {
  const auto num_experts = static_cast<std::int64_t>(bias.size());
  const std::int64_t total = std::accumulate(count.begin(), count.end(), std::int64_t{0});
  for (std::size_t e = 0; e < bias.size(); ++e) {
    const std::int64_t lacking = total - num_experts * count[e];
    if (lacking != 0) bias[e] += static_cast<float>(lacking > 0 ? rate : -rate);
  }
  if (center) subtract_mean(bias);
}

}  // namespace

BalanceState::BalanceState(const ModelConfig& model, const RoutingConfig& routing,
                           const std::vector<RoutingOverride>& overrides, StepTokens step, int rank,
                           int num_ranks)
    : num_experts_(model.num_experts), step_(step), num_ranks_(num_ranks) {
  const auto experts = static_cast<std::size_t>(num_experts_);
  const std::int64_t elements = step.micro_batches * step.tokens * num_experts_;
  for (std::int64_t l = model.first_k_dense; l < model.num_layers; ++l) {
    const LayerRouting own = routing_of_layer(model, routing, overrides, l);
    const RoutingConfig& config = own.routing;
    Layer layer{.idx = l,
                .topk = own.topk,
                .bias_rate = config.expert_bias_rate,
                .center_bias = config.center_bias,
                .quantile_rate = config.quantile_rate};
    if (config.expert_bias_rate > 0 || config.quantile_rate > 0) layer.bias.resize(experts);
    if (aux_coefficient(config, AuxScope::global) > 0) layer.counts.resize(experts);
    if (config.quantile_rate > 0) layer.scores.resize(static_cast<std::size_t>(elements));
    if (!layer.bias.empty() || !layer.counts.empty()) layers_.push_back(std::move(layer));
  }
  quantiles_.resize(experts);
  for (int r = 0, first = 0; r < num_ranks; ++r) {
    const std::int64_t micro_batches =
        r < step.micro_batches ? (step.micro_batches - r + num_ranks - 1) / num_ranks : 0;
    rank_offsets_.push_back(first * step.tokens * num_experts_);
    rank_counts_.push_back(micro_batches * step.tokens * num_experts_);
    first += static_cast<int>(micro_batches);
  }
  first_element_ = rank_offsets_[static_cast<std::size_t>(rank)];
}

const BalanceState::Layer* BalanceState::find(std::int64_t layer) const {
  const auto found =
      std::find_if(layers_.begin(), layers_.end(), [&](const Layer& l) { return l.idx == layer; });
  return found == layers_.end() ? nullptr : &*found;
}

ConstTensorView BalanceState::expert_bias(std::int64_t layer) const {
  const Layer* found = find(layer);
  if (found == nullptr || found->bias.empty()) return {};
  return {found->bias.data(), DType::f32, 1, num_experts_};
}

std::span<const std::int64_t> BalanceState::counts(std::int64_t layer) const {
  const Layer* found = find(layer);
  return found == nullptr ? std::span<const std::int64_t>() : found->counts;
}

BalanceState::Layer* BalanceState::find(std::int64_t layer) {
  return const_cast<Layer*>(std::as_const(*this).find(layer));
}

TensorView BalanceState::quantile_scores(std::int64_t layer, std::int64_t micro_batch) {
  Layer* found = find(layer);
  if (found == nullptr || found->scores.empty() || micro_batch < 0) return {};
  const std::int64_t round = micro_batch / num_ranks_;
  return {found->scores.data() + first_element_ + round * step_.tokens * num_experts_, DType::f32,
          step_.tokens, num_experts_};
}

/// b_i += rate (-q_i - b_i), q_i the score that as many tokens exceed as an expert should get; then
/// b -= mean(b).
void BalanceState::follow_quantiles(Communicator& world, Stream& stream, Layer& layer) {
  const std::int64_t tokens = step_.micro_batches * step_.tokens;
  stream.wait(world.all_gather_v(
      stream, {.buffer = {layer.scores.data(), DType::f32, 1, tokens * num_experts_},
               .counts = rank_counts_,
               .offsets = rank_offsets_}));
  column_quantiles(stream, {.q = {quantiles_.data(), DType::f32, 1, num_experts_},
                            .u = {layer.scores.data(), DType::f32, tokens, num_experts_},
                            .rank = std::min(tokens, tokens * layer.topk / num_experts_ + 1)});
  const auto rate = static_cast<float>(layer.quantile_rate);
  for (std::size_t e = 0; e < layer.bias.size(); ++e) {
    layer.bias[e] += rate * (-quantiles_[e] - layer.bias[e]);
  }
  subtract_mean(layer.bias);
}

void BalanceState::update(Communicator& world, Stream& stream, std::span<const std::int64_t> demand,
                          std::span<const std::int64_t> score_counts) {
  const auto experts = static_cast<std::size_t>(num_experts_);
  for (Layer& layer : layers_) {
    const std::size_t first = static_cast<std::size_t>(layer.idx) * experts;
    if (layer.bias_rate > 0) {
      apply_sign_rule(layer.bias, demand.subspan(first, experts), layer.bias_rate,
                      layer.center_bias);
    }
    if (!layer.counts.empty()) {
      std::ranges::copy(score_counts.subspan(first, experts), layer.counts.begin());
    }
    if (layer.quantile_rate > 0) follow_quantiles(world, stream, layer);
  }
}

std::int64_t BalanceState::bytes() const {
  std::size_t bytes = 0;
  for (const Layer& layer : layers_) {
    bytes += layer.bias.size() * 4 + layer.counts.size() * 8 + layer.scores.size() * 4;
  }
  return static_cast<std::int64_t>(bytes);
}

std::vector<StateView> BalanceState::state() {
  std::vector<StateView> views;
  const auto add = [&](const std::string& name, DType dtype, void* data) {
    StateView& view = views.emplace_back();
    view.spec.name = name;
    view.spec.dtype = dtype;
    view.spec.shape = {num_experts_};
    view.replicated = true;
    view.slices.push_back({{0, num_experts_}, data});
  };
  for (Layer& layer : layers_) {
    if (!layer.bias.empty()) {
      add(fmt::format("model.layers.{}.mlp.gate.e_score_correction_bias", layer.idx), DType::f32,
          layer.bias.data());
    }
    if (!layer.counts.empty()) {
      add(fmt::format("balance/layers.{}.counts", layer.idx), DType::i64, layer.counts.data());
    }
  }
  return views;
}

}  // namespace arcus
