#include "src/model/transformer.hpp"

#include <algorithm>
#include <cmath>

#include "kernels/elementwise.hpp"
#include "kernels/embedding.hpp"
#include "kernels/loss.hpp"

namespace arcus {
namespace {

/// Rows of logits held at once: a function of the vocabulary alone, since each chunk is a leaf of
/// the head's weight. Multiples of 256 rows, about 2^22 logits.
std::int64_t chunk_rows_for(std::int64_t vocab_size) {
  return std::max<std::int64_t>(256, (std::int64_t{1} << 22) / vocab_size / 256 * 256);
}

}  // namespace

Transformer::Transformer(const ModelConfig& model, const RoutingConfig& routing,
                         const std::vector<RoutingOverride>& overrides,
                         std::int64_t micro_batch_tokens, ParamRegistry& registry)
    : model_(model) {
  // The head adds a leaf per chunk.
  const std::int64_t chunk = chunk_rows_for(model.vocab_size);
  const std::int64_t chunks = std::max<std::int64_t>(1, (micro_batch_tokens + chunk - 1) / chunk);
  embedding_ = registry.add({.name = "model.embed_tokens.weight",
                             .shape = {model.vocab_size, model.hidden_size},
                             .leaves_per_micro_batch = model.tie_embeddings ? chunks + 1 : 1});
  if (model.position == "learned") {
    positions_ = registry.add({.name = "model.embed_positions.weight",
                               .shape = {model.max_positions, model.hidden_size}});
  }
  blocks_.reserve(static_cast<std::size_t>(model.num_layers));
  for (std::int64_t layer = 0; layer < model.num_layers; ++layer) {
    const LayerRouting own = routing_of_layer(model, routing, overrides, layer);
    ModelConfig layer_model = model;
    layer_model.topk = own.topk;
    blocks_.emplace_back(layer_model, own.routing, layer, registry);
  }
  final_norm_.emplace(model, "model.norm", registry);
  if (!model.tie_embeddings) {
    head_ = registry.add({.name = "lm_head.weight",
                          .shape = {model.vocab_size, model.hidden_size},
                          .leaves_per_micro_batch = chunks,
                          .whole_leaves = true});
  }
  require_adapters(registry);
}

MicroBatchStats Transformer::make_stats() const {
  const auto layers = static_cast<std::size_t>(model_.num_layers);
  MicroBatchStats stats;
  stats.aux_loss.resize(layers);
  stats.z_loss.resize(layers);
  stats.entropy_sum.resize(layers);
  stats.predictor_loss.resize(layers);
  stats.stream_gate.resize(layers);
  stats.routed.resize(layers);
  stats.demand.resize(layers * static_cast<std::size_t>(model_.num_experts));
  stats.score_counts.resize(stats.demand.size());
  stats.dropped.resize(layers);
  stats.recv_rows.resize(layers);
  return stats;
}

Transformer::Workspace Transformer::make_workspace() const {
  return {std::vector<TensorView>(blocks_.size() + 1), std::vector<Block::Saved>(blocks_.size())};
}

std::int64_t Transformer::head_chunk_rows() const { return chunk_rows_for(model_.vocab_size); }

TensorView Transformer::embed(PassContext& ctx, const ParamStore& params) const {
  const TensorView x = allocate_padded(ctx.saved, params.compute_dtype(), ctx.batch.num_tokens(),
                                       model_.hidden_size);
  embedding_forward(ctx.stream, {.out = x,
                                 .table = params.values(embedding_),
                                 .ids = ctx.batch.ids,
                                 .position_table = params.values(positions_),
                                 .position = ctx.batch.position});
  return x;
}

TensorView Transformer::final_norm(PassContext& ctx, const ParamStore& params, ConstTensorView x,
                                   TensorView& stats) const {
  const TensorView h = allocate_padded(ctx.saved, x.dtype, x.rows, x.cols);
  stats = final_norm_->allocate(ctx.saved, x.rows, x.dtype);
  final_norm_->forward(ctx, params, h, stats, x);
  return h;
}

void Transformer::embedding_leaves(PassContext& ctx, const ParamStore& params,
                                   ConstTensorView dx) const {
  const auto add = [&](ParamRef table, ConstTensorView ids) {
    const GradientSum sum = params.sums(table);
    if (sum.sum == nullptr) return;
    const ArenaScope scope(ctx.scratch);
    const std::int64_t rows = params.registry().row(table).shape[0];
    embedding_backward(ctx.stream,
                       {.dtable = sum,
                        .dout = dx,
                        .ids = ids,
                        .vocab_size = rows,
                        .scratch = ctx.scratch.allocate(DType::i32, 1, rows + 1 + dx.rows),
                        .micro_batch = ctx.batch.number});
  };
  add(embedding_, ctx.batch.ids);
  add(positions_, ctx.batch.position);
}

/// Token losses of h [T, H] in chunks of rows; with dh (not empty) also its gradient and the head's
/// leaves, one per chunk.
void Transformer::head_loss(PassContext& ctx, const ParamStore& params, ConstTensorView h,
                            TensorView dh, TensorView token_loss) const {
  const bool backward = dh.data != nullptr;
  const TensorView weight = params.values(head_weight());
  const GradientSum sum = backward ? params.sums(head_weight()) : GradientSum();
  for (std::int64_t begin = 0; begin < h.rows; begin += head_chunk_rows()) {
    const ArenaScope scope(ctx.scratch);
    const std::int64_t rows = std::min(head_chunk_rows(), h.rows - begin);
    const TensorView logits =
        ctx.scratch.allocate(accumulate_dtype(h.dtype), rows, model_.vocab_size);
    linear_forward(ctx.stream, {.y = logits, .x = h.row_range(begin, rows), .weight = weight});
    TensorView dlogits;
    if (backward) dlogits = allocate_padded(ctx.scratch, h.dtype, rows, model_.vocab_size);
    cross_entropy(ctx.stream, {.token_loss = token_loss.col_range(begin, rows),
                               .dlogits = dlogits,
                               .logits = logits,
                               .targets = ctx.batch.targets.col_range(begin, rows),
                               .scale = ctx.batch.loss_scale});
    if (!backward) continue;
    linear_dgrad(ctx.stream, {.dx = dh.row_range(begin, rows), .dy = dlogits, .weight = weight});
    if (sum.sum == nullptr) continue;
    linear_wgrad(ctx.stream, {.dweight = sum,
                              .dy = dlogits,
                              .x = h.row_range(begin, rows),
                              .micro_batch = ctx.batch.number});
  }
  double total = 0;
  dispatch_accumulate(token_loss.dtype, [&]<class T>() {
    for (const T loss : token_loss.span<T>()) total += static_cast<double>(loss);
  });
  ctx.stats.token_loss_sum = total;
  if (!std::isfinite(total)) {
    raise_bad_leaf(params.bad_leaf(),
                   bad_leaf_key(params.registry().row(head_weight()).first_unit_idx,
                                std::max<std::int64_t>(0, ctx.batch.number)));
  }
}

void Transformer::train(PassContext& ctx, const ParamStore& params, TokenDispatcher& dispatcher,
                        Workspace& workspace, bool recompute) const {
  const std::int64_t tokens = ctx.batch.num_tokens();
  const DType compute = params.compute_dtype();
  const RoundScope round(ctx);
  auto& [inputs, saved] = workspace;
  inputs[0] = embed(ctx, params);
  for (std::size_t l = 0; l < blocks_.size(); ++l) {
    ctx.layer = static_cast<std::int64_t>(l);
    inputs[l + 1] = allocate_padded(ctx.saved, compute, tokens, model_.hidden_size);
    blocks_[l].allocate_kept(ctx.saved, tokens, dispatcher, saved[l]);
    const Arena::Mark kept = ctx.saved.mark();
    const Arena::Mark rows = ctx.rows.mark();
    blocks_[l].allocate_rest(ctx.saved, tokens, compute, saved[l]);
    blocks_[l].forward(ctx, params, dispatcher, inputs[l + 1], inputs[l], saved[l], false);
    if (!recompute) continue;
    ctx.saved.release(kept);
    ctx.rows.release(rows);
  }
  TensorView stats;
  const ConstTensorView x = inputs.back();
  const TensorView h = final_norm(ctx, params, x, stats);
  TensorView dx = allocate_padded(ctx.saved, compute, tokens, model_.hidden_size);
  TensorView dnext = allocate_padded(ctx.saved, compute, tokens, model_.hidden_size);
  head_loss(ctx, params, h, dnext, ctx.saved.allocate(accumulate_dtype(compute), 1, tokens));
  final_norm_->backward(ctx, params, dx, dnext, {}, x, stats);
  for (std::size_t l = blocks_.size(); l-- > 0;) {
    ctx.layer = static_cast<std::int64_t>(l);
    const RoundScope again(ctx);
    if (recompute) {
      blocks_[l].allocate_rest(ctx.saved, tokens, compute, saved[l]);
      const TensorView out = ctx.saved.allocate(compute, tokens, model_.hidden_size);
      blocks_[l].forward(ctx, params, dispatcher, out, inputs[l], saved[l], true);
    }
    blocks_[l].backward(ctx, params, dispatcher, dnext, dx, inputs[l], saved[l]);
    std::swap(dx, dnext);
  }
  embedding_leaves(ctx, params, dx);
}

TensorView Transformer::hidden_states(PassContext& ctx, const ParamStore& params,
                                      TokenDispatcher& dispatcher) const {
  const std::int64_t tokens = ctx.batch.num_tokens();
  TensorView x = embed(ctx, params);
  TensorView next = allocate_padded(ctx.saved, params.compute_dtype(), tokens, model_.hidden_size);
  for (std::size_t l = 0; l < blocks_.size(); ++l) {
    ctx.layer = static_cast<std::int64_t>(l);
    const RoundScope layer(ctx);
    Block::Saved saved;
    blocks_[l].allocate_kept(ctx.saved, tokens, dispatcher, saved);
    blocks_[l].allocate_rest(ctx.saved, tokens, params.compute_dtype(), saved);
    blocks_[l].forward(ctx, params, dispatcher, next, x, saved, false);
    std::swap(x, next);
  }
  TensorView stats;
  return final_norm(ctx, params, x, stats);
}

void Transformer::evaluate(PassContext& ctx, const ParamStore& params, TokenDispatcher& dispatcher,
                           TensorView token_loss) const {
  const RoundScope scope(ctx);
  head_loss(ctx, params, hidden_states(ctx, params, dispatcher), TensorView(), token_loss);
}

void Transformer::evaluate_logits(PassContext& ctx, const ParamStore& params,
                                  TokenDispatcher& dispatcher,
                                  const LogitsConsumer& consume) const {
  const RoundScope scope(ctx);
  const TensorView h = hidden_states(ctx, params, dispatcher);
  for (std::int64_t begin = 0; begin < h.rows; begin += head_chunk_rows()) {
    const ArenaScope chunk(ctx.scratch);
    const std::int64_t rows = std::min(head_chunk_rows(), h.rows - begin);
    const TensorView logits =
        ctx.scratch.allocate(accumulate_dtype(h.dtype), rows, model_.vocab_size);
    linear_forward(
        ctx.stream,
        {.y = logits, .x = h.row_range(begin, rows), .weight = params.values(head_weight())});
    consume(begin, logits);
  }
}

void Transformer::decode(PassContext& ctx, const ParamStore& params, TokenDispatcher& dispatcher,
                         std::vector<KvCache>& caches, TensorView logits) const {
  const RoundScope scope(ctx);
  ctx.decoding = true;
  TensorView x = embed(ctx, params);
  TensorView next = allocate_padded(ctx.saved, x.dtype, x.rows, x.cols);
  for (std::size_t l = 0; l < blocks_.size(); ++l) {
    ctx.layer = static_cast<std::int64_t>(l);
    const RoundScope layer(ctx);
    blocks_[l].decode(ctx, params, dispatcher, next, x, caches[l]);
    std::swap(x, next);
  }
  TensorView stats;
  const TensorView h = final_norm(ctx, params, x, stats);
  linear_forward(ctx.stream,
                 {.y = logits, .x = h, .weight = params.values(head_weight()), .few_rows = true});
}

std::vector<KvCache> Transformer::make_caches(Arena& arena, std::int64_t num_seqs,
                                              std::int64_t max_len, DType compute) const {
  std::vector<KvCache> caches;
  const TensorView length = arena.allocate(DType::i32, 1, num_seqs);
  for (const Block& block : blocks_) {
    const std::int64_t size = block.attention().kv_size();
    caches.push_back({arena.allocate(compute, num_seqs * max_len, size),
                      arena.allocate(compute, num_seqs * max_len, size), length, max_len});
  }
  return caches;
}

RoundMemory Transformer::count_round(std::int64_t num_tokens, std::int64_t rows,
                                     std::int64_t padded, const TokenDispatcher& dispatcher,
                                     DType compute, bool training, bool recompute) const {
  Arena saved = Arena::counting("saved activations");
  Arena scratch = Arena::counting("scratch");
  Arena row_memory = Arena::counting("received rows");
  const std::int64_t h = model_.hidden_size;
  const DType acc = accumulate_dtype(compute);
  if (!training) saved.allocate(acc, 1, num_tokens);  // the caller's token losses
  allocate_padded(saved, compute, num_tokens, h);
  allocate_padded(saved, compute, num_tokens, h);
  std::int64_t transient = 0;  // the largest layer's part that recomputation gives back
  for (const Block& block : blocks_) {
    Block::Saved dummy;
    if (training) allocate_padded(saved, compute, num_tokens, h);
    const Arena::Mark before = saved.mark();
    block.allocate_kept(saved, num_tokens, dispatcher, dummy);
    const Arena::Mark kept = saved.mark();
    const Arena::Mark kept_rows = row_memory.mark();
    block.allocate_rest(saved, num_tokens, compute, dummy);
    block.count_round(saved, scratch, row_memory, num_tokens, rows, padded, compute, training);
    transient = std::max(transient, saved.used() - (training ? kept : before).used);
    if (!training) saved.release(before);
    if (training && recompute) saved.release(kept);
    if (!training || recompute) row_memory.release(kept_rows);
  }
  const std::int64_t tail_begin = saved.used();
  allocate_padded(saved, compute, num_tokens, 3 * h);
  saved.allocate(acc, 1, num_tokens);
  final_norm_->allocate(saved, num_tokens, compute);
  if (training && recompute) saved.allocate_bytes(transient + num_tokens * h * 8 + 4096);
  if (!training)
    saved.allocate_bytes(std::max<std::int64_t>(0, transient - saved.used() + tail_begin));
  const std::int64_t chunk = std::min(head_chunk_rows(), std::max<std::int64_t>(1, num_tokens));
  scratch.allocate(acc, chunk + padded_rows(chunk), model_.vocab_size);
  scratch.allocate(
      DType::i32, 1,
      std::max(model_.vocab_size, positions_.valid() ? model_.max_positions : 0) + 1 + num_tokens);
  return {saved.peak(), scratch.peak() + (1 << 16), row_memory.peak()};
}

std::vector<GemmShape> Transformer::gemm_shapes(std::int64_t max_tokens,
                                                std::int64_t max_segment_rows, DType compute,
                                                bool training) const {
  std::vector<GemmShape> shapes;
  for (const Block& block : blocks_) {
    const auto more = block.gemm_shapes(max_tokens, max_segment_rows, compute, training);
    shapes.insert(shapes.end(), more.begin(), more.end());
  }
  const std::int64_t v = model_.vocab_size;
  const std::int64_t h = model_.hidden_size;
  // Whole chunks, and the last one of a micro-batch.
  for (const std::int64_t rows :
       {std::min(max_tokens, head_chunk_rows()), max_tokens % head_chunk_rows()}) {
    if (rows == 0) continue;
    GemmShape head{.kind = GemmKind::forward,
                   .dtype = compute,
                   .result_dtype = accumulate_dtype(compute),
                   .out = v,
                   .in = h,
                   .x_stride = h,
                   .y_stride = v,
                   .min_rows = rows,
                   .max_rows = rows};
    shapes.push_back(head);
    if (!training) continue;
    head.result_dtype = compute;
    head.kind = GemmKind::dgrad;
    shapes.push_back(head);
    head.kind = GemmKind::wgrad;
    shapes.push_back(head);
  }
  return shapes;
}

PrimitiveReport Transformer::build_primitives(Stream& stream, std::int64_t num_seqs,
                                              std::int64_t seq_len, std::int64_t max_segment_rows,
                                              DType compute, bool training) const {
  PrimitiveReport report = arcus::build_primitives(
      stream, gemm_shapes(num_seqs * seq_len, max_segment_rows, compute, training));
  const AttentionLayer& attention = blocks_.front().attention();
  const PrimitiveReport more =
      build_attention_primitives(stream, attention.shape(num_seqs, seq_len), compute, training);
  report.primitives += more.primitives;
  report.bytes += more.bytes;
  report.seconds += more.seconds;
  return report;
}

double Transformer::training_flops_per_token(std::int64_t seq_len) const {
  const auto d = [](std::int64_t n) { return static_cast<double>(n); };
  const double h = d(model_.hidden_size);
  const double q = d(model_.num_heads * model_.head_dim);
  const auto ffn = [&](std::int64_t ff_size) {
    return d(ffn_shape(model_, ff_size).weight_elements());
  };
  double weights = d(model_.vocab_size) * h;
  for (const Block& block : blocks_) {
    weights += h * (2 * q + 2 * d(block.attention().kv_size()));
    if (!block.is_moe()) {
      weights += ffn(model_.dense_ff_size);
      continue;
    }
    weights += block.routed_share() *
               (h * d(model_.num_experts) +
                ffn(model_.expert_ff_size) * d(block.active_experts() + model_.num_shared_experts));
  }
  // Two products of [S, D] by [D, S] per head and layer, half of them masked.
  const double attention = d(model_.num_layers) * 2 * d(seq_len) * q;
  return 3 * (2 * weights + attention);
}

}  // namespace arcus
