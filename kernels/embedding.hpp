#pragma once

#include "kernels/gradient.hpp"

namespace arcus {

/// out[t] = table[ids[t]] (+ position_table[position[t]], rounded once).
struct EmbeddingForward {
  TensorView out;                  ///< [T, H] compute type
  ConstTensorView table;           ///< [V, H] compute type
  ConstTensorView ids;             ///< [1, T] i32, 0 <= id < V
  ConstTensorView position_table;  ///< [P, H] compute type, or empty
  ConstTensorView position;        ///< [1, T] i32, 0 <= position < P
};
ARCUS_DECLARE_OP(embedding_forward, EmbeddingForward)

/// Leaf per row of a table, of the vocabulary or of positions: its tokens' gradients added in token
/// order in f32 (f64 for f64).
struct EmbeddingBackward {
  GradientSum dtable;    ///< [V, H]
  ConstTensorView dout;  ///< [T, H]
  ConstTensorView ids;   ///< [1, T] i32
  std::int64_t vocab_size = 0;
  TensorView scratch;  ///< [1, vocab_size + 1 + T] i32
  std::int64_t micro_batch = 0;
};
ARCUS_DECLARE_OP(embedding_backward, EmbeddingBackward)

}  // namespace arcus
