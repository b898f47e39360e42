#include "src/model/moe_layer.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "kernels/elementwise.hpp"
#include "src/model/leaves.hpp"

namespace arcus {
namespace {

double residual_std(const ModelConfig& model) {
  return 0.02 / std::sqrt(2.0 * static_cast<double>(model.num_layers));
}

}  // namespace

MoeLayer::MoeLayer(const ModelConfig& model, const RoutingConfig& routing,
                   const std::string& prefix, ParamRegistry& registry)
    : model_(model),
      shape_(ffn_shape(model, model.expert_ff_size)),
      gate_(model, routing, prefix, registry) {
  add_experts(prefix + "experts.", registry);
  adapters_ = FfnAdapters(gate_proj_, up_proj_, down_proj_, registry);
  if (model.num_shared_experts == 0) return;
  shared_.emplace(prefix + "shared_experts.",
                  ffn_shape(model, model.expert_ff_size * model.num_shared_experts),
                  residual_std(model), registry);
  if (model.shared_expert_gate) {
    shared_gate_ = registry.add({.name = prefix + "shared_expert_gate.weight",
                                 .shape = {1, model.hidden_size},
                                 .keep_accumulate_type = true,
                                 .whole_leaves = true});
  }
}

void MoeLayer::add_experts(const std::string& prefix, ParamRegistry& registry) {
  const std::int64_t e = model_.num_experts;
  const std::int64_t f = shape_.ff_size;
  const std::int64_t h = shape_.hidden_size;
  const auto weight = [&](const char* name, std::int64_t out, std::int64_t in) {
    return ParamRow{.name = prefix + name,
                    .shape = {e, out, in},
                    .whole_leaves = true,
                    .active_units = gate_.active_experts()};
  };
  std::vector<ParamRow> rows;
  if (shape_.gated()) rows.push_back(weight("gate_proj.weight", f, h));
  rows.push_back(weight("up_proj.weight", f, h));
  rows.push_back(weight("down_proj.weight", h, f));
  rows.back().init_std = residual_std(model_);
  const auto add = [&](std::vector<ParamRow> all, ParamRef& gate, ParamRef& up, ParamRef& down) {
    const std::vector<ParamRef> refs = registry.add_experts(std::move(all));
    auto next = refs.begin();
    if (shape_.gated()) gate = *next++;
    up = *next++;
    down = *next;
  };
  add(std::move(rows), gate_proj_, up_proj_, down_proj_);
  if (!shape_.bias) return;
  const auto bias = [&](const char* name, std::int64_t size) {
    return ParamRow{.name = prefix + name,
                    .shape = {e, size},
                    .keep_accumulate_type = true,
                    .init = ParamInit::zeros,
                    .active_units = gate_.active_experts()};
  };
  std::vector<ParamRow> biases;
  if (shape_.gated()) biases.push_back(bias("gate_proj.bias", f));
  biases.push_back(bias("up_proj.bias", f));
  biases.push_back(bias("down_proj.bias", h));
  add(std::move(biases), gate_bias_, up_bias_, down_bias_);
}

void MoeLayer::allocate_routing(Arena& arena, std::int64_t num_tokens,
                                const TokenDispatcher& dispatcher, Saved& saved) const {
  saved.routing = gate_.allocate(arena, num_tokens, dispatcher.options().dtype);
  saved.plan = dispatcher.make_plan_storage(arena);
}

void MoeLayer::allocate_tokens(Arena& arena, std::int64_t num_tokens, DType compute,
                               Saved& saved) const {
  if (!shared_) return;
  saved.shared = shared_->allocate(arena, num_tokens, compute);
  if (!shared_gate_.valid()) return;
  const DType acc = accumulate_dtype(compute);
  saved.shared_out = arena.allocate(compute, num_tokens, model_.hidden_size);
  saved.shared_logit = arena.allocate(acc, num_tokens, 1);
  if (acc != compute) {
    saved.shared_wide = allocate_padded(arena, acc, num_tokens, model_.hidden_size);
  }
}

void MoeLayer::allocate_rows(Arena& arena, Arena& row_memory, std::int64_t rows,
                             std::int64_t padded, DType compute, Saved& saved) const {
  const std::int64_t h = model_.hidden_size;
  const std::int64_t f = shape_.ff_size;
  const std::int64_t u = shape_.gate_up_size();
  saved.x = row_memory.allocate(compute, rows + kWgradRowPadding, h).row_range(0, rows);
  saved.y = row_memory.allocate(compute, rows, h);
  saved.gate_up = arena.allocate(compute, padded, u, ffn_row_stride(u));
  saved.act = arena.allocate(compute, padded, f, ffn_row_stride(f));
  saved.u = adapters_.allocate(arena, padded, compute);
}

FfnWeights MoeLayer::expert_weights(const ParamStore& params) const {
  const std::int64_t u = shape_.gate_up_size();
  const bool gated = shape_.gated();
  return {.gate_up = params.values(gated ? gate_proj_ : up_proj_, 0, u),
          .down = params.values(down_proj_),
          .expert_stride = params.registry().row(up_proj_).expert_stride,
          .gate_up_bias = params.values(gated ? gate_bias_ : up_bias_, 0, u),
          .down_bias = params.values(down_bias_),
          .bias_stride = shape_.bias ? params.registry().row(up_bias_).expert_stride : 0};
}

void MoeLayer::forward_shared(PassContext& ctx, const ParamStore& params, TensorView out,
                              ConstTensorView h, const Saved& saved) const {
  if (!shared_gate_.valid()) return shared_->forward(ctx, params, out, h, saved.shared);
  shared_->forward(ctx, params, saved.shared_out, h, saved.shared);
  gate_logits(ctx.stream, {.z = saved.shared_logit,
                           .x_wide = saved.shared_wide,
                           .x = h,
                           .weight = params.values(shared_gate_)});
  scale_rows_sigmoid(ctx.stream, {.out = out, .x = saved.shared_out, .logit = saved.shared_logit});
}

void MoeLayer::forward(PassContext& ctx, const ParamStore& params, TokenDispatcher& dispatcher,
                       TensorView out, ConstTensorView h, ConstTensorView residual, Saved& saved,
                       bool replay) const {
  gate_.forward(ctx, params, h, saved.routing, replay);
  if (!replay) {
    ctx.beat("counts");
    dispatcher.make_plan(ctx.stream, saved.routing.expert_of_slot, ctx.batch.number,
                         {ctx.step, ctx.layer}, saved.plan,
                         gate_.rows_per_expert(ctx, saved.routing));
    ctx.stats.recv_rows[static_cast<std::size_t>(ctx.layer)] = saved.plan.num_recv_rows;
  }
  allocate_rows(ctx.saved, ctx.rows, saved.plan.num_recv_rows, saved.plan.num_padded_rows, h.dtype,
                saved);
  ctx.beat("dispatch");
  const Event arrived = dispatcher.dispatch(ctx.stream, saved.plan, h, {}, saved.x, {});
  ctx.stream.poll_between_tasks(arrived);

  const ArenaScope scope(ctx.scratch);
  TensorView shared_out;
  if (shared_) {
    shared_out = ctx.scratch.allocate(h.dtype, h.rows, h.cols);
    forward_shared(ctx, params, shared_out, h, saved);
  }
  const auto experts = [&](std::span<const Segment> segments) {
    ffn_forward(ctx.stream, {.y = saved.y,
                             .gate_up = saved.gate_up,
                             .act = saved.act,
                             .x = saved.x,
                             .weights = expert_weights(params),
                             .shape = shape_,
                             .segments = segments,
                             .few_rows = ctx.decoding,
                             .low_rank = adapters_.views(params, saved.u)});
  };
  // Own rows are worked on while those of others travel: some of them on the way here, some on the
  // way back.
  const std::span<const Segment> own = saved.plan.own_segments;
  const std::size_t early = dispatcher.comm().size() > 1 ? own.size() / 2 : own.size();
  experts(own.first(early));
  ctx.stream.wait(arrived);
  experts(saved.plan.other_segments);
  ctx.beat("combine");
  SlotRows slots;
  const Event returned = dispatcher.combine(ctx.stream, saved.plan, saved.y, {}, slots);
  ctx.stream.poll_between_tasks(returned);
  experts(own.subspan(early));
  ctx.stream.wait(returned);
  weighted_sum(ctx.stream, {.out = out,
                            .slot_rows = slots.rows.data(),
                            .weight = saved.routing.weight,
                            .slots_per_token = gate_.num_slots(),
                            .addend1 = shared_ ? shared_out : ConstTensorView(residual),
                            .addend2 = shared_ ? ConstTensorView(residual) : ConstTensorView()});
  dispatcher.finish_combine();
}

void MoeLayer::backward_shared(PassContext& ctx, const ParamStore& params, TensorView dh,
                               ConstTensorView dout, ConstTensorView h, const Saved& saved) const {
  if (!shared_gate_.valid()) return shared_->backward(ctx, params, dh, dout, h, saved.shared);
  const ArenaScope scope(ctx.scratch);
  const DType acc = saved.shared_logit.dtype;
  const TensorView dshared = ctx.scratch.allocate(dout.dtype, dout.rows, dout.cols);
  const TensorView dlogit = allocate_padded(ctx.scratch, acc, dout.rows, 1);
  scale_rows_sigmoid_backward(ctx.stream, {.dx = dshared,
                                           .dlogit = dlogit,
                                           .dout = dout,
                                           .x = saved.shared_out,
                                           .logit = saved.shared_logit});
  const TensorView through_ffn = ctx.scratch.allocate(dout.dtype, dout.rows, dout.cols);
  shared_->backward(ctx, params, through_ffn, dshared, h, saved.shared);
  const TensorView through_gate = ctx.scratch.allocate(acc, dout.rows, dout.cols);
  linear_dgrad(ctx.stream,
               {.dx = through_gate, .dy = dlogit, .weight = params.values(shared_gate_)});
  add_leaves(ctx, params, dlogit, saved.shared_wide.data != nullptr ? saved.shared_wide : h,
             shared_gate_);
  weighted_sum(ctx.stream, {.out = dh, .addend1 = through_ffn, .addend2 = through_gate});
}

void MoeLayer::add_expert_leaves(PassContext& ctx, const ParamStore& params, ConstTensorView dy,
                                 ConstTensorView dgate_up, const FfnAdapters::Rows& v,
                                 const Saved& saved) const {
  const FfnWeights weights = expert_weights(params);
  ffn_wgrad(ctx.stream, {.dgate = params.sums(gate_proj_),
                         .dup = params.sums(up_proj_),
                         .ddown = params.sums(down_proj_),
                         .expert_stride = weights.expert_stride,
                         .tensor_idx_stride = 1,
                         .dgate_bias = params.sums(gate_bias_),
                         .dup_bias = params.sums(up_bias_),
                         .ddown_bias = params.sums(down_bias_),
                         .bias_stride = weights.bias_stride,
                         .x = saved.x,
                         .act = saved.act,
                         .dy = dy,
                         .dgate_up = dgate_up,
                         .shape = shape_,
                         .segments = saved.plan.segments});
  adapters_.add_leaves(ctx, params, saved.x, saved.act, dy, dgate_up, saved.u, v,
                       saved.plan.segments);
}

void MoeLayer::backward(PassContext& ctx, const ParamStore& params, TokenDispatcher& dispatcher,
                        TensorView dh, ConstTensorView dout, ConstTensorView h,
                        const Saved& saved) const {
  const ArenaScope scope(ctx.scratch);
  const ArenaScope rows_scope(ctx.rows);
  const DType compute = h.dtype;
  const DType acc = accumulate_dtype(compute);
  const std::int64_t rows = saved.plan.num_recv_rows;
  const std::int64_t padded = saved.plan.num_padded_rows;
  const std::int64_t hidden = model_.hidden_size;
  // dispatch clears the rows behind the last one, as in the forward pass.
  const TensorView dout_rows =
      ctx.rows.allocate(compute, rows + kWgradRowPadding, hidden).row_range(0, rows);
  const TensorView row_weight = ctx.rows.allocate(acc, 1, rows);
  ctx.beat("dispatch of gradients");
  const Event arrived = dispatcher.dispatch(ctx.stream, saved.plan, dout, saved.routing.weight,
                                            dout_rows, row_weight);
  ctx.stream.poll_between_tasks(arrived);
  TensorView dh_shared;
  if (shared_) {
    dh_shared = ctx.scratch.allocate(compute, h.rows, hidden);
    backward_shared(ctx, params, dh_shared, dout, h, saved);
  }
  const std::int64_t u = shape_.gate_up_size();
  const TensorView dx = ctx.rows.allocate(compute, rows, hidden);
  const TensorView drow_weight = ctx.rows.allocate(acc, 1, rows);
  const TensorView dy = ctx.scratch.allocate(compute, padded, hidden, ffn_row_stride(hidden));
  const TensorView dgate_up = ctx.scratch.allocate(compute, padded, u, ffn_row_stride(u));
  const FfnAdapters::Rows v = adapters_.allocate(ctx.scratch, padded, compute);
  const auto experts = [&](std::span<const Segment> segments) {
    ffn_backward(ctx.stream, {.dx = dx,
                              .drow_weight = drow_weight,
                              .dy = dy,
                              .dgate_up = dgate_up,
                              .dout = dout_rows,
                              .row_weight = row_weight,
                              .y = saved.y,
                              .gate_up = saved.gate_up,
                              .weights = expert_weights(params),
                              .shape = shape_,
                              .segments = segments,
                              .low_rank = adapters_.views(params, v)});
  };
  // As in the forward pass; the weights' gradients are what hides the way back.
  experts(saved.plan.own_segments);
  ctx.stream.wait(arrived);
  experts(saved.plan.other_segments);
  ctx.beat("combine of gradients");
  SlotRows slots;
  const Event returned = dispatcher.combine(ctx.stream, saved.plan, dx, drow_weight, slots);
  ctx.stream.poll_between_tasks(returned);
  add_expert_leaves(ctx, params, dy, dgate_up, v, saved);
  ctx.stream.wait(returned);
  const TensorView dgate = ctx.scratch.allocate(acc, h.rows, hidden);
  gate_.backward(ctx, params, dgate, slots.scalars, h, saved.routing);
  weighted_sum(ctx.stream, {.out = dh,
                            .slot_rows = slots.rows.data(),
                            .slots_per_token = gate_.num_slots(),
                            .addend1 = dgate,
                            .addend2 = shared_ ? ConstTensorView(dh_shared) : ConstTensorView()});
  dispatcher.finish_combine();
}

void MoeLayer::allocate_backward_scratch(Arena& arena, Arena& row_memory, std::int64_t num_tokens,
                                         std::int64_t rows, std::int64_t padded,
                                         DType compute) const {
  const ArenaScope scope(arena);
  const ArenaScope rows_scope(row_memory);
  const DType acc = accumulate_dtype(compute);
  const std::int64_t h = model_.hidden_size;
  row_memory.allocate(compute, 2 * rows + kWgradRowPadding, h);
  row_memory.allocate(acc, 2, rows);
  row_memory.allocate_bytes(1 << 10);  // rounding of the four pieces to the arena's alignment
  arena.allocate(compute, padded, ffn_row_stride(h));
  arena.allocate(compute, padded, ffn_row_stride(shape_.gate_up_size()));
  adapters_.allocate(arena, padded, compute);
  // The gate, the shared expert and its gate on tokens.
  const std::int64_t tokens = padded_rows(num_tokens) + kWgradRowPadding;
  arena.allocate(acc, tokens, 2 * h + 1);
  gate_.allocate_scratch(arena, num_tokens, compute);
  if (shared_) {
    arena.allocate(compute, tokens,
                   3 * h + ffn_row_stride(h) + ffn_row_stride(shared_->shape().gate_up_size()));
    shared_->allocate_adapter_scratch(arena, num_tokens, compute);
  }
  arena.allocate_bytes(1 << 14);  // rounding of the pieces above to the arena's alignment
}

std::vector<GemmShape> MoeLayer::gemm_shapes(std::int64_t min_tokens, std::int64_t max_tokens,
                                             std::int64_t max_segment_rows, DType compute,
                                             bool training) const {
  std::vector<GemmShape> shapes = gate_.gemm_shapes(min_tokens, max_tokens, compute, training);
  const auto append = [&](const std::vector<GemmShape>& more) {
    shapes.insert(shapes.end(), more.begin(), more.end());
  };
  append(ffn_gemm_shapes(shape_, compute, max_segment_rows, training));
  adapters_.append_gemm_shapes(shape_, compute, max_segment_rows, training, shapes);
  if (shared_) append(shared_->gemm_shapes(max_tokens, compute, training));
  if (shared_gate_.valid() && training) {
    const DType acc = accumulate_dtype(compute);
    append(gradient_shapes({.dtype = acc,
                            .result_dtype = acc,
                            .out = 1,
                            .in = model_.hidden_size,
                            .x_stride = model_.hidden_size,
                            .y_stride = 1,
                            .min_rows = min_tokens,
                            .max_rows = max_tokens}));
  }
  return shapes;
}

}  // namespace arcus
