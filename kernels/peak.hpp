#pragma once

#include "kernels/stream.hpp"
#include "src/base/dtype.hpp"

namespace arcus {

/// What this machine reaches, to hold figures of the same run against.

/// GFLOP/s of 1024 x 1024 x 1024 products on plain row-major operands (f32 or bf16, sums and result
/// f32), every thread of the stream busy with its own; the median of a few samples.
double measure_gemm_peak(Stream& stream, DType dtype);

/// GB/s of the STREAM triad a = b + s c over arrays far larger than the caches, on all threads of
/// the stream together; 24 bytes an element, the best of a few passes.
double measure_triad(Stream& stream);

}  // namespace arcus
