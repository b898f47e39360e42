#pragma once

#include <cstdint>

#include "kernels/cpu/gemm_cache.hpp"

namespace arcus::cpu {

/// f64 products for gradient checks. Every element adds its K products in ascending order, so bits
/// depend on nothing but K. `panel` holds gemm_f64_panel_bytes(key) bytes of scratch.
void gemm_f64(const GemmKey& key, const double* a, const double* b, double* c, const double* bias,
              void* panel);
std::int64_t gemm_f64_panel_bytes(const GemmKey& key);

}  // namespace arcus::cpu
