#pragma once

#include <string>

#include "src/model/config.hpp"
#include "src/model/param_registry.hpp"
#include "src/model/pass.hpp"

namespace arcus {

/// The norm of whole rows that the configuration asks for: RMSNorm, or LayerNorm with a bias. T
/// tokens, H hidden.
class Norm {
 public:
  /// Parameters NAME.weight and, of a LayerNorm, NAME.bias.
  Norm(const ModelConfig& model, const std::string& name, ParamRegistry& registry);

  /// What backward needs of forward, accumulate type: [T, 1] of 1 / rms, or [T, 2] of mean and
  /// 1 / deviation.
  TensorView allocate(Arena& arena, std::int64_t num_tokens, DType compute) const;
  /// y [T, H] from x [T, H]; fills `stats`.
  void forward(PassContext& ctx, const ParamStore& params, TensorView y, TensorView stats,
               ConstTensorView x) const;
  /// dx [T, H], which may be dy, from dy [T, H], with `residual` [T, H] (or empty) added; adds the
  /// leaves.
  void backward(PassContext& ctx, const ParamStore& params, TensorView dx, ConstTensorView dy,
                ConstTensorView residual, ConstTensorView x, ConstTensorView stats) const;

 private:
  double eps_;
  ParamRef gain_, bias_;
};

}  // namespace arcus
