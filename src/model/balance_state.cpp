#include "src/model/balance_state.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

namespace arcus {
namespace {

/// b_i += rate sign(sum_n count_n - E count_i), then optionally b -= mean(b), the mean in f64.
void apply_sign_rule(std::span<float> bias, std::span<const std::int64_t> count, double rate,
                     bool center) {
  const auto num_experts = static_cast<std::int64_t>(bias.size());
  const std::int64_t total = std::accumulate(count.begin(), count.end(), std::int64_t{0});
  for (std::size_t e = 0; e < bias.size(); ++e) {
    const std::int64_t lacking = total - num_experts * count[e];
    if (lacking != 0) bias[e] += static_cast<float>(lacking > 0 ? rate : -rate);
  }
  if (!center) return;
  double mean = 0;
  for (const float b : bias) mean += static_cast<double>(b);
  mean /= static_cast<double>(num_experts);
  for (float& b : bias) b = static_cast<float>(static_cast<double>(b) - mean);
}

}  // namespace

BalanceState::BalanceState(const ModelConfig& model, const RoutingConfig& routing,
                           const std::vector<RoutingOverride>& overrides)
    : num_experts_(model.num_experts) {
  const auto experts = static_cast<std::size_t>(num_experts_);
  for (std::int64_t l = model.first_k_dense; l < model.num_layers; ++l) {
    const RoutingConfig config = routing_of_layer(model, routing, overrides, l).routing;
    Layer layer{.idx = l, .bias_rate = config.expert_bias_rate, .center_bias = config.center_bias};
    if (config.expert_bias_rate > 0) layer.bias.resize(experts);
    if (aux_coefficient(config, AuxScope::global) > 0) layer.counts.resize(experts);
    if (!layer.bias.empty() || !layer.counts.empty()) layers_.push_back(std::move(layer));
  }
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

void BalanceState::update(std::span<const std::int64_t> demand,
                          std::span<const std::int64_t> score_counts) {
  const auto experts = static_cast<std::size_t>(num_experts_);
  for (Layer& layer : layers_) {
    const std::size_t first = static_cast<std::size_t>(layer.idx) * experts;
    if (!layer.bias.empty()) {
      apply_sign_rule(layer.bias, demand.subspan(first, experts), layer.bias_rate,
                      layer.center_bias);
    }
    if (!layer.counts.empty()) {
      std::ranges::copy(score_counts.subspan(first, experts), layer.counts.begin());
    }
  }
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
