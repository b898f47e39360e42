#pragma once

#include <optional>
#include <string>
#include <vector>

#include "src/model/predictor.hpp"
#include "src/model/routing.hpp"

namespace arcus {

/// The decision layer of two-level routing: which tokens of a block go through its experts (stream
/// 2); the others pass on as they are (stream 1). ROUTING.md, "Stream". T tokens of the
/// micro-batch, T' of stream 2, H hidden, A the accumulate type.
class StreamGate {
 public:
  /// For a routing whose stream row decides. `prefix` = "model.layers.N.".
  StreamGate(const ModelConfig& model, const RoutingConfig& routing, const std::string& prefix,
             ParamRegistry& registry);

  struct Saved {
    // Kept by recomputation.
    TensorView chosen;                         ///< [T, 1] i32: 0 = stream 2, -1 = stream 1
    TensorView index;                          ///< [1, T'] i32: the tokens of stream 2, ascending
    TensorView ids;                            ///< [1, T'] i32: their token ids
    std::span<std::int64_t> sequence_offsets;  ///< tokens of stream 2 before each sequence
    std::span<double> sequence_weights;        ///< shares of the sequences, all tokens counted
    // Computed again.
    TensorView wide;       ///< [T, 2H] A: the stream before and after attention
    TensorView d, g;       ///< [T, 1] A: logits and gate values
    TensorView predictor;  ///< [T, 1] A: logits of who will be chosen
  };
  void allocate_kept(Arena& arena, std::int64_t num_tokens, Saved& saved) const;
  void allocate_rest(Arena& arena, std::int64_t num_tokens, DType compute, Saved& saved) const;
  /// Most scratch memory that either pass needs, the caller's `dwide` included.
  void allocate_scratch(Arena& arena, std::int64_t num_tokens, DType compute) const;

  /// Decides from `before` and `after` attention, both [T, H]; with `replay` the decision of
  /// `saved` stands.
  void forward(PassContext& ctx, const ParamStore& params, ConstTensorView before,
               ConstTensorView after, Saved& saved, bool replay) const;
  /// The T' tokens as a micro-batch of their own. Views lie in `saved`.
  MicroBatch second_level(const MicroBatch& batch, const Saved& saved) const;
  /// out = after + g experts_out on stream 2, after elsewhere; reports losses and shares.
  void merge(PassContext& ctx, TensorView out, ConstTensorView after, ConstTensorView experts_out,
             const Saved& saved) const;
  /// dexperts_out [T', H] and dwide [T, 2H] (A) from dout [T, H]; adds the leaves.
  void backward(PassContext& ctx, const ParamStore& params, TensorView dexperts_out,
                TensorView dwide, ConstTensorView dout, ConstTensorView experts_out,
                const Saved& saved) const;
  /// out_t = rows_i where t is token i of stream 2, else 0, plus the addends; in A, rounded once.
  void scatter(PassContext& ctx, TensorView out, ConstTensorView rows, ConstTensorView weight,
               ConstTensorView addend1, ConstTensorView addend2, const Saved& saved) const;
  std::vector<GemmShape> gemm_shapes(std::int64_t max_tokens, DType compute, bool training) const;

 private:
  void choose(PassContext& ctx, Saved& saved) const;
  double share_off_target(const Saved& saved) const;
  /// Without coefficient and weight.
  double target_loss(PassContext& ctx, const Saved& saved, double mean_gate) const;
  void report(PassContext& ctx, const Saved& saved) const;

  std::int64_t hidden_size_;
  RoutingConfig routing_;
  const StreamRow* row_;
  ParamRef weight_, bias_;
  std::optional<Predictor> predictor_;
};

}  // namespace arcus
