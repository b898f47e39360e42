#include "src/model/leaves.hpp"

#include <algorithm>

#include "kernels/gemm.hpp"

namespace arcus {

void add_leaves(PassContext& ctx, const ParamStore& params, ConstTensorView dy, ConstTensorView x,
                ParamRef weight, ParamRef bias) {
  if (const GradientSum sum = params.sums(weight); sum.sum != nullptr) {
    linear_wgrad(ctx.stream, {.dweight = sum, .dy = dy, .x = x, .micro_batch = ctx.batch.number});
  }
  if (const GradientSum sum = params.sums(bias); sum.sum != nullptr) {
    bias_grad(ctx.stream, {.dbias = sum, .dy = dy, .micro_batch = ctx.batch.number});
  }
}

std::int64_t forward_flag_key(const PassContext& ctx, const ParamStore& params, ParamRef weight) {
  return bad_leaf_key(params.registry().row(weight).first_unit_idx,
                      std::max<std::int64_t>(0, ctx.batch.number));
}

}  // namespace arcus
