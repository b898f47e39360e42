#include "src/model/norm.hpp"

#include "kernels/norm.hpp"

namespace arcus {

Norm::Norm(const ModelConfig& model, const std::string& name, ParamRegistry& registry)
    : eps_(model.norm_eps),
      gain_(registry.add({.name = name + ".weight",
                          .shape = {model.hidden_size},
                          .keep_accumulate_type = true,
                          .init = ParamInit::ones})) {
  if (model.norm != "layer") return;
  bias_ = registry.add({.name = name + ".bias",
                        .shape = {model.hidden_size},
                        .keep_accumulate_type = true,
                        .init = ParamInit::zeros});
}

TensorView Norm::allocate(Arena& arena, std::int64_t num_tokens, DType compute) const {
  return arena.allocate(accumulate_dtype(compute), num_tokens, bias_.valid() ? 2 : 1);
}

void Norm::forward(PassContext& ctx, const ParamStore& params, TensorView y, TensorView stats,
                   ConstTensorView x) const {
  if (!bias_.valid()) {
    return rmsnorm_forward(
        ctx.stream, {.y = y, .inv_rms = stats, .x = x, .gain = params.values(gain_), .eps = eps_});
  }
  layernorm_forward(ctx.stream, {.y = y,
                                 .mean = stats.col_range(0, 1),
                                 .inv_std = stats.col_range(1, 1),
                                 .x = x,
                                 .gain = params.values(gain_),
                                 .bias = params.values(bias_),
                                 .eps = eps_});
}

void Norm::backward(PassContext& ctx, const ParamStore& params, TensorView dx, ConstTensorView dy,
                    ConstTensorView residual, ConstTensorView x, ConstTensorView stats) const {
  if (!bias_.valid()) {
    return rmsnorm_backward(ctx.stream, {.dx = dx,
                                         .dgain = params.sums(gain_),
                                         .dy = dy,
                                         .residual = residual,
                                         .x = x,
                                         .inv_rms = stats,
                                         .gain = params.values(gain_),
                                         .micro_batch = ctx.batch.number});
  }
  layernorm_backward(ctx.stream, {.dx = dx,
                                  .dgain = params.sums(gain_),
                                  .dbias = params.sums(bias_),
                                  .dy = dy,
                                  .residual = residual,
                                  .x = x,
                                  .mean = stats.col_range(0, 1),
                                  .inv_std = stats.col_range(1, 1),
                                  .gain = params.values(gain_),
                                  .micro_batch = ctx.batch.number});
}

}  // namespace arcus
