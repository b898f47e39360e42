#pragma once

#include <cstddef>
#include <cstdint>

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
/// and counted as late.
void run_gemm(Context& context, int thread, const GemmKey& key, const void* a, const void* b,
              void* c, const void* bias = nullptr);

/// Builds the primitive for `key` unless it exists; to be called outside steps.
void build_gemm(Context& context, const GemmKey& key);

/// True where bf16 products depend on the number of rows (AMX): every bf16 product must then use one
/// fixed row count per shape, its operand zero-padded.
bool bf16_needs_fixed_rows();
/// True where the processor multiplies bf16 natively (AVX512_BF16 or AMX).
bool bf16_is_native();

}  // namespace arcus::cpu
