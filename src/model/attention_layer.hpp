#pragma once

#include <string>
#include <vector>

#include "kernels/attention.hpp"
#include "src/model/config.hpp"
#include "src/model/lora.hpp"
#include "src/model/param_registry.hpp"
#include "src/model/pass.hpp"

namespace arcus {

/// Keys and values of one layer for decoding: B sequences of up to max_len positions.
struct KvCache {
  TensorView k, v;    ///< [B * max_len, num_kv_heads * D]
  TensorView length;  ///< [1, B] i32: positions filled, the current one included
  std::int64_t max_len = 0;
};

/// Causal grouped-query attention with optional rotary positions, QK-norm and biases. T tokens, D
/// head size, N = num_heads * D, M = num_kv_heads * D.
class AttentionLayer {
 public:
  AttentionLayer(const ModelConfig& model, const std::string& prefix, ParamRegistry& registry);

  struct Saved {
    TensorView qkv;        ///< [T, N + 2M]: projections before QK-norm and rotation
    TensorView q_inv_rms;  ///< [T, heads or 1] accumulate type, with QK-norm
    TensorView k_inv_rms;
    TensorView q, k;  ///< rotated, attention layout
    TensorView out;   ///< [T, N] before the output projection
    TensorView lse;
    TensorView u_q, u_k, u_v, u_o;  ///< [T, r] inner rows of adapters
  };
  Saved allocate(Arena& arena, std::int64_t num_tokens, DType compute) const;
  /// out [T, H] = x + attention(h), h [T, H] the normed input.
  void forward(PassContext& ctx, const ParamStore& params, TensorView out, ConstTensorView h,
               ConstTensorView x, const Saved& saved) const;
  /// dh [T, H] from dout [T, H] (whose padding rows may be cleared); adds the leaves.
  void backward(PassContext& ctx, const ParamStore& params, TensorView dh, TensorView dout,
                ConstTensorView h, const Saved& saved) const;
  /// One new position for each sequence: like forward, T = B.
  void decode(PassContext& ctx, const ParamStore& params, TensorView out, ConstTensorView h,
              ConstTensorView x, KvCache& cache) const;

  std::vector<GemmShape> gemm_shapes(std::int64_t max_tokens, DType compute, bool training) const;
  AttentionShape shape(std::int64_t num_seqs, std::int64_t seq_len) const;
  std::int64_t qkv_size() const { return q_size_ + 2 * kv_size_; }
  std::int64_t kv_size() const { return kv_size_; }
  /// Columns of all adapters' inner rows.
  std::int64_t adapter_cols() const {
    return q_lora_.rank() + k_lora_.rank() + v_lora_.rank() + o_lora_.rank();
  }

 private:
  void project(PassContext& ctx, const ParamStore& params, ConstTensorView h,
               const Saved& saved) const;
  void normalize(PassContext& ctx, const ParamStore& params, TensorView q, TensorView k,
                 const Saved& saved) const;
  void normalize_backward(PassContext& ctx, const ParamStore& params, TensorView dqkv,
                          const Saved& saved) const;
  void rotate(PassContext& ctx, const ParamStore& params, const AttentionShape& shape,
              const Saved& saved) const;
  void project_backward(PassContext& ctx, const ParamStore& params, TensorView dh, TensorView dqkv,
                        ConstTensorView h, const Saved& saved) const;
  ConstTensorView inv_freq() const {
    return {inv_freq_.data(), DType::f64, 1, static_cast<std::int64_t>(inv_freq_.size())};
  }

  ModelConfig model_;
  std::int64_t q_size_, kv_size_;
  std::vector<double> inv_freq_;
  ParamRef q_, k_, v_, q_bias_, k_bias_, v_bias_, o_, o_bias_, q_norm_, k_norm_;
  LowRank q_lora_, k_lora_, v_lora_, o_lora_;
};

}  // namespace arcus
