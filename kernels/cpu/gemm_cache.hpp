#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "kernels/cpu/context.hpp"
#include "src/base/dtype.hpp"

namespace arcus::cpu {

/// One matrix product of fixed shape: c[M,N] = op(a)[M,K] op(b)[K,N] (+ c where accumulate)
/// (+ bias[N] to every row). Row strides in elements, of the matrices as they are stored (op = none
/// or transpose). Equal keys give equal bits for equal operands, on any thread.
struct GemmKey {
  DType ab_dtype = DType::f32;  ///< f32, bf16, f64
  DType c_dtype = DType::f32;   ///< f32 or bf16 (f64 for f64); bias is f32 (f64 for f64)
  bool transpose_a = false;
  bool transpose_b = false;
  bool accumulate = false;
  bool bias = false;
  std::int64_t m = 0, n = 0, k = 0;
  std::int64_t lda = 0, ldb = 0, ldc = 0;

  bool operator==(const GemmKey&) const = default;
};

/// Runs one product on the calling thread, which is number `thread` of the stream's team. Sums are
/// f32 (f64 for f64). The primitive must have been built (build_gemm), else it is built on the spot
/// and counted as late. m, n, k >= 1. Keeps no pointer; never touches Context::scratch.
///
/// With dense operands (strides equal to the columns stored) oneDNN runs its batch-reduce kernel:
/// it allocates six small nodes (264 bytes in 2.6) in a call, and in f32 and AVX512_BF16 a row has
/// the same bits whatever M is. A padded stride of a, b or c makes it fall back to another kernel,
/// which allocates packing buffers (70 KB and more) in every call, gives other bits, and makes a
/// row's bits depend on M: copy such an operand first.
void run_gemm(Context& context, int thread, const GemmKey& key, const void* a, const void* b,
              void* c, const void* bias = nullptr);

/// Builds the primitive for `key` unless it exists; to be called outside steps.
void build_gemm(Context& context, const GemmKey& key);

/// True where a row's bits depend on the number of rows of its product (bf16 with AMX; f32 without
/// AVX-512): every product must then use one fixed row count per shape, its operand zero-padded.
bool needs_fixed_rows(DType ab_dtype);
inline bool bf16_needs_fixed_rows() { return needs_fixed_rows(DType::bf16); }
/// True where the processor multiplies bf16 natively (AVX512_BF16 or AMX).
bool bf16_is_native();

/// Greatest height of the row tiles into which c[M,N] = a[M,K] op(b) is cut where a row's bits must
/// not depend on M; a rule of type and shape alone. 256, or the fixed height of needs_fixed_rows.
std::int64_t row_tile_height(DType ab_dtype, std::int64_t n, std::int64_t k);
/// c[rows, N] in tiles of row_tile_height rows and a tail; transpose_a = false. A row's bits depend
/// neither on `rows` nor on lda and ldc: operands with padded rows, and tails where the height is
/// fixed, go through scratch. (Context::row_bits_may_differ: tails are as high as is fast.) key.m
/// is ignored.
void run_gemm_rows(Context& context, int thread, GemmKey key, std::int64_t rows, const void* a,
                   const void* b, void* c, const void* bias = nullptr);
/// Builds what run_gemm_rows needs for a tile of `rows` <= row_tile_height rows.
void build_gemm_tile(Context& context, GemmKey key, std::int64_t rows);

/// The primitives of one stream. oneDNN primitives are immutable and take their scratch memory from
/// the caller (user scratchpad mode), so the stream's threads share them; what a run changes (the
/// memory objects that carry pointers, the scratchpad) exists once per thread. Looking a primitive
/// up takes no lock and allocates nothing.
class GemmCache {
 public:
  explicit GemmCache(int num_threads);
  ~GemmCache();
  GemmCache(const GemmCache&) = delete;
  GemmCache& operator=(const GemmCache&) = delete;

  void build(const GemmKey& key);
  void run(int thread, const GemmKey& key, const void* a, const void* b, void* c, const void* bias);
  /// Memory of one thread in which row tiles are padded, at least `bytes` long.
  void* padding(int thread, std::int64_t bytes);

  std::int64_t num_primitives() const;
  std::int64_t late_primitives() const;
  /// Scratch memory of all threads.
  std::int64_t scratch_bytes() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace arcus::cpu
