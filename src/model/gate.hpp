#pragma once

#include <optional>
#include <string>

#include "kernels/gate_input.hpp"
#include "src/model/predictor.hpp"
#include "src/model/routing.hpp"

namespace arcus {

/// The replicated gate of one MoE layer: logits, scores, selection, capacity, combine weights.
class Gate {
 public:
  Gate(const ModelConfig& model, const RoutingConfig& routing, const std::string& prefix,
       ParamRegistry& registry);

  /// Memory of a micro-batch of `num_tokens` tokens.
  Routing allocate(Arena& arena, std::int64_t num_tokens, DType compute) const;
  /// Routes x [T, H]. With `replay`, selection and drops are taken from `routing` as they stand
  /// (recomputation) and nothing is reported.
  void forward(PassContext& ctx, const ParamStore& params, ConstTensorView x, Routing& routing,
               bool replay) const;
  /// dx [T, H] (accumulate type) from dweight [T, S]; adds the leaves of the gate's parameters.
  void backward(PassContext& ctx, const ParamStore& params, TensorView dx, ConstTensorView dweight,
                ConstTensorView x, const Routing& routing) const;
  /// Allocates as much as either pass does at most.
  void allocate_scratch(Arena& arena, std::int64_t num_tokens, DType compute) const;
  /// Products for build_primitives.
  std::vector<GemmShape> gemm_shapes(std::int64_t min_tokens, std::int64_t max_tokens,
                                     DType compute, bool training) const;
  /// Rows that every expert gets of a micro-batch whatever was kept; 0 = those that were kept.
  std::int64_t rows_per_expert(const PassContext& ctx, const Routing& routing) const {
    return ctx.training && routing_.pad_to_capacity ? routing.capacity : 0;
  }
  /// Experts that a token goes to, on average where their number varies.
  std::int64_t active_experts() const {
    return find_select(routing_.select).all_experts ? model_.num_experts : model_.topk;
  }
  /// Slots per token.
  std::int64_t num_slots() const { return arcus::num_slots(model_, routing_); }

 private:
  bool keeps_wide(DType compute) const;
  /// What logits are made of: x, or what jitter or the cosine made of it.
  ConstTensorView input_of(ConstTensorView x, const Routing& routing) const;
  /// These see the real tokens alone.
  void logits(PassContext& ctx, const ParamStore& params, ConstTensorView x,
              Routing& routing) const;
  void select_and_drop(PassContext& ctx, Routing& routing) const;
  void report(PassContext& ctx, Routing& routing) const;
  void logits_backward(PassContext& ctx, const ParamStore& params, TensorView dx, TensorView dz,
                       ConstTensorView x, const Routing& routing) const;
  /// Fills dnoise, and adds the load loss to dz.
  void noise_backward(PassContext& ctx, TensorView dnoise, TensorView dz,
                      const Routing& routing) const;

  ModelConfig model_;
  RoutingConfig routing_;
  ParamRef weight_, bias_, temperature_, noise_weight_;
  std::optional<Predictor> predictor_;
};

}  // namespace arcus
