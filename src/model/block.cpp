#include "src/model/block.hpp"

#include <cmath>

#include "kernels/elementwise.hpp"
#include "kernels/norm.hpp"

namespace arcus {
namespace {

ParamRef add_gain(const std::string& name, std::int64_t size, ParamRegistry& registry) {
  return registry.add(
      {.name = name, .shape = {size}, .keep_accumulate_type = true, .init = ParamInit::ones});
}

std::string layer_prefix(std::int64_t layer) { return fmt::format("model.layers.{}.", layer); }

}  // namespace

Block::Block(const ModelConfig& model, const RoutingConfig& routing, std::int64_t layer,
             ParamRegistry& registry)
    : model_(model),
      input_norm_(
          add_gain(layer_prefix(layer) + "input_layernorm.weight", model.hidden_size, registry)),
      attention_(model, layer_prefix(layer) + "self_attn.", registry),
      post_attention_norm_(add_gain(layer_prefix(layer) + "post_attention_layernorm.weight",
                                    model.hidden_size, registry)) {
  const std::string prefix = layer_prefix(layer) + "mlp.";
  if (layer < model.first_k_dense) {
    dense_.emplace(prefix, model.hidden_size, model.dense_ff_size,
                   0.02 / std::sqrt(2.0 * static_cast<double>(model.num_layers)), registry);
  } else {
    moe_.emplace(model, routing, prefix, registry);
  }
}

void Block::allocate_kept(Arena& arena, std::int64_t num_tokens, const TokenDispatcher& dispatcher,
                          Saved& saved) const {
  if (moe_) moe_->allocate_routing(arena, num_tokens, dispatcher, saved.moe);
}

void Block::allocate_rest(Arena& arena, std::int64_t num_tokens, DType compute,
                          Saved& saved) const {
  const DType acc = accumulate_dtype(compute);
  const std::int64_t h = model_.hidden_size;
  saved.inv_rms1 = arena.allocate(acc, num_tokens, 1);
  saved.inv_rms2 = arena.allocate(acc, num_tokens, 1);
  saved.h1 = allocate_padded(arena, compute, num_tokens, h);
  saved.h2 = allocate_padded(arena, compute, num_tokens, h, kWgradRowPadding);
  saved.mid = arena.allocate(compute, num_tokens, h);
  saved.attention = attention_.allocate(arena, num_tokens, compute);
  if (dense_) saved.dense = dense_->allocate(arena, num_tokens, compute);
  if (moe_) moe_->allocate_tokens(arena, num_tokens, compute, saved.moe);
}

void Block::count_round(Arena& saved, Arena& scratch, std::int64_t num_tokens, std::int64_t rows,
                        std::int64_t padded, DType compute, bool training) const {
  const DType acc = accumulate_dtype(compute);
  const std::int64_t h = model_.hidden_size;
  const std::int64_t tokens = padded_rows(num_tokens) + kWgradRowPadding;
  if (moe_) {
    MoeLayer::Saved dummy;
    moe_->allocate_rows(saved, rows, padded, compute, dummy);
  }
  const ArenaScope scope(scratch);
  scratch.allocate(acc, tokens, 4 * h + 2 * attention_.qkv_size() + 64);
  if (dense_) {
    scratch.allocate(compute, tokens, ffn_row_stride(h) + ffn_row_stride(2 * model_.dense_ff_size));
  }
  if (moe_ && training) {
    moe_->allocate_backward_scratch(scratch, num_tokens, rows, padded, compute);
  }
  if (moe_ && !training) scratch.allocate(acc, tokens, 2 * h + 64);
  if (moe_) moe_->allocate_forward_scratch(scratch, num_tokens, compute);
  scratch.allocate_bytes(1 << 14);
}

void Block::norm(PassContext& ctx, const ParamStore& params, ParamRef gain, TensorView y,
                 TensorView inv_rms, ConstTensorView x) const {
  rmsnorm_forward(
      ctx.stream,
      {.y = y, .inv_rms = inv_rms, .x = x, .gain = params.values(gain), .eps = model_.norm_eps});
}

void Block::feed_forward(PassContext& ctx, const ParamStore& params, TokenDispatcher& dispatcher,
                         TensorView out, ConstTensorView mid, Saved& saved, bool replay) const {
  norm(ctx, params, post_attention_norm_, saved.h2, saved.inv_rms2, mid);
  if (moe_) {
    return moe_->forward(ctx, params, dispatcher, out, saved.h2, mid, saved.moe, replay);
  }
  dense_->forward(ctx, params, out, saved.h2, saved.dense);
  add(ctx.stream, {.y = out, .a = out, .b = mid});
}

void Block::forward(PassContext& ctx, const ParamStore& params, TokenDispatcher& dispatcher,
                    TensorView out, ConstTensorView x, Saved& saved, bool replay) const {
  norm(ctx, params, input_norm_, saved.h1, saved.inv_rms1, x);
  attention_.forward(ctx, params, saved.mid, saved.h1, x, saved.attention);
  feed_forward(ctx, params, dispatcher, out, saved.mid, saved, replay);
}

void Block::backward(PassContext& ctx, const ParamStore& params, TokenDispatcher& dispatcher,
                     TensorView dx, TensorView dout, ConstTensorView x, const Saved& saved) const {
  const ArenaScope scope(ctx.scratch);
  const DType compute = x.dtype;
  const TensorView dh = ctx.scratch.allocate(compute, x.rows, x.cols);
  if (moe_) {
    moe_->backward(ctx, params, dispatcher, dh, dout, saved.h2, saved.moe);
  } else {
    dense_->backward(ctx, params, dh, dout, saved.h2, saved.dense);
  }
  const TensorView dmid = allocate_padded(ctx.scratch, compute, x.rows, x.cols);
  rmsnorm_backward(ctx.stream, {.dx = dmid,
                                .dgain = params.sums(post_attention_norm_),
                                .dy = dh,
                                .residual = dout,
                                .x = saved.mid,
                                .inv_rms = saved.inv_rms2,
                                .gain = params.values(post_attention_norm_),
                                .micro_batch = ctx.batch.number});
  attention_.backward(ctx, params, dh, dmid, saved.h1, saved.attention);
  rmsnorm_backward(ctx.stream, {.dx = dx,
                                .dgain = params.sums(input_norm_),
                                .dy = dh,
                                .residual = dmid,
                                .x = x,
                                .inv_rms = saved.inv_rms1,
                                .gain = params.values(input_norm_),
                                .micro_batch = ctx.batch.number});
}

void Block::decode(PassContext& ctx, const ParamStore& params, TokenDispatcher& dispatcher,
                   TensorView out, ConstTensorView x, KvCache& cache) const {
  Saved saved;
  allocate_kept(ctx.saved, x.rows, dispatcher, saved);
  allocate_rest(ctx.saved, x.rows, x.dtype, saved);
  norm(ctx, params, input_norm_, saved.h1, saved.inv_rms1, x);
  attention_.decode(ctx, params, saved.mid, saved.h1, x, cache);
  feed_forward(ctx, params, dispatcher, out, saved.mid, saved, false);
}

std::vector<GemmShape> Block::gemm_shapes(std::int64_t max_tokens, std::int64_t max_segment_rows,
                                          DType compute, bool training) const {
  std::vector<GemmShape> shapes = attention_.gemm_shapes(max_tokens, compute, training);
  const auto more = moe_ ? moe_->gemm_shapes(max_tokens, max_segment_rows, compute, training)
                         : dense_->gemm_shapes(max_tokens, compute, training);
  shapes.insert(shapes.end(), more.begin(), more.end());
  return shapes;
}

}  // namespace arcus
