#pragma once

#include <optional>
#include <string>
#include <vector>

#include "src/model/attention_layer.hpp"
#include "src/model/moe_layer.hpp"
#include "src/model/norm.hpp"
#include "src/model/stream_gate.hpp"

namespace arcus {

/// One pre-norm layer: x + attention(norm(x)), then + feed-forward(norm(.)), dense or MoE. With a
/// decision layer only some tokens take the second half, T' of T.
class Block {
 public:
  Block(const ModelConfig& model, const RoutingConfig& routing, std::int64_t layer,
        ParamRegistry& registry);

  struct Saved {
    TensorView norm1, norm2;  ///< see Norm::allocate, of T and T' rows
    TensorView h1, h2;        ///< [T, H], [T', H] normed inputs of attention and feed-forward
    TensorView mid;           ///< [T, H] after attention
    TensorView ff_in;         ///< [T', H] those rows of it that go on
    TensorView experts_out;   ///< [T', H], with a decision layer
    StreamGate::Saved stream;
    AttentionLayer::Saved attention;
    DenseFfn::Saved dense;
    MoeLayer::Saved moe;
  };
  bool is_moe() const { return moe_.has_value(); }
  /// The part of `saved` that recomputation keeps, and the rest.
  void allocate_kept(Arena& arena, std::int64_t num_tokens, const TokenDispatcher& dispatcher,
                     Saved& saved) const;
  void allocate_rest(Arena& arena, std::int64_t num_tokens, DType compute, Saved& saved) const;
  /// Adds up what a round needs besides: rows of the MoE layer, scratch of the backward pass.
  void count_round(Arena& saved, Arena& scratch, Arena& row_memory, std::int64_t num_tokens,
                   std::int64_t rows, std::int64_t padded, DType compute, bool training) const;

  /// out [T, H] from x [T, H].
  void forward(PassContext& ctx, const ParamStore& params, TokenDispatcher& dispatcher,
               TensorView out, ConstTensorView x, Saved& saved, bool replay) const;
  /// dx [T, H] from dout [T, H], both with padding rows behind them.
  void backward(PassContext& ctx, const ParamStore& params, TokenDispatcher& dispatcher,
                TensorView dx, TensorView dout, ConstTensorView x, const Saved& saved) const;
  /// One new position per sequence.
  void decode(PassContext& ctx, const ParamStore& params, TokenDispatcher& dispatcher,
              TensorView out, ConstTensorView x, KvCache& cache) const;

  std::vector<GemmShape> gemm_shapes(std::int64_t max_tokens, std::int64_t max_segment_rows,
                                     DType compute, bool training) const;
  const AttentionLayer& attention() const { return attention_; }
  /// Experts that a token goes to; 0 for a dense layer.
  std::int64_t active_experts() const { return moe_ ? moe_->active_experts() : 0; }
  /// Share of the tokens that take the feed-forward part, where the configuration says it.
  double routed_share() const { return routed_share_; }

 private:
  void feed_forward(PassContext& ctx, const ParamStore& params, TokenDispatcher& dispatcher,
                    TensorView out, ConstTensorView x, Saved& saved, bool replay) const;
  /// The second half of a block with a decision layer, and its backward pass: dmid, and what comes
  /// back to x [T, H] beside attention.
  void two_level(PassContext& ctx, const ParamStore& params, TokenDispatcher& dispatcher,
                 TensorView out, ConstTensorView x, Saved& saved, bool replay) const;
  void two_level_backward(PassContext& ctx, const ParamStore& params, TokenDispatcher& dispatcher,
                          TensorView dmid, TensorView dwide, ConstTensorView dout,
                          const Saved& saved) const;
  void allocate_second_half(Arena& arena, std::int64_t num_tokens, DType compute,
                            Saved& saved) const;

  ModelConfig model_;
  Norm input_norm_;
  AttentionLayer attention_;
  Norm post_attention_norm_;
  std::optional<DenseFfn> dense_;
  std::optional<MoeLayer> moe_;
  std::optional<StreamGate> stream_;
  double routed_share_ = 1;
};

}  // namespace arcus
