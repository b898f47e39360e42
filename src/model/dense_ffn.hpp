#pragma once

#include <string>
#include <vector>

#include "kernels/ffn.hpp"
#include "src/model/lora.hpp"
#include "src/model/param_registry.hpp"
#include "src/model/pass.hpp"

namespace arcus {

/// A SwiGLU feed-forward that every token passes: a dense layer, or the shared expert of an MoE
/// layer. T tokens, H hidden, F width.
class DenseFfn {
 public:
  /// Parameters PREFIXgate_proj.weight, up_proj, down_proj.
  DenseFfn(const std::string& prefix, std::int64_t hidden_size, std::int64_t ff_size,
           double down_init_std, ParamRegistry& registry);

  struct Saved {
    TensorView gate_up;  ///< [Tp, 2F]
    TensorView act;      ///< [Tp, F]
    FfnAdapters::Rows u;
  };
  Saved allocate(Arena& arena, std::int64_t num_tokens, DType compute) const;
  /// y [T, H] = down(silu(gate x) * up x).
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
  FfnWeights weights(const ParamStore& params) const;
  Segment whole(const PassContext& ctx) const;
  FfnShape shape_;
  ParamRef gate_, up_, down_;
  FfnAdapters adapters_;
};

}  // namespace arcus
