#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "src/base/dtype.hpp"

namespace arcus {

/// Plain description of one logical tensor of a run's state, equal on every rank. The tensor is
/// seen as [num_units, unit_rows, cols]: a unit is what hashes and gradient norms treat as a
/// tensor of its own (one expert; the whole tensor where there are no experts).
struct TensorSpec {
  std::string name;                 ///< unique, e.g. "model.layers.3.mlp.experts.gate_proj.weight"
  DType dtype = DType::f32;         ///< on disk and in memory
  std::vector<std::int64_t> shape;  ///< logical; experts stacked by global index come first
  std::int64_t num_units = 1;

  std::int64_t cols() const;      ///< last dimension (1 for a vector)
  std::int64_t num_rows() const;  ///< rows of all units
  std::int64_t unit_rows() const { return num_rows() / num_units; }
  std::int64_t num_elements() const { return num_rows() * cols(); }
};

/// "a, b, c, d, e and 12 more", for messages.
std::string list_names(const std::vector<std::string>& names);

/// A *block* is the unit of gradient norms, ZeRO ownership and checkpoint hashes: the fewest whole
/// rows that hold at least 2^16 elements; it never crosses a unit, so the last one of a unit may
/// be shorter.
struct RowRange {
  std::int64_t begin = 0;  ///< first row, counted over all units
  std::int64_t end = 0;
};
inline constexpr std::int64_t kBlockElements = std::int64_t{1} << 16;
std::int64_t block_rows(const TensorSpec& spec);
std::int64_t blocks_per_unit(const TensorSpec& spec);
std::int64_t num_blocks(const TensorSpec& spec);
/// Rows of block `index`, 0 <= index < num_blocks(spec).
RowRange block_range(const TensorSpec& spec, std::int64_t index);

/// Rows of a logical tensor in this rank's memory, contiguous, whole blocks.
struct StateSlice {
  RowRange rows;
  void* data = nullptr;
};

/// One logical tensor and the rows of it that this rank answers for. Over all ranks the slices of a
/// sharded tensor cover every row exactly once. A replicated tensor is whole on every rank (one
/// slice); rank 0 writes it, every rank reads it.
struct StateView {
  TensorSpec spec;
  bool replicated = false;
  std::vector<StateSlice> slices;  ///< ascending, disjoint
};

}  // namespace arcus
