#pragma once

#include <string>
#include <vector>

#include "kernels/ffn.hpp"
#include "src/model/config.hpp"
#include "src/model/lora.hpp"
#include "src/model/param_registry.hpp"
#include "src/model/pass.hpp"

namespace arcus {

/// The feed-forward of a model, `ff_size` wide.
FfnShape ffn_shape(const ModelConfig& model, std::int64_t ff_size);

/// A feed-forward that every token passes: a dense layer, or the shared expert of an MoE
/// layer. T tokens, H hidden, F width.
class DenseFfn {
 public:
  /// Parameters PREFIXgate_proj.weight (with a gate), up_proj, down_proj, and their biases.
  DenseFfn(const std::string& prefix, const FfnShape& shape, double down_init_std,
           ParamRegistry& registry);

  struct Saved {
    TensorView gate_up;  ///< [Tp, U], see FfnShape
    TensorView act;      ///< [Tp, F]
    FfnAdapters::Rows u;
  };
  Saved allocate(Arena& arena, std::int64_t num_tokens, DType compute) const;
  /// y [T, H] = down(act), see kernels/ffn.hpp.
  void forward(PassContext& ctx, const ParamStore& params, TensorView y, ConstTensorView x,
               const Saved& saved) const;
  /// dx [T, H]; adds the leaves. x has 32 readable, finite rows behind it.
  void backward(PassContext& ctx, const ParamStore& params, TensorView dx, ConstTensorView dy,
                ConstTensorView x, const Saved& saved) const;
  /// Adds up what backward needs besides.
  void allocate_adapter_scratch(Arena& arena, std::int64_t num_tokens, DType compute) const {
    adapters_.allocate(arena, padded_rows(num_tokens), compute);
  }
  std::vector<GemmShape> gemm_shapes(std::int64_t max_tokens, DType compute, bool training) const;
  const FfnShape& shape() const { return shape_; }

 private:
  void add_biases(const std::string& prefix, ParamRegistry& registry);
  FfnWeights weights(const ParamStore& params) const;
  Segment whole(const PassContext& ctx) const;
  FfnShape shape_;
  ParamRef gate_, up_, down_, gate_bias_, up_bias_, down_bias_;
  FfnAdapters adapters_;
};

}  // namespace arcus
