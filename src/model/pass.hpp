#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "kernels/arena.hpp"
#include "kernels/gemm.hpp"
#include "kernels/stream.hpp"

namespace arcus {

/// The unit of everything that could depend on how tokens are spread over ranks: a fixed number of
/// sequences, numbered over the whole step. An idle rank has one with number -1 and no tokens.
struct MicroBatch {
  std::int64_t number = -1;
  std::int64_t num_seqs = 0;
  std::int64_t seq_len = 0;
  std::int64_t num_padding_tokens = 0;  ///< at the end of the last sequence (evaluation only)
  std::int64_t first_token = 0;         ///< global index of token 0 in the step
  std::span<const std::int64_t> sequence_offsets;  ///< [num_seqs + 1] real tokens before each
  /// [num_seqs] shares of the sequences in losses; empty: those of their real tokens.
  std::span<const double> sequence_weights;
  ConstTensorView ids;  ///< [1, T] i32
  /// [1, T] i32 places in the micro-batch of which these are some tokens; empty: all of them.
  ConstTensorView token_idx;
  ConstTensorView targets;    ///< [1, T] i32, -1 = none
  ConstTensorView position;   ///< [1, T] i32, inside the sequence
  ConstTensorView first_key;  ///< [1, T] i32, first position that may be attended to
  double loss_scale = 0;      ///< 1 / target tokens of the whole step
  double weight = 0;          ///< T_m / sum T, for auxiliary losses

  std::int64_t num_tokens() const { return num_seqs * seq_len; }
  /// Tokens that are text: padding is not routed and in no mean.
  std::int64_t num_real_tokens() const { return num_tokens() - num_padding_tokens; }
};

/// What a micro-batch reports; all vectors are sized by the transformer, dense layers stay 0.
struct MicroBatchStats {
  double token_loss_sum = 0;  ///< over targets, f64 in token order
  /// [L], parts of the loss (coefficients and weight included): all balancing losses but z.
  std::vector<double> aux_loss;
  std::vector<double> z_loss;          ///< [L], likewise
  std::vector<double> entropy_sum;     ///< [L], sum over tokens that the gate saw
  std::vector<double> predictor_loss;  ///< [L], weighted by the micro-batch; no part of the loss
  std::vector<double> stream_gate;     ///< [L], mean of g, weighted by the micro-batch
  std::vector<std::int64_t> routed;    ///< [L], tokens that the gate saw
  std::vector<std::int64_t> demand;    ///< [L * E], tokens per expert before drops
  std::vector<std::int64_t> score_counts;  ///< [L * E], tokens whose K largest s hold the expert
  std::vector<std::int64_t> dropped;       ///< [L], assignments
  std::vector<std::int64_t> recv_rows;     ///< [L], rows this rank's experts processed
};

/// What routing one micro-batch left behind. T tokens, E experts, K choices; A = accumulate type.
struct Routing {
  TensorView x_wide;             ///< [T, H] A: the gate's input where it is not x itself
  TensorView z, s;               ///< [T, E] A: logits, scores
  TensorView lse;                ///< [T, 1] A
  TensorView topk_idx;           ///< [T, K] i32
  TensorView expert_of_slot;     ///< [T, K] i32, -1 = dropped
  TensorView weight;             ///< [T, K] A
  TensorView fraction;           ///< [1, E] A: f of the aux loss over the micro-batch
  TensorView fraction_sequence;  ///< [sequences, E] A: f over each sequence
  TensorView fraction_global;    ///< [1, E] A: f of the step before
  TensorView dimportance;        ///< [1, E] f64: d CV2 / d importance
  TensorView dload;              ///< [1, E] f64: d CV2 / d load
  TensorView noise_logits;       ///< [T, E] A: n, with noise
  TensorView z_clean;            ///< [T, E] A: z without noise, for the load loss
  TensorView inv_norm;           ///< [T, 1] A: 1 / |x|, cosine
  TensorView cosine;             ///< [T, E] A
  TensorView w_hat;              ///< [E, H] A: W_i / |W_i|, cosine
  TensorView w_inv_norm;         ///< [E, 1] A
  TensorView predictor;          ///< [T, E] A: logits of who will be chosen
  TensorView stream_gate;        ///< [T of the whole micro-batch, 1] A: g, with a stream row
  std::int64_t capacity = 0;     ///< 0 = dropless

  /// The first `tokens` rows of everything that has a row a token, rows behind them cleared where
  /// weight gradients read them.
  Routing first_tokens(std::int64_t tokens) const;
};

/// Sees the routing of every MoE layer as it is made (routing traces).
using RoutingObserver =
    std::function<void(std::int64_t layer, const MicroBatch& batch, const Routing& routing)>;

class BalanceState;

/// What a pass through the layers carries along.
struct PassContext {
  Stream& stream;
  Arena& saved;    ///< lives until the round's backward pass has used it
  Arena& scratch;  ///< lives inside one layer call
  Arena& rows;     ///< the dispatcher's row memory, used like `saved`
  const MicroBatch& batch;
  MicroBatchStats& stats;
  bool training = true;
  bool decoding = false;            ///< one position of each sequence: products of few rows
  std::uint64_t seed = 0;           ///< of noise
  BalanceState* balance = nullptr;  ///< null: no layer keeps any
  std::int64_t step = 0;
  std::int64_t layer = 0;
  const RoutingObserver* observer = nullptr;
  /// Called where the pass may block on other ranks (watchdog).
  const std::function<void(std::int64_t layer, const char* what)>* heartbeat = nullptr;

  /// The same for another micro-batch.
  PassContext with(const MicroBatch& other) const {
    return {stream,   saved, scratch, rows, other, stats,    training,
            decoding, seed,  balance, step, layer, observer, heartbeat};
  }
  void beat(const char* what) const {
    if (heartbeat != nullptr && *heartbeat) (*heartbeat)(layer, what);
  }
};

/// Where the memory that outlives a layer call stands.
class RoundScope {
 public:
  explicit RoundScope(PassContext& ctx) : saved_(ctx.saved), rows_(ctx.rows) {}

 private:
  ArenaScope saved_, rows_;
};

/// [rows, cols] with zeroed rows behind it up to a multiple of 32, plus `extra_rows`: what a weight
/// gradient needs of its operands.
TensorView allocate_padded(Arena& arena, DType dtype, std::int64_t rows, std::int64_t cols,
                           std::int64_t extra_rows = 0);

}  // namespace arcus
