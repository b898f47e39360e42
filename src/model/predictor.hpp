#pragma once

#include <string>

#include "src/model/leaves.hpp"

namespace arcus {

/// A linear layer that learns what a selection which looks at later tokens will choose, so that
/// evaluation and generation can do without them (ROUTING.md, "Predictor"). Its input is held
/// fixed: it reaches nothing but its own parameters.
class Predictor {
 public:
  /// Parameters `prefix` + "predictor.weight" [outputs, inputs] and ".bias" [outputs].
  Predictor(const std::string& prefix, std::int64_t outputs, std::int64_t inputs,
            ParamRegistry& registry);

  /// logits [T, outputs] of x [T, inputs], all in the accumulate type.
  void forward(PassContext& ctx, const ParamStore& params, TensorView logits,
               ConstTensorView x) const;
  /// Adds the loss against what was chosen (`topk_idx` as predictor_loss takes it) to the layer's
  /// statistics.
  void report(PassContext& ctx, ConstTensorView logits, ConstTensorView topk_idx) const;
  void backward(PassContext& ctx, const ParamStore& params, ConstTensorView logits,
                ConstTensorView topk_idx, ConstTensorView x) const;

 private:
  ParamRef weight_, bias_;
};

}  // namespace arcus
