#include "kernels/cpu/gemm_f64.hpp"

#include <algorithm>
#include <cstring>

namespace arcus::cpu {
namespace {

constexpr std::int64_t kPanelCols = 16;
constexpr std::int64_t kBlockRows = 4;
using Vector = double __attribute__((vector_size(64), aligned(8)));
constexpr std::int64_t kLanes = sizeof(Vector) / sizeof(double);
constexpr std::int64_t kVectors = kPanelCols / kLanes;

double element(const double* matrix, bool transposed, std::int64_t stride, std::int64_t row,
               std::int64_t col) {
  return transposed ? matrix[col * stride + row] : matrix[row * stride + col];
}

/// panel[k][j] = op(b)[k][begin + j], zero beyond the matrix.
void pack_panel(const GemmKey& key, const double* b, std::int64_t begin, std::int64_t cols,
                double* panel) {
  std::fill_n(panel, key.k * kPanelCols, 0.0);
  for (std::int64_t k = 0; k < key.k; ++k) {
    for (std::int64_t j = 0; j < cols; ++j) {
      panel[k * kPanelCols + j] = element(b, key.transpose_b, key.ldb, k, begin + j);
    }
  }
}

/// tile[i][j] = sum over k of op(a)[row + i][k] * panel[k][j]. Rows beyond the matrix repeat its
/// last row; the caller drops them.
void multiply_block(const GemmKey& key, const double* a, std::int64_t row, const double* panel,
                    double* tile) {
  Vector sum[kBlockRows][kVectors] = {};
  std::int64_t rows[kBlockRows];
  for (std::int64_t i = 0; i < kBlockRows; ++i) rows[i] = std::min(row + i, key.m - 1);
  for (std::int64_t k = 0; k < key.k; ++k) {
    Vector b[kVectors];
    std::memcpy(b, panel + k * kPanelCols, sizeof b);
    for (std::int64_t i = 0; i < kBlockRows; ++i) {
      const double scale = element(a, key.transpose_a, key.lda, rows[i], k);
      for (std::int64_t v = 0; v < kVectors; ++v) sum[i][v] += scale * b[v];
    }
  }
  std::memcpy(tile, sum, sizeof sum);
}

}  // namespace

std::int64_t gemm_f64_panel_bytes(const GemmKey& key) {
  return key.k * kPanelCols * static_cast<std::int64_t>(sizeof(double));
}

void gemm_f64(const GemmKey& key, const double* a, const double* b, double* c, const double* bias,
              void* panel_memory) {
  auto* panel = static_cast<double*>(panel_memory);
  double tile[kBlockRows * kPanelCols];
  for (std::int64_t col = 0; col < key.n; col += kPanelCols) {
    const std::int64_t cols = std::min(kPanelCols, key.n - col);
    pack_panel(key, b, col, cols, panel);
    for (std::int64_t row = 0; row < key.m; row += kBlockRows) {
      multiply_block(key, a, row, panel, tile);
      for (std::int64_t i = 0; i < std::min(kBlockRows, key.m - row); ++i) {
        double* out = c + (row + i) * key.ldc + col;
        for (std::int64_t j = 0; j < cols; ++j) {
          double value = tile[i * kPanelCols + j];
          if (key.bias) value += bias[col + j];
          out[j] = key.accumulate ? out[j] + value : value;
        }
      }
    }
  }
}

}  // namespace arcus::cpu
