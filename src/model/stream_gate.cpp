#include "src/model/stream_gate.hpp"

#include <algorithm>
#include <cmath>

#include "kernels/elementwise.hpp"
#include "kernels/permute.hpp"

namespace arcus {

StreamGate::StreamGate(const ModelConfig& model, const RoutingConfig& routing,
                       const std::string& prefix, ParamRegistry& registry)
    : hidden_size_(model.hidden_size), routing_(routing), row_(&find_stream(routing.stream)) {
  const auto add = [&](const char* name, std::vector<std::int64_t> shape, ParamInit init) {
    return registry.add({.name = prefix + "stream_gate." + name,
                         .shape = std::move(shape),
                         .keep_accumulate_type = true,
                         .init = init});
  };
  weight_ = add("weight", {1, 2 * hidden_size_}, ParamInit::normal);
  bias_ = add("bias", {1}, ParamInit::zeros);
  if (row_->predicts) predictor_.emplace(prefix + "stream_gate.", 1, 2 * hidden_size_, registry);
}

void StreamGate::allocate_kept(Arena& arena, std::int64_t num_tokens, Saved& saved) const {
  saved.chosen = arena.allocate(DType::i32, num_tokens, 1);
  saved.index = arena.allocate(DType::i32, 1, num_tokens);
  saved.ids = arena.allocate(DType::i32, 1, num_tokens);
  // As many sequences as tokens at most.
  saved.sequence_offsets = arena.allocate_array<std::int64_t>(num_tokens + 1);
  saved.sequence_weights = arena.allocate_array<double>(num_tokens);
}

void StreamGate::allocate_rest(Arena& arena, std::int64_t num_tokens, DType compute,
                               Saved& saved) const {
  const DType acc = accumulate_dtype(compute);
  saved.wide = allocate_padded(arena, acc, num_tokens, 2 * hidden_size_);
  saved.d = arena.allocate(acc, num_tokens, 1);
  saved.g = arena.allocate(acc, num_tokens, 1);
  if (row_->predicts) saved.predictor = arena.allocate(acc, num_tokens, 1);
}

void StreamGate::allocate_scratch(Arena& arena, std::int64_t num_tokens, DType compute) const {
  const DType acc = accumulate_dtype(compute);
  const std::int64_t tokens = padded_rows(num_tokens);
  arena.allocate(acc, tokens, 2 * hidden_size_ + 8);  // dwide, logits and their gradients
  arena.allocate(compute, tokens, 2 * hidden_size_);  // dout and the experts' gradient
  arena.allocate_bytes(num_tokens * std::int64_t{sizeof(void*)});
  arena.allocate_bytes(1 << 12);  // rounding of the pieces to the arena's alignment
}

void StreamGate::forward(PassContext& ctx, const ParamStore& params, ConstTensorView before,
                         ConstTensorView after, Saved& saved, bool replay) const {
  cast(ctx.stream, {.y = saved.wide.col_range(0, hidden_size_), .x = before});
  cast(ctx.stream, {.y = saved.wide.col_range(hidden_size_, hidden_size_), .x = after});
  gate_logits(ctx.stream, {.z = saved.d,
                           .x = saved.wide,
                           .weight = params.values(weight_),
                           .bias = params.values(bias_),
                           .flag = &params.bad_leaf(),
                           .flag_key = forward_flag_key(ctx, params, weight_)});
  if (predictor_) predictor_->forward(ctx, params, saved.predictor, saved.wide);
  const ArenaScope scope(ctx.scratch);
  gate_scores(ctx.stream, {.s = saved.g,
                           .lse = ctx.scratch.allocate(saved.d.dtype, saved.d.rows, 1),
                           .z = saved.d,
                           .score = Score::sigmoid});
  if (!replay) choose(ctx, saved);
}

void StreamGate::choose(PassContext& ctx, Saved& saved) const {
  const std::int64_t tokens = ctx.batch.num_real_tokens();
  const std::int64_t all = saved.chosen.rows;
  const TensorView chosen = saved.chosen.row_range(0, tokens);
  const TensorView g = saved.g.row_range(0, tokens);
  if (row_->predicts && ctx.training) {
    const ArenaScope scope(ctx.scratch);
    select_by_experts(
        ctx.stream, {.topk_idx = chosen,
                     .s = g,
                     .capacity = expert_capacity(routing_.stream_capacity_factor, 0, 1, tokens, 1),
                     .scratch = ctx.scratch.allocate(DType::i64, 1, 2)});
  } else if (row_->predicts) {
    select_above(ctx.stream, {.topk_idx = chosen, .p = saved.predictor.row_range(0, tokens)});
  } else {
    select_above(
        ctx.stream,
        {.topk_idx = chosen, .p = g, .threshold = row_->passes_all ? -1.0 : routing_.stream_theta});
  }
  std::fill_n(saved.chosen.as<std::int32_t>() + tokens, all - tokens, -1);
  std::int64_t count = 0;
  list_chosen(ctx.stream, {.index = saved.index, .count = &count, .chosen = saved.chosen});
  saved.index = saved.index.col_range(0, count);
  saved.ids = saved.ids.col_range(0, count);
  gather_rows(ctx.stream, {.y = {saved.ids.data, DType::i32, count, 1},
                           .x = {ctx.batch.ids.data, DType::i32, ctx.batch.ids.size(), 1},
                           .index = saved.index});
  const auto* index = saved.index.as<std::int32_t>();
  const auto& offsets = ctx.batch.sequence_offsets;
  saved.sequence_offsets = saved.sequence_offsets.first(offsets.size());
  for (std::size_t s = 0; s < offsets.size(); ++s) {
    saved.sequence_offsets[s] = std::lower_bound(index, index + count, offsets[s]) - index;
  }
  saved.sequence_weights =
      saved.sequence_weights.first(offsets.empty() ? std::size_t{0} : offsets.size() - 1);
  for (std::size_t s = 0; s < saved.sequence_weights.size(); ++s) {
    saved.sequence_weights[s] =
        static_cast<double>(offsets[s + 1] - offsets[s]) / static_cast<double>(tokens);
  }
}

MicroBatch StreamGate::second_level(const MicroBatch& batch, const Saved& saved) const {
  MicroBatch second = batch;
  second.num_seqs = 1;
  second.seq_len = saved.index.cols;
  second.num_padding_tokens = 0;
  second.sequence_offsets = saved.sequence_offsets;
  second.sequence_weights = saved.sequence_weights;
  second.ids = saved.ids;
  second.token_idx = saved.index;
  second.targets = second.position = second.first_key = {};
  return second;
}

void StreamGate::scatter(PassContext& ctx, TensorView out, ConstTensorView rows,
                         ConstTensorView weight, ConstTensorView addend1, ConstTensorView addend2,
                         const Saved& saved) const {
  const ArenaScope scope(ctx.scratch);
  const auto bytes = out.rows * std::int64_t{sizeof(void*)};
  auto* row_of_token = static_cast<const void**>(ctx.scratch.allocate_bytes(bytes));
  std::fill_n(row_of_token, out.rows, nullptr);
  const auto* index = saved.index.as<std::int32_t>();
  for (std::int64_t i = 0; i < rows.rows; ++i) {
    row_of_token[index[i]] = rows.row_range(i, 1).data;
  }
  weighted_sum(ctx.stream, {.out = out,
                            .slot_rows = row_of_token,
                            .weight = weight,
                            .slots_per_token = 1,
                            .addend1 = addend1,
                            .addend2 = addend2});
}

void StreamGate::merge(PassContext& ctx, TensorView out, ConstTensorView after,
                       ConstTensorView experts_out, const Saved& saved) const {
  scatter(ctx, out, experts_out, saved.g, after, {}, saved);
  if (ctx.training) report(ctx, saved);
}

void StreamGate::report(PassContext& ctx, const Saved& saved) const {
  const auto layer = static_cast<std::size_t>(ctx.layer);
  double mean = 0;
  column_mean(ctx.stream, {.mean = &mean, .x = saved.g});
  ctx.stats.stream_gate[layer] = ctx.batch.weight * mean;
  if (saved.g.rows > 0) {
    ctx.stats.aux_loss[layer] +=
        routing_.stream_target_loss * ctx.batch.weight * target_loss(ctx, saved, mean);
  }
  if (predictor_) predictor_->report(ctx, saved.predictor, saved.chosen);
}

/// Distance of the share that goes from its target; that share has no gradient.
double StreamGate::share_off_target(const Saved& saved) const {
  return static_cast<double>(saved.index.cols) / static_cast<double>(saved.g.rows) -
         routing_.stream_target_share;
}

double StreamGate::target_loss(PassContext& ctx, const Saved& saved, double mean_gate) const {
  if (!row_->holds_share) {
    const double off = mean_gate - routing_.stream_target_share;
    return off * off;
  }
  double mean_logit = 0;
  column_mean(ctx.stream, {.mean = &mean_logit, .x = saved.d});
  return share_off_target(saved) * mean_logit;
}

void StreamGate::backward(PassContext& ctx, const ParamStore& params, TensorView dexperts_out,
                          TensorView dwide, ConstTensorView dout, ConstTensorView experts_out,
                          const Saved& saved) const {
  const ArenaScope scope(ctx.scratch);
  const DType acc = saved.g.dtype;
  const std::int64_t chosen = saved.index.cols;
  const std::int64_t tokens = saved.g.rows;
  const TensorView dout_chosen = ctx.scratch.allocate(dout.dtype, chosen, hidden_size_);
  const TensorView d_chosen = ctx.scratch.allocate(acc, chosen, 1);
  const TensorView dd_chosen = ctx.scratch.allocate(acc, chosen, 1);
  gather_rows(ctx.stream, {.y = dout_chosen, .x = dout, .index = saved.index});
  gather_rows(ctx.stream, {.y = d_chosen, .x = saved.d, .index = saved.index});
  scale_rows_sigmoid_backward(ctx.stream, {.dx = dexperts_out,
                                           .dlogit = dd_chosen,
                                           .dout = dout_chosen,
                                           .x = experts_out,
                                           .logit = d_chosen});
  double mean = 0;
  column_mean(ctx.stream, {.mean = &mean, .x = saved.g});
  const double coeff = routing_.stream_target_loss * ctx.batch.weight;
  const bool shift = row_->holds_share && tokens > 0;
  const TensorView dd = allocate_padded(ctx.scratch, acc, tokens, 1);
  decision_backward(
      ctx.stream,
      {.dd = dd,
       .dd_chosen = dd_chosen,
       .index = saved.index,
       .g = saved.g,
       .dmean = row_->holds_share ? 0 : 2 * coeff * (mean - routing_.stream_target_share),
       .dshift = shift ? coeff * share_off_target(saved) : 0});
  add_leaves(ctx, params, dd, saved.wide, weight_, bias_);
  linear_dgrad(ctx.stream, {.dx = dwide, .dy = dd, .weight = params.values(weight_)});
  if (predictor_) predictor_->backward(ctx, params, saved.predictor, saved.chosen, saved.wide);
}

std::vector<GemmShape> StreamGate::gemm_shapes(std::int64_t max_tokens, DType compute,
                                               bool training) const {
  if (!training) return {};
  return gradient_shapes({.dtype = accumulate_dtype(compute),
                          .result_dtype = accumulate_dtype(compute),
                          .out = 1,
                          .in = 2 * hidden_size_,
                          .x_stride = 2 * hidden_size_,
                          .y_stride = 1,
                          .min_rows = max_tokens,
                          .max_rows = max_tokens});
}

}  // namespace arcus
