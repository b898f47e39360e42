#include "src/model/attention_layer.hpp"

#include <cmath>
#include <cstring>

#include "kernels/elementwise.hpp"
#include "kernels/norm.hpp"
#include "src/model/leaves.hpp"

namespace arcus {

AttentionLayer::AttentionLayer(const ModelConfig& model, const std::string& prefix,
                               ParamRegistry& registry)
    : model_(model),
      q_size_(model.num_heads * model.head_dim),
      kv_size_(model.num_kv_heads * model.head_dim),
      inv_freq_(rope_inv_freq(model)) {
  const std::int64_t h = model.hidden_size;
  const double out_std = 0.02 / std::sqrt(2.0 * static_cast<double>(model.num_layers));
  q_ =
      registry.add({.name = prefix + "q_proj.weight", .shape = {q_size_, h}, .whole_leaves = true});
  k_ = registry.add({.name = prefix + "k_proj.weight",
                     .shape = {kv_size_, h},
                     .follows_previous = true,
                     .whole_leaves = true});
  v_ = registry.add({.name = prefix + "v_proj.weight",
                     .shape = {kv_size_, h},
                     .follows_previous = true,
                     .whole_leaves = true});
  const auto bias = [&](const char* name, std::int64_t size, bool follows) {
    return registry.add({.name = prefix + name,
                         .shape = {size},
                         .keep_accumulate_type = true,
                         .init = ParamInit::zeros,
                         .follows_previous = follows});
  };
  if (model.qkv_bias) {
    q_bias_ = bias("q_proj.bias", q_size_, false);
    k_bias_ = bias("k_proj.bias", kv_size_, true);
    v_bias_ = bias("v_proj.bias", kv_size_, true);
  }
  o_ = registry.add({.name = prefix + "o_proj.weight",
                     .shape = {h, q_size_},
                     .init_std = out_std,
                     .whole_leaves = true});
  if (model.o_bias) o_bias_ = bias("o_proj.bias", h, false);
  q_lora_ = LowRank(q_, registry);
  k_lora_ = LowRank(k_, registry);
  v_lora_ = LowRank(v_, registry);
  o_lora_ = LowRank(o_, registry);
  if (model.qk_norm != "none") {
    const bool full = model.qk_norm == "full";
    const auto gain = [&](const char* name, std::int64_t size) {
      return registry.add({.name = prefix + name,
                           .shape = {full ? size : model.head_dim},
                           .keep_accumulate_type = true,
                           .init = ParamInit::ones});
    };
    q_norm_ = gain("q_norm.weight", q_size_);
    k_norm_ = gain("k_norm.weight", kv_size_);
  }
}

AttentionShape AttentionLayer::shape(std::int64_t num_seqs, std::int64_t seq_len) const {
  return {num_seqs, seq_len, model_.num_heads, model_.num_kv_heads, model_.head_dim};
}

AttentionLayer::Saved AttentionLayer::allocate(Arena& arena, std::int64_t num_tokens,
                                               DType compute) const {
  const DType acc = accumulate_dtype(compute);
  const bool full = model_.qk_norm == "full";
  Saved s;
  s.qkv = arena.allocate(compute, num_tokens, qkv_size());
  if (q_norm_.valid()) {
    s.q_inv_rms = arena.allocate(acc, num_tokens, full ? 1 : model_.num_heads);
    s.k_inv_rms = arena.allocate(acc, num_tokens, full ? 1 : model_.num_kv_heads);
  }
  s.q = arena.allocate(compute, num_tokens * model_.num_heads, model_.head_dim);
  s.k = arena.allocate(compute, num_tokens * model_.num_kv_heads, model_.head_dim);
  s.out = allocate_padded(arena, compute, num_tokens, q_size_);
  s.lse = arena.allocate(acc, num_tokens * model_.num_heads, 1);
  s.u_q = q_lora_.allocate(arena, num_tokens, compute);
  s.u_k = k_lora_.allocate(arena, num_tokens, compute);
  s.u_v = v_lora_.allocate(arena, num_tokens, compute);
  s.u_o = o_lora_.allocate(arena, num_tokens, compute);
  return s;
}

void AttentionLayer::project(PassContext& ctx, const ParamStore& params, ConstTensorView h,
                             const Saved& saved) const {
  linear_forward(ctx.stream, {.y = saved.qkv,
                              .x = h,
                              .weight = params.values(q_, 0, qkv_size()),
                              .bias = params.values(q_bias_, 0, qkv_size()),
                              .few_rows = ctx.decoding});
  q_lora_.forward(ctx, params, saved.qkv.col_range(0, q_size_), h, saved.u_q);
  k_lora_.forward(ctx, params, saved.qkv.col_range(q_size_, kv_size_), h, saved.u_k);
  v_lora_.forward(ctx, params, saved.qkv.col_range(q_size_ + kv_size_, kv_size_), h, saved.u_v);
}

void AttentionLayer::normalize(PassContext& ctx, const ParamStore& params, TensorView q,
                               TensorView k, const Saved& saved) const {
  rmsnorm_forward(ctx.stream, {.y = q,
                               .inv_rms = saved.q_inv_rms,
                               .x = saved.qkv.col_range(0, q_size_),
                               .gain = params.values(q_norm_),
                               .eps = model_.norm_eps});
  rmsnorm_forward(ctx.stream, {.y = k,
                               .inv_rms = saved.k_inv_rms,
                               .x = saved.qkv.col_range(q_size_, kv_size_),
                               .gain = params.values(k_norm_),
                               .eps = model_.norm_eps});
}

void AttentionLayer::rotate(PassContext& ctx, const ParamStore& params, const AttentionShape& shape,
                            const Saved& saved) const {
  const ArenaScope scope(ctx.scratch);
  TensorView q = saved.qkv.col_range(0, q_size_);
  TensorView k = saved.qkv.col_range(q_size_, kv_size_);
  if (q_norm_.valid()) {
    q = ctx.scratch.allocate(q.dtype, q.rows, q_size_);
    k = ctx.scratch.allocate(k.dtype, k.rows, kv_size_);
    normalize(ctx, params, q, k, saved);
  }
  rope_forward(ctx.stream, {.q_out = saved.q,
                            .k_out = saved.k,
                            .q = q,
                            .k = k,
                            .inv_freq = inv_freq(),
                            .position = ctx.batch.position,
                            .shape = shape});
}

void AttentionLayer::forward(PassContext& ctx, const ParamStore& params, TensorView out,
                             ConstTensorView h, ConstTensorView x, const Saved& saved) const {
  const AttentionShape sizes = shape(ctx.batch.num_seqs, ctx.batch.seq_len);
  project(ctx, params, h, saved);
  rotate(ctx, params, sizes, saved);
  attention_forward(ctx.stream, {.out = saved.out,
                                 .lse = saved.lse,
                                 .q = saved.q,
                                 .k = saved.k,
                                 .v = saved.qkv.col_range(q_size_ + kv_size_, kv_size_),
                                 .first_key = ctx.batch.first_key,
                                 .shape = sizes});
  linear_forward(
      ctx.stream,
      {.y = out, .x = saved.out, .weight = params.values(o_), .bias = params.values(o_bias_)});
  o_lora_.forward(ctx, params, out, saved.out, saved.u_o);
  add(ctx.stream, {.y = out, .a = out, .b = x});
}

void AttentionLayer::normalize_backward(PassContext& ctx, const ParamStore& params, TensorView dqkv,
                                        const Saved& saved) const {
  const TensorView dq = dqkv.col_range(0, q_size_);
  const TensorView dk = dqkv.col_range(q_size_, kv_size_);
  rmsnorm_backward(ctx.stream, {.dx = dq,
                                .dgain = params.sums(q_norm_),
                                .dy = dq,
                                .x = saved.qkv.col_range(0, q_size_),
                                .inv_rms = saved.q_inv_rms,
                                .gain = params.values(q_norm_),
                                .micro_batch = ctx.batch.number});
  rmsnorm_backward(ctx.stream, {.dx = dk,
                                .dgain = params.sums(k_norm_),
                                .dy = dk,
                                .x = saved.qkv.col_range(q_size_, kv_size_),
                                .inv_rms = saved.k_inv_rms,
                                .gain = params.values(k_norm_),
                                .micro_batch = ctx.batch.number});
}

void AttentionLayer::backward(PassContext& ctx, const ParamStore& params, TensorView dh,
                              TensorView dout, ConstTensorView h, const Saved& saved) const {
  const ArenaScope scope(ctx.scratch);
  const DType compute = h.dtype;
  const AttentionShape sizes = shape(ctx.batch.num_seqs, ctx.batch.seq_len);
  add_leaves(ctx, params, dout, saved.out, o_, o_bias_);
  const TensorView dattention = ctx.scratch.allocate(compute, h.rows, q_size_);
  linear_dgrad(ctx.stream, {.dx = dattention, .dy = dout, .weight = params.values(o_)});
  o_lora_.backward(ctx, params, dattention, dout, saved.out, saved.u_o);

  const TensorView dqkv = allocate_padded(ctx.scratch, compute, h.rows, qkv_size());
  const TensorView dq = ctx.scratch.allocate(compute, saved.q.rows, model_.head_dim);
  const TensorView dk = ctx.scratch.allocate(compute, saved.k.rows, model_.head_dim);
  attention_backward(ctx.stream, {.dq = dq,
                                  .dk = dk,
                                  .dv = dqkv.col_range(q_size_ + kv_size_, kv_size_),
                                  .dout = dattention,
                                  .out = saved.out,
                                  .lse = saved.lse,
                                  .q = saved.q,
                                  .k = saved.k,
                                  .v = saved.qkv.col_range(q_size_ + kv_size_, kv_size_),
                                  .first_key = ctx.batch.first_key,
                                  .shape = sizes});
  rope_backward(ctx.stream, {.dq = dqkv.col_range(0, q_size_),
                             .dk = dqkv.col_range(q_size_, kv_size_),
                             .dq_out = dq,
                             .dk_out = dk,
                             .inv_freq = inv_freq(),
                             .position = ctx.batch.position,
                             .shape = sizes});
  if (q_norm_.valid()) normalize_backward(ctx, params, dqkv, saved);
  project_backward(ctx, params, dh, dqkv, h, saved);
}

void AttentionLayer::project_backward(PassContext& ctx, const ParamStore& params, TensorView dh,
                                      TensorView dqkv, ConstTensorView h,
                                      const Saved& saved) const {
  const TensorView dq = dqkv.col_range(0, q_size_);
  const TensorView dk = dqkv.col_range(q_size_, kv_size_);
  const TensorView dv = dqkv.col_range(q_size_ + kv_size_, kv_size_);
  // Each projection is a tensor of its own, so that a bad leaf is named and frozen ones are
  // skipped.
  add_leaves(ctx, params, dq, h, q_, q_bias_);
  add_leaves(ctx, params, dk, h, k_, k_bias_);
  add_leaves(ctx, params, dv, h, v_, v_bias_);
  linear_dgrad(ctx.stream, {.dx = dh, .dy = dqkv, .weight = params.values(q_, 0, qkv_size())});
  q_lora_.backward(ctx, params, dh, dq, h, saved.u_q);
  k_lora_.backward(ctx, params, dh, dk, h, saved.u_k);
  v_lora_.backward(ctx, params, dh, dv, h, saved.u_v);
}

void AttentionLayer::decode(PassContext& ctx, const ParamStore& params, TensorView out,
                            ConstTensorView h, ConstTensorView x, KvCache& cache) const {
  const ArenaScope scope(ctx.scratch);
  const Saved saved = allocate(ctx.scratch, h.rows, h.dtype);
  const AttentionShape sizes = shape(ctx.batch.num_seqs, 1);
  project(ctx, params, h, saved);
  rotate(ctx, params, sizes, saved);
  // Attention's layout of one position is [B, heads * D] as it stands.
  const ConstTensorView k(saved.k.data, h.dtype, h.rows, kv_size_);
  const auto* length = cache.length.as<std::int32_t>();
  for (std::int64_t b = 0; b < h.rows; ++b) {
    const std::int64_t row = b * cache.max_len + length[b] - 1;
    cast(ctx.stream, {.y = cache.k.row_range(row, 1), .x = k.row_range(b, 1)});
    cast(ctx.stream, {.y = cache.v.row_range(row, 1),
                      .x = saved.qkv.row_range(b, 1).col_range(q_size_ + kv_size_, kv_size_)});
  }
  attention_decode(ctx.stream, {.out = saved.out,
                                .q = {saved.q.data, h.dtype, h.rows, q_size_},
                                .k_cache = cache.k,
                                .v_cache = cache.v,
                                .length = cache.length,
                                .max_len = cache.max_len,
                                .shape = sizes});
  linear_forward(ctx.stream, {.y = out,
                              .x = saved.out,
                              .weight = params.values(o_),
                              .bias = params.values(o_bias_),
                              .few_rows = ctx.decoding});
  o_lora_.forward(ctx, params, out, saved.out, saved.u_o);
  add(ctx.stream, {.y = out, .a = out, .b = x});
}

std::vector<GemmShape> AttentionLayer::gemm_shapes(std::int64_t max_tokens, DType compute,
                                                   bool training) const {
  const std::int64_t h = model_.hidden_size;
  const std::int64_t all = qkv_size();
  std::vector<GemmShape> shapes;
  const auto push = [&](GemmKind kind, std::int64_t out, std::int64_t in, std::int64_t x_stride,
                        std::int64_t y_stride, bool bias) {
    shapes.push_back({.kind = kind,
                      .dtype = compute,
                      .result_dtype = compute,
                      .out = out,
                      .in = in,
                      .x_stride = x_stride,
                      .y_stride = y_stride,
                      .min_rows = max_tokens,
                      .max_rows = max_tokens,
                      .bias = bias});
  };
  push(GemmKind::forward, all, h, h, all, q_bias_.valid());
  push(GemmKind::forward, h, q_size_, q_size_, h, o_bias_.valid());
  const auto adapter = [&](const LowRank& lora, std::int64_t x_stride, std::int64_t y_stride) {
    lora.append_gemm_shapes({.x_stride = x_stride,
                             .y_stride = y_stride,
                             .compute = compute,
                             .dx_type = compute,
                             .min_rows = max_tokens,
                             .max_rows = max_tokens},
                            training, shapes);
  };
  adapter(q_lora_, h, all);
  adapter(k_lora_, h, all);
  adapter(v_lora_, h, all);
  adapter(o_lora_, q_size_, h);
  if (!training) return shapes;
  push(GemmKind::dgrad, h, q_size_, q_size_, h, false);
  push(GemmKind::dgrad, all, h, h, all, false);
  push(GemmKind::wgrad, h, q_size_, q_size_, h, false);
  push(GemmKind::wgrad, q_size_, h, h, all, false);
  push(GemmKind::wgrad, kv_size_, h, h, all, false);
  return shapes;
}

}  // namespace arcus
