#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "src/base/state.hpp"
#include "src/base/tensor.hpp"
#include "src/model/config.hpp"

namespace arcus {

/// What balancing rules remember from step to step, per MoE layer: the selection bias b, and the
/// counts of the step before for the global aux loss. The same on every rank, since it follows from
/// sums over the world. Changed once per applied step, never by evaluation.
class BalanceState {
 public:
  BalanceState(const ModelConfig& model, const RoutingConfig& routing,
               const std::vector<RoutingOverride>& overrides);

  /// b [1, E] f32; empty where the layer has none.
  ConstTensorView expert_bias(std::int64_t layer) const;
  /// Counts [E] of the K largest unbiased scores in the last applied step, all 0 before the first;
  /// empty where the layer does not keep them.
  std::span<const std::int64_t> counts(std::int64_t layer) const;

  /// One applied step. demand: tokens per expert before drops; score_counts: those of the K largest
  /// unbiased scores; both [L * E], over the world.
  void update(std::span<const std::int64_t> demand, std::span<const std::int64_t> score_counts);

  /// Everything there is, for checkpoints.
  std::vector<StateView> state();

 private:
  struct Layer {
    std::int64_t idx = 0;
    double bias_rate = 0;
    bool center_bias = false;
    std::vector<float> bias;
    std::vector<std::int64_t> counts;
  };
  const Layer* find(std::int64_t layer) const;
  std::int64_t num_experts_;
  std::vector<Layer> layers_;  ///< those that keep something
};

}  // namespace arcus
