#pragma once

#include "kernels/dispatch.hpp"
#include "kernels/gemm.hpp"
#include "src/base/tensor.hpp"

namespace arcus {

/// Sizes of causal grouped-query attention. G = num_heads / num_kv_heads query heads share a KV
/// head; query head h belongs to KV head h / G.
struct AttentionShape {
  std::int64_t num_seqs = 0;  ///< B
  std::int64_t seq_len = 0;   ///< S
  std::int64_t num_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;  ///< D
  std::int64_t group() const { return num_heads / num_kv_heads; }
};

/// Rotates the first 2 * n dims of each head (half-split: dim i with dim i + n), n = columns of
/// inv_freq, angle = position * inv_freq[i] formed in f64; the rest passes unchanged. Queries land
/// grouped, ready for attention; keys per KV head.
struct RopeForward {
  TensorView q_out;          ///< [B * num_kv_heads * S * G, D], row ((b * KV + kv) * S + s) * G + g
  TensorView k_out;          ///< [B * num_kv_heads * S, D], row (b * KV + kv) * S + s
  ConstTensorView q;         ///< [B * S, num_heads * D]
  ConstTensorView k;         ///< [B * S, num_kv_heads * D]
  ConstTensorView inv_freq;  ///< [1, n] f64
  ConstTensorView position;  ///< [1, B * S] i32
  AttentionShape shape;
};
ARCUS_DECLARE_OP(rope_forward, RopeForward)

/// The transpose: gradients in the attention layout back to [B * S, heads * D].
struct RopeBackward {
  TensorView dq, dk;
  ConstTensorView dq_out, dk_out;
  ConstTensorView inv_freq, position;
  AttentionShape shape;
};
ARCUS_DECLARE_OP(rope_backward, RopeBackward)

/// out = softmax(q k^T / sqrt(D) + causal mask) v. Token s of a sequence sees keys
/// first_key[s]..s. One problem per (sequence, KV head), blocks of 64 query positions over keys
/// 0..end of the block; never [S, S]; bits depend on shapes alone.
struct AttentionForward {
  TensorView out;             ///< [B * S, num_heads * D]
  TensorView lse;             ///< [B * num_kv_heads * S * G, 1] accumulate type: log-sum-exp
  ConstTensorView q;          ///< layout of rope_forward
  ConstTensorView k;          ///< layout of rope_forward
  ConstTensorView v;          ///< [B * S, num_kv_heads * D], rows may be strided
  ConstTensorView first_key;  ///< [1, B * S] i32: position of the first visible key
  AttentionShape shape;
};
ARCUS_DECLARE_OP(attention_forward, AttentionForward)

/// P is recomputed from lse; dk and dv add query blocks in ascending order.
struct AttentionBackward {
  TensorView dq;         ///< layout of q
  TensorView dk;         ///< layout of k
  TensorView dv;         ///< [B * S, num_kv_heads * D], rows may be strided
  ConstTensorView dout;  ///< [B * S, num_heads * D]
  ConstTensorView out, lse, q, k, v, first_key;
  AttentionShape shape;
};
ARCUS_DECLARE_OP(attention_backward, AttentionBackward)

/// Primitives for the two ops above, built ahead (see build_primitives).
PrimitiveReport build_attention_primitives(Stream& stream, const AttentionShape& shape,
                                           DType compute, bool training);

/// Decoding with a KV cache: one new position for each of B sequences, plain dot products.
struct AttentionDecode {
  TensorView out;           ///< [B, num_heads * D]
  ConstTensorView q;        ///< [B, num_heads * D], rotated
  ConstTensorView k_cache;  ///< [B * max_len, num_kv_heads * D], rotated, row b * max_len + s
  ConstTensorView v_cache;  ///< [B * max_len, num_kv_heads * D]
  ConstTensorView length;   ///< [1, B] i32: keys of each sequence, the new one included
  std::int64_t max_len = 0;
  AttentionShape shape;  ///< num_seqs = B, seq_len = 1
};
ARCUS_DECLARE_OP(attention_decode, AttentionDecode)

}  // namespace arcus
