#pragma once

#include <cstdint>

#include "kernels/cpu/context.hpp"
#include "kernels/cpu/few_rows.hpp"
#include "kernels/low_rank.hpp"

namespace arcus::cpu {

/// A and B of one expert.
template <class T>
struct LowRankOfExpert {
  LowRankOfExpert(const LowRankWeights& weights, std::int64_t expert)
      : a(weights.a.as<T>() + expert * weights.expert_stride),
        b(weights.b.as<T>() + expert * weights.expert_stride),
        rank(weights.a.rows),
        in(weights.a.cols),
        out(weights.b.rows),
        scale(static_cast<Acc<T>>(weights.scale)) {}

  const T* a;  ///< [r, in]
  const T* b;  ///< [out, r]
  std::int64_t rank, in, out;
  Acc<T> scale;
};

/// Some rows of low_rank_forward, on the calling thread. Never touches Context::scratch.
template <class T>
void low_rank_forward_tile(Context& context, int thread, const LowRankOfExpert<T>& weights,
                           std::int64_t rows, const T* x, std::int64_t x_stride, T* u, T* y,
                           std::int64_t y_stride);
/// The same of low_rank_backward; dx in T or its accumulate type.
template <class T, class D>
void low_rank_backward_tile(Context& context, int thread, const LowRankOfExpert<T>& weights,
                            std::int64_t rows, const T* dy, std::int64_t dy_stride, T* v, D* dx,
                            std::int64_t dx_stride);

/// u of a few rows, as few_rows_product makes products.
template <class T>
void low_rank_few_rows_inner(const LowRankOfExpert<T>& weights, std::int64_t rows, const T* x,
                             std::int64_t x_stride, T* u);
/// y[r][c] += <u row r, B row begin + c> for r < rows, c < cols <= kFewRowsCols.
template <class T>
void low_rank_few_rows_add(const LowRankOfExpert<T>& weights, std::int64_t rows, const T* u,
                           std::int64_t begin, std::int64_t cols, Acc<T>* y, std::int64_t y_stride);

}  // namespace arcus::cpu
