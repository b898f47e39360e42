#pragma once

#include <optional>
#include <string>
#include <vector>

#include "comm/token_dispatcher.hpp"
#include "src/model/dense_ffn.hpp"
#include "src/model/gate.hpp"

namespace arcus {

/// A mixture-of-experts layer: the replicated gate routes, the plan is made once and used four
/// times, experts run where they live. T tokens, K choices, R rows received, Rp padded rows.
class MoeLayer {
 public:
  MoeLayer(const ModelConfig& model, const RoutingConfig& routing, const std::string& prefix,
           ParamRegistry& registry);

  struct Saved {
    Routing routing;
    DispatchPlan plan;
    TensorView x;        ///< [R, H] received rows, 32 more readable behind them
    TensorView gate_up;  ///< [Rp, U], see FfnShape
    TensorView act;      ///< [Rp, F]
    TensorView y;        ///< [R, H]
    FfnAdapters::Rows u;
    DenseFfn::Saved shared;
    TensorView shared_out;    ///< [T, H] before its gate; kept only with shared_expert_gate
    TensorView shared_logit;  ///< [T, 1] accumulate type
    TensorView shared_wide;   ///< [T, H] accumulate type, see GateLogits
  };
  /// What recomputation keeps: routing and plan.
  void allocate_routing(Arena& arena, std::int64_t num_tokens, const TokenDispatcher& dispatcher,
                        Saved& saved) const;
  /// What depends on tokens, then on rows received (known once the plan is made).
  void allocate_tokens(Arena& arena, std::int64_t num_tokens, DType compute, Saved& saved) const;
  void allocate_rows(Arena& arena, Arena& row_memory, std::int64_t rows, std::int64_t padded,
                     DType compute, Saved& saved) const;
  /// Only the first `num_tokens` tokens are there, in all that follows.
  void keep_tokens(std::int64_t num_tokens, Saved& saved) const {
    saved.routing = saved.routing.first_tokens(num_tokens);
  }
  /// Most scratch memory that forward, and backward, needs.
  void allocate_forward_scratch(Arena& arena, std::int64_t num_tokens, DType compute) const {
    gate_.allocate_scratch(arena, num_tokens, compute);
  }
  void allocate_backward_scratch(Arena& arena, Arena& row_memory, std::int64_t num_tokens,
                                 std::int64_t rows, std::int64_t padded, DType compute) const;

  /// out = sum_j w_j y_j + shared + residual (empty: without), h [T, H] the normed input with 32
  /// readable rows behind it. Allocates the rows part of `saved` from ctx.saved. `replay`: see
  /// Gate::forward; the plan is used again.
  void forward(PassContext& ctx, const ParamStore& params, TokenDispatcher& dispatcher,
               TensorView out, ConstTensorView h, ConstTensorView residual, Saved& saved,
               bool replay) const;
  /// dh [T, H] from dout [T, H]; adds the leaves.
  void backward(PassContext& ctx, const ParamStore& params, TokenDispatcher& dispatcher,
                TensorView dh, ConstTensorView dout, ConstTensorView h, const Saved& saved) const;
  /// For micro-batches of min_tokens to max_tokens tokens.
  std::vector<GemmShape> gemm_shapes(std::int64_t min_tokens, std::int64_t max_tokens,
                                     std::int64_t max_segment_rows, DType compute,
                                     bool training) const;
  std::int64_t active_experts() const { return gate_.active_experts(); }

 private:
  void add_experts(const std::string& prefix, ParamRegistry& registry);
  FfnWeights expert_weights(const ParamStore& params) const;
  void forward_shared(PassContext& ctx, const ParamStore& params, TensorView out, ConstTensorView h,
                      const Saved& saved) const;
  void backward_shared(PassContext& ctx, const ParamStore& params, TensorView dh,
                       ConstTensorView dout, ConstTensorView h, const Saved& saved) const;
  void add_expert_leaves(PassContext& ctx, const ParamStore& params, ConstTensorView dy,
                         ConstTensorView dgate_up, const FfnAdapters::Rows& v,
                         const Saved& saved) const;

  ModelConfig model_;
  FfnShape shape_;
  Gate gate_;
  /// The experts' parameters; with neither gate nor biases those are not there.
  ParamRef gate_proj_, up_proj_, down_proj_, gate_bias_, up_bias_, down_bias_;
  FfnAdapters adapters_;  ///< of every expert
  std::optional<DenseFfn> shared_;
  ParamRef shared_gate_;
};

}  // namespace arcus
