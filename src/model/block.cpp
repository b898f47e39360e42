#include "src/model/block.hpp"

#include <cmath>

#include "kernels/elementwise.hpp"
#include "kernels/permute.hpp"

namespace arcus {
namespace {

std::string layer_prefix(std::int64_t layer) { return fmt::format("model.layers.{}.", layer); }

}  // namespace

Block::Block(const ModelConfig& model, const RoutingConfig& routing, std::int64_t layer,
             ParamRegistry& registry)
    : model_(model),
      input_norm_(model, layer_prefix(layer) + "input_layernorm", registry),
      attention_(model, layer_prefix(layer) + "self_attn.", registry),
      post_attention_norm_(model, layer_prefix(layer) + "post_attention_layernorm", registry) {
  const std::string prefix = layer_prefix(layer) + "mlp.";
  if (layer < model.first_k_dense) {
    dense_.emplace(prefix, ffn_shape(model, model.dense_ff_size),
                   0.02 / std::sqrt(2.0 * static_cast<double>(model.num_layers)), registry);
  } else {
    if (find_stream(routing.stream).decides) {
      stream_.emplace(model, routing, layer_prefix(layer), registry);
      if (find_stream(routing.stream).predicts) routed_share_ = routing.stream_capacity_factor;
    }
    moe_.emplace(model, routing, prefix, registry);
  }
}

void Block::allocate_kept(Arena& arena, std::int64_t num_tokens, const TokenDispatcher& dispatcher,
                          Saved& saved) const {
  if (moe_) moe_->allocate_routing(arena, num_tokens, dispatcher, saved.moe);
  if (stream_) stream_->allocate_kept(arena, num_tokens, saved.stream);
}

void Block::allocate_rest(Arena& arena, std::int64_t num_tokens, DType compute,
                          Saved& saved) const {
  const std::int64_t h = model_.hidden_size;
  saved.norm1 = input_norm_.allocate(arena, num_tokens, compute);
  saved.h1 = allocate_padded(arena, compute, num_tokens, h);
  saved.mid = arena.allocate(compute, num_tokens, h);
  saved.attention = attention_.allocate(arena, num_tokens, compute);
  // Else the number of tokens is not known yet.
  if (stream_) return stream_->allocate_rest(arena, num_tokens, compute, saved.stream);
  saved.ff_in = saved.mid;
  allocate_second_half(arena, num_tokens, compute, saved);
}

void Block::allocate_second_half(Arena& arena, std::int64_t num_tokens, DType compute,
                                 Saved& saved) const {
  const std::int64_t h = model_.hidden_size;
  saved.norm2 = post_attention_norm_.allocate(arena, num_tokens, compute);
  saved.h2 = allocate_padded(arena, compute, num_tokens, h, kWgradRowPadding);
  if (stream_) {
    saved.ff_in = arena.allocate(compute, num_tokens, h);
    saved.experts_out = arena.allocate(compute, num_tokens, h);
  }
  if (dense_) saved.dense = dense_->allocate(arena, num_tokens, compute);
  if (moe_) moe_->allocate_tokens(arena, num_tokens, compute, saved.moe);
}

void Block::count_round(Arena& saved, Arena& scratch, Arena& row_memory, std::int64_t num_tokens,
                        std::int64_t rows, std::int64_t padded, DType compute,
                        bool training) const {
  const DType acc = accumulate_dtype(compute);
  const std::int64_t h = model_.hidden_size;
  const std::int64_t tokens = padded_rows(num_tokens) + kWgradRowPadding;
  if (moe_) {
    Saved dummy;
    if (stream_) allocate_second_half(saved, num_tokens, compute, dummy);
    moe_->allocate_rows(saved, row_memory, rows, padded, compute, dummy.moe);
  }
  const ArenaScope scope(scratch);
  scratch.allocate(acc, tokens, 4 * h + 2 * attention_.qkv_size() + 64 + attention_.adapter_cols());
  if (dense_) {
    dense_->allocate_adapter_scratch(scratch, num_tokens, compute);
    scratch.allocate(compute, tokens,
                     ffn_row_stride(h) + ffn_row_stride(dense_->shape().gate_up_size()));
  }
  if (moe_ && training) {
    moe_->allocate_backward_scratch(scratch, row_memory, num_tokens, rows, padded, compute);
  }
  if (moe_ && !training) scratch.allocate(acc, tokens, 2 * h + 64);
  if (moe_) moe_->allocate_forward_scratch(scratch, num_tokens, compute);
  if (stream_) stream_->allocate_scratch(scratch, num_tokens, compute);
  scratch.allocate_bytes(1 << 14);
}

void Block::feed_forward(PassContext& ctx, const ParamStore& params, TokenDispatcher& dispatcher,
                         TensorView out, ConstTensorView x, Saved& saved, bool replay) const {
  if (stream_) return two_level(ctx, params, dispatcher, out, x, saved, replay);
  post_attention_norm_.forward(ctx, params, saved.h2, saved.norm2, saved.mid);
  if (moe_) {
    return moe_->forward(ctx, params, dispatcher, out, saved.h2, saved.mid, saved.moe, replay);
  }
  dense_->forward(ctx, params, out, saved.h2, saved.dense);
  add(ctx.stream, {.y = out, .a = out, .b = saved.mid});
}

void Block::two_level(PassContext& ctx, const ParamStore& params, TokenDispatcher& dispatcher,
                      TensorView out, ConstTensorView x, Saved& saved, bool replay) const {
  stream_->forward(ctx, params, x, saved.mid, saved.stream, replay);
  const MicroBatch second = stream_->second_level(ctx.batch, saved.stream);
  const std::int64_t tokens = second.num_tokens();
  moe_->keep_tokens(tokens, saved.moe);
  saved.moe.routing.stream_gate = saved.stream.g;
  allocate_second_half(ctx.saved, tokens, x.dtype, saved);
  gather_rows(ctx.stream, {.y = saved.ff_in, .x = saved.mid, .index = saved.stream.index});
  post_attention_norm_.forward(ctx, params, saved.h2, saved.norm2, saved.ff_in);
  PassContext second_ctx = ctx.with(second);
  moe_->forward(second_ctx, params, dispatcher, saved.experts_out, saved.h2, {}, saved.moe, replay);
  stream_->merge(ctx, out, saved.mid, saved.experts_out, saved.stream);
}

void Block::two_level_backward(PassContext& ctx, const ParamStore& params,
                               TokenDispatcher& dispatcher, TensorView dmid, TensorView dwide,
                               ConstTensorView dout, const Saved& saved) const {
  const ArenaScope scope(ctx.scratch);
  const std::int64_t tokens = saved.ff_in.rows;
  const std::int64_t h = model_.hidden_size;
  const TensorView dexperts_out = allocate_padded(ctx.scratch, dout.dtype, tokens, h);
  stream_->backward(ctx, params, dexperts_out, dwide, dout, saved.experts_out, saved.stream);
  const MicroBatch second = stream_->second_level(ctx.batch, saved.stream);
  PassContext second_ctx = ctx.with(second);
  const TensorView dh = ctx.scratch.allocate(dout.dtype, tokens, h);
  moe_->backward(second_ctx, params, dispatcher, dh, dexperts_out, saved.h2, saved.moe);
  post_attention_norm_.backward(ctx, params, dexperts_out, dh, {}, saved.ff_in, saved.norm2);
  stream_->scatter(ctx, dmid, dexperts_out, {}, dout, dwide.col_range(h, h), saved.stream);
}

void Block::forward(PassContext& ctx, const ParamStore& params, TokenDispatcher& dispatcher,
                    TensorView out, ConstTensorView x, Saved& saved, bool replay) const {
  input_norm_.forward(ctx, params, saved.h1, saved.norm1, x);
  attention_.forward(ctx, params, saved.mid, saved.h1, x, saved.attention);
  feed_forward(ctx, params, dispatcher, out, x, saved, replay);
}

void Block::backward(PassContext& ctx, const ParamStore& params, TokenDispatcher& dispatcher,
                     TensorView dx, TensorView dout, ConstTensorView x, const Saved& saved) const {
  const ArenaScope scope(ctx.scratch);
  const DType compute = x.dtype;
  const TensorView dh = ctx.scratch.allocate(compute, x.rows, x.cols);
  const TensorView dmid = allocate_padded(ctx.scratch, compute, x.rows, x.cols);
  TensorView dwide;
  if (stream_) {
    dwide = ctx.scratch.allocate(accumulate_dtype(compute), x.rows, 2 * x.cols);
    two_level_backward(ctx, params, dispatcher, dmid, dwide, dout, saved);
  } else {
    if (moe_) {
      moe_->backward(ctx, params, dispatcher, dh, dout, saved.h2, saved.moe);
    } else {
      dense_->backward(ctx, params, dh, dout, saved.h2, saved.dense);
    }
    post_attention_norm_.backward(ctx, params, dmid, dh, dout, saved.mid, saved.norm2);
  }
  attention_.backward(ctx, params, dh, dmid, saved.h1, saved.attention);
  input_norm_.backward(ctx, params, dx, dh, dmid, x, saved.norm1);
  if (stream_) add(ctx.stream, {.y = dx, .a = dx, .b = dwide.col_range(0, x.cols)});
}

void Block::decode(PassContext& ctx, const ParamStore& params, TokenDispatcher& dispatcher,
                   TensorView out, ConstTensorView x, KvCache& cache) const {
  Saved saved;
  allocate_kept(ctx.saved, x.rows, dispatcher, saved);
  allocate_rest(ctx.saved, x.rows, x.dtype, saved);
  input_norm_.forward(ctx, params, saved.h1, saved.norm1, x);
  attention_.decode(ctx, params, saved.mid, saved.h1, x, cache);
  feed_forward(ctx, params, dispatcher, out, x, saved, false);
}

std::vector<GemmShape> Block::gemm_shapes(std::int64_t max_tokens, std::int64_t max_segment_rows,
                                          DType compute, bool training) const {
  std::vector<GemmShape> shapes = attention_.gemm_shapes(max_tokens, compute, training);
  const auto append = [&](const std::vector<GemmShape>& more) {
    shapes.insert(shapes.end(), more.begin(), more.end());
  };
  if (stream_) append(stream_->gemm_shapes(max_tokens, compute, training));
  // Any number of tokens may go on from a decision layer.
  const std::int64_t min_tokens = stream_ ? 1 : max_tokens;
  append(moe_ ? moe_->gemm_shapes(min_tokens, max_tokens, max_segment_rows, compute, training)
              : dense_->gemm_shapes(max_tokens, compute, training));
  return shapes;
}

}  // namespace arcus
