#pragma once

#include <cstdint>

#include "kernels/cpu/gemm_cache.hpp"
#include "kernels/cpu/leaf.hpp"
#include "kernels/gemm.hpp"

namespace arcus::cpu {

/// The keys (m left 0) of the products of a linear layer with weight [out, in]. Ops and
/// build_primitives both take them from here, so that what runs is what was built.
GemmKey forward_key(DType compute, DType result, std::int64_t out, std::int64_t in,
                    std::int64_t x_stride, std::int64_t y_stride, bool bias, bool accumulate);
GemmKey dgrad_key(DType compute, DType result, std::int64_t out, std::int64_t in,
                  std::int64_t dy_stride, std::int64_t dx_stride, bool accumulate);

/// Row tiles of a linear layer with `rows` rows.
std::int64_t linear_tile_rows(const GemmKey& key, std::int64_t rows);

/// One tile of a weight gradient: dweight[begin, begin + tile_rows) gains (or becomes) the leaf of
/// `rows` rows of dy and x.
struct WgradTile {
  GradientSum dweight;     ///< of the whole tensor [out, in]
  std::int64_t begin = 0;  ///< first row of dW
  std::int64_t tile_rows = 0;
  std::int64_t in = 0;
  const void* dy = nullptr;  ///< first row of the leaf, column of dW row 0
  std::int64_t dy_stride = 0;
  const void* x = nullptr;  ///< first row of the leaf; padded_rows(rows) rows are read
  std::int64_t x_stride = 0;
  std::int64_t rows = 0;
  DType compute = DType::f32;
  std::int64_t micro_batch = 0;
  LeafWrite write = LeafWrite::add;
};
/// Marks of `dweight` are the caller's: set when all tiles are done.
void run_wgrad_tile(Context& context, int thread, const WgradTile& tile);
/// Scratch that run_wgrad_tile takes from Context::scratch.
std::int64_t wgrad_scratch_bytes(DType compute, std::int64_t in, std::int64_t rows);

/// build_primitives on the CPU.
PrimitiveReport build_gemm_shapes(Stream& stream, std::span<const GemmShape> shapes);

}  // namespace arcus::cpu
