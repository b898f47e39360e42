#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "src/model/block.hpp"

namespace arcus {

/// Bytes a rank needs for one round, by arena.
struct RoundMemory {
  std::int64_t saved_bytes = 0;
  std::int64_t scratch_bytes = 0;
  std::int64_t row_bytes = 0;
};

/// The language model: embedding, blocks, final norm, head, loss. T tokens, H hidden, V vocabulary.
class Transformer {
 public:
  /// Declares all parameters, in Hugging Face's names and in the order of a forward pass.
  /// `micro_batch_tokens` = T of a full micro-batch (0 when not training).
  Transformer(const ModelConfig& model, const RoutingConfig& routing,
              const std::vector<RoutingOverride>& overrides, std::int64_t micro_batch_tokens,
              ParamRegistry& registry);

  const ModelConfig& model() const { return model_; }
  MicroBatchStats make_stats() const;
  /// What `train` keeps per layer between forward and backward; made once, used every round.
  struct Workspace {
    std::vector<TensorView> inputs;  ///< [L + 1] of [T, H]
    std::vector<Block::Saved> saved;
  };
  Workspace make_workspace() const;

  /// Forward and backward of this rank's micro-batch, in step with the other ranks of the EP group;
  /// adds all leaves to `params` and fills ctx.stats. `recompute`: keep layer inputs and routing
  /// only.
  void train(PassContext& ctx, const ParamStore& params, TokenDispatcher& dispatcher,
             Workspace& workspace, bool recompute) const;
  /// Loss of the micro-batch, in evaluation form; token_loss [1, T] accumulate type.
  void evaluate(PassContext& ctx, const ParamStore& params, TokenDispatcher& dispatcher,
                TensorView token_loss) const;
  /// The same for the logits themselves: `consume` sees those of rows first_row, first_row + 1, ...
  /// as [rows, V] (accumulate type), in ascending order.
  using LogitsConsumer = std::function<void(std::int64_t first_row, ConstTensorView logits)>;
  void evaluate_logits(PassContext& ctx, const ParamStore& params, TokenDispatcher& dispatcher,
                       const LogitsConsumer& consume) const;
  /// Logits [B, V] (accumulate type) of the next token after ids [1, B] at ctx.batch.position.
  void decode(PassContext& ctx, const ParamStore& params, TokenDispatcher& dispatcher,
              std::vector<KvCache>& caches, TensorView logits) const;
  std::vector<KvCache> make_caches(Arena& arena, std::int64_t num_seqs, std::int64_t max_len,
                                   DType compute) const;

  /// Dry pass: what a round with `rows` received rows a layer allocates.
  RoundMemory count_round(std::int64_t num_tokens, std::int64_t rows, std::int64_t padded,
                          const TokenDispatcher& dispatcher, DType compute, bool training,
                          bool recompute) const;
  std::vector<GemmShape> gemm_shapes(std::int64_t max_tokens, std::int64_t max_segment_rows,
                                     DType compute, bool training) const;
  PrimitiveReport build_primitives(Stream& stream, std::int64_t num_seqs, std::int64_t seq_len,
                                   std::int64_t max_segment_rows, DType compute,
                                   bool training) const;
  /// Floating-point operations of forward and backward per token (matrix products only, causal
  /// attention counted as half).
  double training_flops_per_token(std::int64_t seq_len) const;

 private:
  TensorView embed(PassContext& ctx, const ParamStore& params) const;
  /// What the head sees, [T, H], in evaluation form.
  TensorView hidden_states(PassContext& ctx, const ParamStore& params,
                           TokenDispatcher& dispatcher) const;
  TensorView final_norm(PassContext& ctx, const ParamStore& params, ConstTensorView x,
                        TensorView& stats) const;
  /// The leaves of the embedding and of learned positions, from the gradient of `embed`.
  void embedding_leaves(PassContext& ctx, const ParamStore& params, ConstTensorView dx) const;
  void head_loss(PassContext& ctx, const ParamStore& params, ConstTensorView h, TensorView dh,
                 TensorView token_loss) const;
  std::int64_t head_chunk_rows() const;
  ParamRef head_weight() const { return head_.valid() ? head_ : embedding_; }

  ModelConfig model_;
  ParamRef embedding_, positions_;
  std::vector<Block> blocks_;
  std::optional<Norm> final_norm_;  ///< always there, declared after the blocks
  ParamRef head_;
};

}  // namespace arcus
