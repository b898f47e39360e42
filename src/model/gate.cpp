#include "src/model/gate.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "kernels/elementwise.hpp"
#include "src/model/balance_state.hpp"

namespace arcus {

Gate::Gate(const ModelConfig& model, const RoutingConfig& routing, const std::string& prefix,
           ParamRegistry& registry)
    : model_(model), routing_(routing) {
  const auto add = [&](const char* name, std::vector<std::int64_t> shape, ParamInit init,
                       std::int64_t leaves = 1) {
    return registry.add({.name = prefix + "gate." + name,
                         .shape = std::move(shape),
                         .keep_accumulate_type = true,
                         .init = init,
                         .leaves_per_micro_batch = leaves});
  };
  const std::int64_t e = model.num_experts;
  const bool cosine = find_score(routing.score).cosine;
  // The cosine's leaf comes in two pieces.
  weight_ = add("weight", {e, model.hidden_size}, ParamInit::normal, cosine ? 2 : 1);
  if (routing.gate_bias) bias_ = add("bias", {e}, ParamInit::zeros);
  if (cosine) temperature_ = add("temperature", {1}, ParamInit::ones);
  if (find_select(routing.select).predicts) {
    predictor_.emplace(prefix + "gate.", e, model.hidden_size, registry);
  }
  if (routing.noise > 0)
    noise_weight_ = add("noise_weight", {e, model.hidden_size}, ParamInit::zeros);
}

/// Whether the logits' input is kept apart from x: widened, jittered or normalized.
bool Gate::keeps_wide(DType compute) const {
  return accumulate_dtype(compute) != compute || routing_.jitter > 0 || temperature_.valid();
}

Routing Gate::allocate(Arena& arena, std::int64_t num_tokens, DType compute) const {
  const DType acc = accumulate_dtype(compute);
  const std::int64_t e = model_.num_experts;
  const std::int64_t h = model_.hidden_size;
  const std::int64_t slots = num_slots();
  Routing r;
  if (keeps_wide(compute)) r.x_wide = allocate_padded(arena, acc, num_tokens, h);
  r.z = arena.allocate(acc, num_tokens, e);
  r.s = arena.allocate(acc, num_tokens, e);
  r.lse = arena.allocate(acc, num_tokens, 1);
  r.topk_idx = arena.allocate(DType::i32, num_tokens, slots);
  r.expert_of_slot = arena.allocate(DType::i32, num_tokens, slots);
  r.weight = arena.allocate(acc, num_tokens, slots);
  if (aux_coefficient(routing_, AuxScope::micro_batch) > 0) r.fraction = arena.allocate(acc, 1, e);
  if (aux_coefficient(routing_, AuxScope::sequence) > 0) {
    // As many sequences as tokens at most.
    r.fraction_sequence = arena.allocate(acc, std::max<std::int64_t>(1, num_tokens), e);
  }
  if (aux_coefficient(routing_, AuxScope::global) > 0)
    r.fraction_global = arena.allocate(acc, 1, e);
  if (routing_.importance_loss > 0) r.dimportance = arena.allocate(DType::f64, 1, e);
  if (routing_.load_loss > 0) {
    r.dload = arena.allocate(DType::f64, 1, e);
    r.z_clean = arena.allocate(acc, num_tokens, e);
  }
  if (noise_weight_.valid()) r.noise_logits = arena.allocate(acc, num_tokens, e);
  if (predictor_) r.predictor = arena.allocate(acc, num_tokens, e);
  if (temperature_.valid()) {
    r.inv_norm = arena.allocate(acc, num_tokens, 1);
    r.cosine = arena.allocate(acc, num_tokens, e);
    r.w_hat = arena.allocate(acc, e, h);
    r.w_inv_norm = arena.allocate(acc, e, 1);
  }
  return r;
}

ConstTensorView Gate::input_of(ConstTensorView x, const Routing& routing) const {
  return routing.x_wide.data != nullptr ? ConstTensorView(routing.x_wide) : x;
}

void Gate::logits(PassContext& ctx, const ParamStore& params, ConstTensorView x,
                  Routing& routing) const {
  const GateContext gate{ctx, model_, routing_, routing};
  const std::int64_t flag_key = forward_flag_key(ctx, params, weight_);
  const bool jitters = routing_.jitter > 0 && ctx.training;
  if (jitters) {
    jitter(ctx.stream, {.y = routing.x_wide,
                        .x = x,
                        .amount = routing_.jitter,
                        .draws = gate.draws("gate jitter")});
  }
  if (temperature_.valid()) {
    normalize_rows(ctx.stream, {.y = routing.x_wide,
                                .inv_norm = routing.inv_norm,
                                .x = jitters ? ConstTensorView(routing.x_wide) : x});
    normalize_rows(
        ctx.stream,
        {.y = routing.w_hat, .inv_norm = routing.w_inv_norm, .x = params.values(weight_)});
  }
  // Else the product itself widens x, where that is needed.
  const bool prepared = jitters || temperature_.valid();
  const TensorView bias = bias_.valid() ? params.values(bias_) : TensorView();
  gate_logits(ctx.stream, {.z = routing.z,
                           .x_wide = routing.x_wide,
                           .x = prepared ? ConstTensorView(routing.x_wide) : x,
                           .weight = temperature_.valid() ? routing.w_hat : params.values(weight_),
                           .bias = temperature_.valid() ? TensorView() : bias,
                           .flag = &params.bad_leaf(),
                           .flag_key = flag_key});
  if (temperature_.valid()) {
    cosine_logits(ctx.stream, {.z = routing.z,
                               .cosine = routing.cosine,
                               .temperature = params.values(temperature_),
                               .bias = bias});
  }
  if (predictor_) predictor_->forward(ctx, params, routing.predictor, input_of(x, routing));
  if (!noise_weight_.valid() || !ctx.training) return;
  if (routing.z_clean.data != nullptr) cast(ctx.stream, {.y = routing.z_clean, .x = routing.z});
  gate_logits(ctx.stream, {.z = routing.noise_logits,
                           .x = input_of(x, routing),
                           .weight = params.values(noise_weight_),
                           .flag = &params.bad_leaf(),
                           .flag_key = flag_key});
  gate_noise(ctx.stream, {.z = routing.z,
                          .n = routing.noise_logits,
                          .amount = routing_.noise,
                          .draws = gate.draws("gate noise")});
}

namespace {

/// Tokens from `first` on go to no expert.
void leave_out_padding(const Routing& routing, std::int64_t first) {
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
  const std::int64_t tokens = ctx.batch.num_real_tokens();
  Routing real = routing.first_tokens(tokens);
  logits(ctx, params, x.row_range(0, tokens), real);
  gate_scores(
      ctx.stream,
      {.s = real.s, .lse = real.lse, .z = real.z, .score = find_score(routing_.score).score});
  if (!replay) select_and_drop(ctx, real);
  combine_weights(ctx.stream, {.weight = real.weight,
                               .s = real.s,
                               .topk_idx = real.topk_idx,
                               .expert_of_slot = real.expert_of_slot,
                               .renormalize = routing_.renormalize,
                               .renormalize_after_drop = routing_.renormalize_after_drop,
                               .scale = routing_.routed_scaling_factor});
  if (ctx.training) report(ctx, real);
  routing.capacity = real.capacity;
  leave_out_padding(routing, tokens);
  if (!replay && ctx.observer != nullptr && *ctx.observer) {
    (*ctx.observer)(ctx.layer, ctx.batch, routing);
  }
}

void Gate::select_and_drop(PassContext& ctx, Routing& routing) const {
  const ArenaScope scope(ctx.scratch);
  const std::int64_t tokens = routing.z.rows;
  const std::int64_t slots = num_slots();
  const TensorView wanted = ctx.scratch.allocate(DType::i32, tokens, slots);
  const bool partly = find_select(routing_.select).select({ctx, model_, routing_, routing}, wanted);
  routing.capacity =
      expert_capacity(ctx.training ? routing_.capacity_factor : routing_.eval_capacity_factor,
                      routing_.min_capacity, model_.topk, tokens, model_.num_experts);
  const TensorView demand = ctx.scratch.allocate(DType::i64, 1, model_.num_experts);
  apply_capacity(
      ctx.stream,
      {.expert_of_slot = routing.expert_of_slot,
       .demand = demand,
       .scratch =
           ctx.scratch.allocate(DType::i64, 1, 2 * std::max(tokens * slots, model_.num_experts)),
       .wanted = partly ? wanted : routing.topk_idx,
       .s = routing.s,
       .num_experts = model_.num_experts,
       // Experts that chose their tokens themselves have kept to it already.
       .capacity = ctx.training && find_select(routing_.select).predicts ? 0 : routing.capacity,
       .policy = routing_.drop_policy == "probs" ? DropPolicy::probs : DropPolicy::position});
  ctx.stats.routed[static_cast<std::size_t>(ctx.layer)] = tokens;
  const auto* kept = routing.expert_of_slot.as<std::int32_t>();
  const auto* count = demand.as<std::int64_t>();
  std::copy_n(count, model_.num_experts, ctx.stats.demand.begin() + ctx.layer * model_.num_experts);
  const std::int64_t asked = std::accumulate(count, count + model_.num_experts, std::int64_t{0});
  const std::int64_t refused = std::count(kept, kept + tokens * slots, -1);
  // Choices that were not asked for are no drops.
  ctx.stats.dropped[static_cast<std::size_t>(ctx.layer)] = asked - (tokens * slots - refused);
}

void Gate::report(PassContext& ctx, Routing& routing) const {
  const auto layer = static_cast<std::size_t>(ctx.layer);
  double z_loss = 0;
  gate_statistics(ctx.stream,
                  {.z_loss = &z_loss,
                   .entropy = &ctx.stats.entropy_sum[layer],
                   .counts = {ctx.stats.score_counts.data() + ctx.layer * model_.num_experts,
                              DType::i64, 1, model_.num_experts},
                   .s = routing.s,
                   .lse = routing.lse,
                   .topk = model_.topk});
  ctx.stats.z_loss[layer] = routing_.z_loss * ctx.batch.weight * z_loss;
  ctx.stats.aux_loss[layer] = ctx.stats.predictor_loss[layer] = 0;
  if (predictor_) predictor_->report(ctx, routing.predictor, routing.topk_idx);
  for (const BalanceRow& row : balance_table()) {
    if (row.active(routing_)) row.forward({ctx, model_, routing_, routing});
  }
}

void Gate::backward(PassContext& ctx, const ParamStore& params, TensorView dx,
                    ConstTensorView dweight, ConstTensorView x, const Routing& routing) const {
  const ArenaScope scope(ctx.scratch);
  const TensorView dz =
      allocate_padded(ctx.scratch, routing.z.dtype, routing.z.rows, model_.num_experts);
  combine_weights_backward(ctx.stream, {.ds = dz,
                                        .dweight = dweight,
                                        .s = routing.s,
                                        .topk_idx = routing.topk_idx,
                                        .expert_of_slot = routing.expert_of_slot,
                                        .renormalize = routing_.renormalize,
                                        .renormalize_after_drop = routing_.renormalize_after_drop,
                                        .scale = routing_.routed_scaling_factor});
  Routing view = routing;
  for (const BalanceRow& row : balance_table()) {
    if (row.active(routing_) && row.backward_scores != nullptr) {
      row.backward_scores({ctx, model_, routing_, view}, dz);
    }
  }
  gate_scores_backward(ctx.stream, {.dz = dz,
                                    .s = routing.s,
                                    .lse = routing.lse,
                                    .z = routing.z,
                                    .score = find_score(routing_.score).score,
                                    .z_coeff = routing_.z_loss * ctx.batch.weight});
  logits_backward(ctx, params, dx, dz, x, routing);
}

void Gate::logits_backward(PassContext& ctx, const ParamStore& params, TensorView dx, TensorView dz,
                           ConstTensorView x, const Routing& routing) const {
  const ArenaScope scope(ctx.scratch);
  const std::int64_t e = model_.num_experts;
  const ConstTensorView input = input_of(x, routing);
  // The noise's width sees the gradient of the scores alone, the load loss adds to both.
  TensorView dnoise;
  if (noise_weight_.valid()) {
    dnoise = allocate_padded(ctx.scratch, dz.dtype, dz.rows, e);
    noise_backward(ctx, dnoise, dz, routing);
  }
  add_leaves(ctx, params, dz, input, {}, bias_);
  TensorView dy = dz;  // what the weight's gradient is made of
  if (temperature_.valid()) {
    dy = allocate_padded(ctx.scratch, dz.dtype, dz.rows, e);
    cosine_logits_backward(ctx.stream, {.dz = dz,
                                        .e_scaled = dy,
                                        .dtemperature = params.sums(temperature_),
                                        .dweight = params.sums(weight_),
                                        .cosine = routing.cosine,
                                        .temperature = params.values(temperature_),
                                        .w_hat = routing.w_hat,
                                        .w_inv_norm = routing.w_inv_norm,
                                        .scratch = ctx.scratch.allocate(
                                            DType::f64, 2, std::max(e, model_.hidden_size)),
                                        .micro_batch = ctx.batch.number});
  }
  linear_dgrad(ctx.stream,
               {.dx = dx,
                .dy = dz,
                .weight = temperature_.valid() ? routing.w_hat : params.values(weight_)});
  add_leaves(ctx, params, dy, input, weight_);
  if (predictor_) predictor_->backward(ctx, params, routing.predictor, routing.topk_idx, input);
  if (noise_weight_.valid()) {
    const TensorView through_noise = ctx.scratch.allocate(dx.dtype, dx.rows, dx.cols);
    linear_dgrad(ctx.stream,
                 {.dx = through_noise, .dy = dnoise, .weight = params.values(noise_weight_)});
    add(ctx.stream, {.y = dx, .a = dx, .b = through_noise});
    add_leaves(ctx, params, dnoise, input, noise_weight_);
  }
  if (temperature_.valid()) {
    normalize_rows_backward(
        ctx.stream, {.dx = dx, .dy = dx, .y = routing.x_wide, .inv_norm = routing.inv_norm});
  }
  if (routing_.jitter > 0) {
    Routing view = routing;
    jitter(ctx.stream, {.y = dx,
                        .x = dx,
                        .amount = routing_.jitter,
                        .draws = GateContext{ctx, model_, routing_, view}.draws("gate jitter")});
  }
}

void Gate::noise_backward(PassContext& ctx, TensorView dnoise, TensorView dz,
                          const Routing& routing) const {
  Routing view = routing;
  const TokenDraws draws = GateContext{ctx, model_, routing_, view}.draws("gate noise");
  fill_zero(ctx.stream, {.y = dnoise});
  gate_noise_backward(ctx.stream, {.dn = dnoise,
                                   .dz = dz,
                                   .n = routing.noise_logits,
                                   .amount = routing_.noise,
                                   .draws = draws});
  if (routing_.load_loss == 0) return;
  load_loss_backward(ctx.stream, {.dz = dz,
                                  .dn = dnoise,
                                  .derivative = routing.dload,
                                  .z_clean = routing.z_clean,
                                  .z_noisy = routing.z,
                                  .n = routing.noise_logits,
                                  .amount = routing_.noise,
                                  .topk = model_.topk,
                                  .coeff = routing_.load_loss * ctx.batch.weight,
                                  .draws = draws});
}

void Gate::allocate_scratch(Arena& arena, std::int64_t num_tokens, DType compute) const {
  const DType acc = accumulate_dtype(compute);
  const std::int64_t e = model_.num_experts;
  const std::int64_t tokens = padded_rows(num_tokens) + kWgradRowPadding;
  const std::int64_t slots = std::max(num_tokens * num_slots(), e);
  arena.allocate(DType::i64, 3, slots + 64);  // capacity and what is wanted
  arena.allocate(DType::f64, 1, 2 * e);       // losses
  if (routing_.select == "sinkhorn") {
    arena.allocate(DType::f64, 1, sinkhorn_scratch(num_tokens, e));
  }
  arena.allocate(acc, tokens, 4 * e);
  arena.allocate(DType::f64, 2, std::max(e, model_.hidden_size));
  if (noise_weight_.valid()) arena.allocate(acc, tokens, model_.hidden_size);
  arena.allocate_bytes(1 << 12);  // rounding of the pieces to the arena's alignment
}

std::vector<GemmShape> Gate::gemm_shapes(std::int64_t min_tokens, std::int64_t max_tokens,
                                         DType compute, bool training) const {
  const DType acc = accumulate_dtype(compute);
  const std::int64_t e = model_.num_experts;
  const std::int64_t h = model_.hidden_size;
  if (!training) return {};
  return gradient_shapes({.dtype = acc,
                          .result_dtype = acc,
                          .out = e,
                          .in = h,
                          .x_stride = h,
                          .y_stride = e,
                          .min_rows = min_tokens,
                          .max_rows = max_tokens});
}

}  // namespace arcus
