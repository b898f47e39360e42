#pragma once

#include "src/model/param_registry.hpp"
#include "src/model/pass.hpp"

namespace arcus {

/// Adds the micro-batch's gradient of a weight [out, in], dy^T x, and of its bias [out], the sum of
/// dy's rows. A parameter that is not there or frozen is passed over.
void add_leaves(PassContext& ctx, const ParamStore& params, ConstTensorView dy, ConstTensorView x,
                ParamRef weight, ParamRef bias = {});

/// Under which a kernel reports logits of `weight` that are not finite: where a step first went
/// bad.
std::int64_t forward_flag_key(const PassContext& ctx, const ParamStore& params, ParamRef weight);

}  // namespace arcus
