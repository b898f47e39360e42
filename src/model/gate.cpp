#include "src/model/gate.hpp"

#include <algorithm>
#include <cstring>

namespace arcus {

Gate::Gate(const ModelConfig& model, const RoutingConfig& routing, const std::string& prefix,
           ParamRegistry& registry)
    : model_(model), routing_(routing) {
  weight_ = registry.add({.name = prefix + "gate.weight",
                          .shape = {model.num_experts, model.hidden_size},
                          .keep_accumulate_type = true});
  if (routing.gate_bias) {
    bias_ = registry.add({.name = prefix + "gate.bias",
                          .shape = {model.num_experts},
                          .keep_accumulate_type = true,
                          .init = ParamInit::zeros});
  }
}

Routing Gate::allocate(Arena& arena, std::int64_t num_tokens, DType compute) const {
  const DType acc = accumulate_dtype(compute);
  const std::int64_t e = model_.num_experts;
  const std::int64_t k = model_.topk;
  Routing r;
  if (acc != compute) r.x_wide = allocate_padded(arena, acc, num_tokens, model_.hidden_size);
  r.z = arena.allocate(acc, num_tokens, e);
  r.s = arena.allocate(acc, num_tokens, e);
  r.lse = arena.allocate(acc, num_tokens, 1);
  r.topk_idx = arena.allocate(DType::i32, num_tokens, k);
  r.expert_of_slot = arena.allocate(DType::i32, num_tokens, k);
  r.weight = arena.allocate(acc, num_tokens, k);
  r.fraction = arena.allocate(acc, std::max<std::int64_t>(1, num_tokens), e);
  return r;
}

namespace {

/// Tokens from `first` on go to no expert.
void leave_out_padding(Routing& routing, std::int64_t first) {
  const std::int64_t count = routing.topk_idx.rows - first;
  if (count == 0) return;
  for (const TensorView& view : {routing.topk_idx, routing.expert_of_slot}) {
    std::ranges::fill(view.row_range(first, count).span<std::int32_t>(), -1);
  }
  const TensorView weight = routing.weight.row_range(first, count);
  std::memset(weight.data, 0, static_cast<std::size_t>(weight.size()) * size_of(weight.dtype));
}

}  // namespace

void Gate::forward(PassContext& ctx, const ParamStore& params, ConstTensorView x, Routing& routing,
                   bool replay) const {
  gate_logits(ctx.stream, {.z = routing.z,
                           .x_wide = routing.x_wide,
                           .x = x,
                           .weight = params.values(weight_),
                           .bias = bias_.valid() ? params.values(bias_) : TensorView(),
                           .flag = &params.bad_leaf(),
                           .flag_key = bad_leaf_key(params.registry().row(weight_).first_unit_idx,
                                                    std::max<std::int64_t>(0, ctx.batch.number))});
  gate_scores(ctx.stream, {.s = routing.s,
                           .lse = routing.lse,
                           .z = routing.z,
                           .score = find_score(routing_.score).score});
  Routing real = routing.first_tokens(ctx.batch.num_real_tokens());
  if (!replay) select_and_drop(ctx, real);
  combine_weights(ctx.stream, {.weight = real.weight,
                               .s = real.s,
                               .topk_idx = real.topk_idx,
                               .expert_of_slot = real.expert_of_slot,
                               .renormalize = routing_.renormalize,
                               .renormalize_after_drop = routing_.renormalize_after_drop,
                               .scale = routing_.routed_scaling_factor});
  report(ctx, real);
  routing.capacity = real.capacity;
  routing.fraction = real.fraction;
  leave_out_padding(routing, real.z.rows);
  if (!replay && ctx.observer != nullptr && *ctx.observer) {
    (*ctx.observer)(ctx.layer, ctx.batch, routing);
  }
}

void Gate::select_and_drop(PassContext& ctx, Routing& routing) const {
  find_select(routing_.select).select(ctx, model_, routing_, routing);
  const std::int64_t tokens = routing.z.rows;
  routing.capacity =
      expert_capacity(ctx.training ? routing_.capacity_factor : routing_.eval_capacity_factor,
                      routing_.min_capacity, model_.topk, tokens, model_.num_experts);
  const ArenaScope scope(ctx.scratch);
  const TensorView demand = ctx.scratch.allocate(DType::i64, 1, model_.num_experts);
  apply_capacity(
      ctx.stream,
      {.expert_of_slot = routing.expert_of_slot,
       .demand = demand,
       .scratch = ctx.scratch.allocate(DType::i64, 1,
                                       2 * std::max(tokens * model_.topk, model_.num_experts)),
       .topk_idx = routing.topk_idx,
       .s = routing.s,
       .num_experts = model_.num_experts,
       .capacity = routing.capacity,
       .policy = routing_.drop_policy == "probs" ? DropPolicy::probs : DropPolicy::position});
  const auto layer = static_cast<std::size_t>(ctx.layer);
  std::copy_n(demand.as<std::int64_t>(), model_.num_experts,
              ctx.stats.demand.begin() + ctx.layer * model_.num_experts);
  const auto* kept = routing.expert_of_slot.as<std::int32_t>();
  ctx.stats.dropped[layer] = std::count(kept, kept + tokens * model_.topk, -1);
}

void Gate::report(PassContext& ctx, Routing& routing) const {
  const ArenaScope scope(ctx.scratch);
  const std::int64_t group = aux_group_tokens(routing_, ctx.batch);
  if (group > 0)
    routing.fraction = routing.fraction.row_range(0, (routing.z.rows + group - 1) / group);
  const auto layer = static_cast<std::size_t>(ctx.layer);
  BalanceValues values;
  gate_statistics(ctx.stream, {.aux = &values.aux,
                               .z_loss = &values.z_loss,
                               .entropy = &ctx.stats.entropy_sum[layer],
                               .fraction = routing.fraction,
                               .scratch = ctx.scratch.allocate(
                                   DType::f64, 1, 2 * model_.num_experts + model_.topk),
                               .s = routing.s,
                               .lse = routing.lse,
                               .topk = model_.topk,
                               .tokens_per_group = group});
  for (const BalanceRow& row : balance_table()) {
    row.report(routing_, ctx.batch, values, layer, ctx.stats);
  }
}

void Gate::backward(PassContext& ctx, const ParamStore& params, TensorView dx,
                    ConstTensorView dweight, ConstTensorView x, const Routing& routing) const {
  const ArenaScope scope(ctx.scratch);
  const std::int64_t tokens = routing.z.rows;
  const TensorView dz = allocate_padded(ctx.scratch, routing.z.dtype, tokens, model_.num_experts);
  GateBackward args{.dz = dz,
                    .dweight = dweight,
                    .s = routing.s,
                    .lse = routing.lse,
                    .z = routing.z,
                    .topk_idx = routing.topk_idx,
                    .expert_of_slot = routing.expert_of_slot,
                    .fraction = routing.fraction,
                    .score = find_score(routing_.score).score,
                    .renormalize = routing_.renormalize,
                    .renormalize_after_drop = routing_.renormalize_after_drop,
                    .scale = routing_.routed_scaling_factor,
                    .tokens_per_group = aux_group_tokens(routing_, ctx.batch)};
  for (const BalanceRow& row : balance_table()) row.add_gradient(routing_, ctx.batch, args);
  gate_backward(ctx.stream, args);
  linear_dgrad(ctx.stream, {.dx = dx, .dy = dz, .weight = params.values(weight_)});
  const ConstTensorView wide = routing.x_wide.data != nullptr ? routing.x_wide : x;
  if (const GradientSum sum = params.sums(weight_); sum.sum != nullptr) {
    linear_wgrad(ctx.stream,
                 {.dweight = sum, .dy = dz, .x = wide, .micro_batch = ctx.batch.number});
  }
  if (!bias_.valid()) return;
  if (const GradientSum sum = params.sums(bias_); sum.sum != nullptr) {
    bias_grad(ctx.stream, {.dbias = sum, .dy = dz, .micro_batch = ctx.batch.number});
  }
}

std::vector<GemmShape> Gate::gemm_shapes(std::int64_t max_tokens, DType compute,
                                         bool training) const {
  const DType acc = accumulate_dtype(compute);
  const std::int64_t e = model_.num_experts;
  const std::int64_t h = model_.hidden_size;
  GemmShape shape{.kind = GemmKind::forward,
                  .dtype = acc,
                  .result_dtype = acc,
                  .out = e,
                  .in = h,
                  .x_stride = h,
                  .y_stride = e,
                  .min_rows = max_tokens,
                  .max_rows = max_tokens,
                  .bias = bias_.valid()};
  std::vector<GemmShape> shapes{shape};
  if (!training) return shapes;
  shape.bias = false;
  shape.kind = GemmKind::dgrad;
  shapes.push_back(shape);
  shape.kind = GemmKind::wgrad;
  shapes.push_back(shape);
  return shapes;
}

}  // namespace arcus
