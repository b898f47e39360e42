#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "comm/communicator.hpp"
#include "src/base/state.hpp"
#include "src/base/tensor.hpp"
#include "src/model/config.hpp"

namespace arcus {

/// The tokens of a step as balancing rules see them: `micro_batches` of `tokens` each, dealt out to
/// the ranks in turn.
struct StepTokens {
  std::int64_t micro_batches = 0;  ///< 0: nothing is trained
  std::int64_t tokens = 0;
};

/// What balancing rules remember from step to step, per MoE layer: the selection bias b, and the
/// counts of the step before for the global aux loss. The same on every rank, since it follows from
/// what the whole world saw. Changed once per applied step, never by evaluation.
class BalanceState {
 public:
  BalanceState(const ModelConfig& model, const RoutingConfig& routing,
               const std::vector<RoutingOverride>& overrides, StepTokens step, int rank,
               int num_ranks);

  /// b [1, E] f32; empty where the layer has none.
  ConstTensorView expert_bias(std::int64_t layer) const;
  /// Counts [E] of the K largest unbiased scores in the last applied step, all 0 before the first;
  /// empty where the layer does not keep them.
  std::span<const std::int64_t> counts(std::int64_t layer) const;
  /// Where this rank leaves the quantile scores [T, E] f32 of one of its micro-batches.
  TensorView quantile_scores(std::int64_t layer, std::int64_t micro_batch);

  /// One applied step. demand: tokens per expert before drops; score_counts: those of the K largest
  /// unbiased scores; both [L * E], over the world. Collective where a layer uses quantiles.
  void update(Communicator& world, Stream& stream, std::span<const std::int64_t> demand,
              std::span<const std::int64_t> score_counts);

  /// Everything there is, for checkpoints.
  std::vector<StateView> state();
  /// Bytes of a rank.
  std::int64_t bytes() const;

 private:
  struct Layer {
    std::int64_t idx = 0;
    std::int64_t topk = 0;
    double bias_rate = 0;
    bool center_bias = false;
    double quantile_rate = 0;
    std::vector<float> bias;
    std::vector<std::int64_t> counts;
    std::vector<float> scores;  ///< [tokens of the step, E], rank by rank
  };
  const Layer* find(std::int64_t layer) const;
  Layer* find(std::int64_t layer);
  void follow_quantiles(Communicator& world, Stream& stream, Layer& layer);

  std::int64_t num_experts_;
  StepTokens step_;
  int num_ranks_;
  std::vector<std::int64_t> rank_counts_, rank_offsets_;  ///< elements of `scores`
  std::int64_t first_element_ = 0;                        ///< of this rank
  std::vector<float> quantiles_;                          ///< [E]
  std::vector<Layer> layers_;                             ///< those that keep something
};

}  // namespace arcus
