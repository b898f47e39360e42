#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/low_rank.hpp"
#include "src/model/param_registry.hpp"
#include "src/model/pass.hpp"

namespace arcus {

/// The adapters of the weight "X.weight" [out, in] are "X.lora_A" [r, in], which starts normal with
/// a standard deviation of 1 / sqrt(3 in), and "X.lora_B" [out, r], which starts at 0: at first
/// they add nothing. Those of experts are stacked like their weights.
std::string lora_a_name(std::string_view weight);
std::string lora_b_name(std::string_view weight);
/// "X.weight" of "X.lora_A" and "X.lora_B"; nothing for other names.
std::optional<std::string> lora_base_name(std::string_view name);

/// w = W + scale B A, formed in f64 and rounded once, row by row. W, w [out, in] (w may be W); a
/// [r, in]; b [out, r].
void merge_lora(std::span<float> w, std::span<const float> weight, std::span<const float> a,
                std::span<const float> b, std::int64_t out, std::int64_t in, std::int64_t rank,
                double scale);

/// Names of the weights that [train.lora] may match: projections of attention and feed-forwards.
/// Throws (usage) where it matches none of `registry`, whose model has been declared.
void require_adapters(const ParamRegistry& registry);

/// The adapters of one weight, or of one weight of every expert. Without them all functions do
/// nothing.
class LowRank {
 public:
  LowRank() = default;
  /// Declares them where the registry's configuration matches the weight's name; none for a weight
  /// that is not there.
  LowRank(ParamRef weight, ParamRegistry& registry);

  bool active() const { return a_.valid(); }
  std::int64_t rank() const { return rank_; }
  LowRankWeights weights(const ParamStore& params) const;
  /// Inner rows of a layer call: [rows, r] with zeroed rows behind them; empty without adapters.
  TensorView allocate(Arena& arena, std::int64_t rows, DType compute) const;

  /// y [T, out], which holds x W^T, gains u B^T; u = scale x A^T is kept for backward.
  void forward(PassContext& ctx, const ParamStore& params, TensorView y, ConstTensorView x,
               TensorView u) const;
  /// The leaves from dy [T, out] and x [T, in] (padding rows behind it finite), and v = scale dy B.
  /// dx [T, in], which holds dy W, gains v A.
  void backward(PassContext& ctx, const ParamStore& params, TensorView dx, ConstTensorView dy,
                ConstTensorView x, TensorView u) const;
  /// The leaves alone, over segments of experts.
  void add_leaves(PassContext& ctx, const ParamStore& params, ConstTensorView dy, ConstTensorView x,
                  bool x_is_padded, TensorView u, ConstTensorView v,
                  std::span<const Segment> segments) const;

  /// Products of `shape`, whose sizes are the weight's; only rows, strides and types count.
  void append_gemm_shapes(LowRankShape shape, bool training, std::vector<GemmShape>& shapes) const;

 private:
  ParamRef a_, b_;
  std::int64_t out_ = 0, in_ = 0, rank_ = 0;
  double scale_ = 1;
};

/// The adapters of a feed-forward: of its gate, if it has one, up and down projection.
class FfnAdapters {
 public:
  FfnAdapters() = default;
  FfnAdapters(ParamRef gate, ParamRef up, ParamRef down, ParamRegistry& registry);

  /// Inner rows of a pass, each [Rp, r]: u forward, v backward.
  struct Rows {
    TensorView gate, up, down;
  };
  Rows allocate(Arena& arena, std::int64_t padded_rows, DType compute) const;
  FfnLowRank views(const ParamStore& params, const Rows& rows) const;
  /// x [R, H], act [Rp, F], dy [Rp, H], dgate_up [Rp, U] as FfnWgrad has them, after which this is
  /// to be called: it zeroes act's padding rows.
  void add_leaves(PassContext& ctx, const ParamStore& params, ConstTensorView x,
                  ConstTensorView act, ConstTensorView dy, ConstTensorView dgate_up, const Rows& u,
                  const Rows& v, std::span<const Segment> segments) const;
  void append_gemm_shapes(const FfnShape& shape, DType compute, std::int64_t max_rows,
                          bool training, std::vector<GemmShape>& shapes) const;

 private:
  LowRank gate_, up_, down_;
};

}  // namespace arcus
