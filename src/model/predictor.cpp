#include "src/model/predictor.hpp"

#include <algorithm>

#include "kernels/balance.hpp"
#include "kernels/elementwise.hpp"
#include "kernels/gate.hpp"

namespace arcus {

Predictor::Predictor(const std::string& prefix, std::int64_t outputs, std::int64_t inputs,
                     ParamRegistry& registry) {
  const auto add = [&](const char* name, std::vector<std::int64_t> shape, ParamInit init) {
    return registry.add({.name = prefix + "predictor." + name,
                         .shape = std::move(shape),
                         .keep_accumulate_type = true,
                         .init = init});
  };
  weight_ = add("weight", {outputs, inputs}, ParamInit::normal);
  bias_ = add("bias", {outputs}, ParamInit::zeros);
}

void Predictor::forward(PassContext& ctx, const ParamStore& params, TensorView logits,
                        ConstTensorView x) const {
  gate_logits(ctx.stream, {.z = logits,
                           .x = x,
                           .weight = params.values(weight_),
                           .bias = params.values(bias_),
                           .flag = &params.bad_leaf(),
                           .flag_key = forward_flag_key(ctx, params, weight_)});
}

void Predictor::report(PassContext& ctx, ConstTensorView logits, ConstTensorView topk_idx) const {
  double loss = 0;
  predictor_loss(ctx.stream, {.loss = &loss, .logits = logits, .topk_idx = topk_idx});
  ctx.stats.predictor_loss[static_cast<std::size_t>(ctx.layer)] += ctx.batch.weight * loss;
}

void Predictor::backward(PassContext& ctx, const ParamStore& params, ConstTensorView logits,
                         ConstTensorView topk_idx, ConstTensorView x) const {
  const ArenaScope scope(ctx.scratch);
  const TensorView dlogits = allocate_padded(ctx.scratch, logits.dtype, logits.rows, logits.cols);
  predictor_loss(
      ctx.stream,
      {.dlogits = dlogits, .logits = logits, .topk_idx = topk_idx, .coeff = ctx.batch.weight});
  add_leaves(ctx, params, dlogits, x, weight_, bias_);
}

}  // namespace arcus
