#include "kernels/gate_input.hpp"

#include <algorithm>
#include <array>
#include <cmath>

#include "kernels/cpu/leaf.hpp"
#include "kernels/cpu/math.hpp"
#include "kernels/cpu/parallel.hpp"
#include "kernels/cpu/rows.hpp"
#include "src/base/rng.hpp"

namespace arcus::cpu {
namespace {

constexpr std::int64_t kRowGrain = 16;
constexpr std::int64_t kChunk = 512;     ///< elements of a row that stand on the stack
constexpr std::int64_t kBlockRows = 64;  ///< part of the definition of a leaf summed over tokens
constexpr std::int64_t kStripe = 64;     ///< columns of one task

void check_same_shape(const char* op, const ConstTensorView& a, const ConstTensorView& b) {
  ARCUS_CHECK(a.rows == b.rows && a.cols == b.cols, "{}: {} x {} and {} x {}", op, a.rows, a.cols,
              b.rows, b.cols);
}

// ---- noise -----------------------------------------------------------------------------------

/// Number of element 0 of row t, rows of `cols` elements.
std::uint64_t first_number(const TokenDraws& draws, std::int64_t t, std::int64_t cols) {
  return static_cast<std::uint64_t>((draws.first_token + t) * cols);
}

template <class T, class A = Acc<T>>
void jitter_row(A* y, const T* x, std::int64_t n, const Jitter& args, std::int64_t t) {
  const Rng rng(args.draws.key);
  const auto step = static_cast<std::uint64_t>(args.draws.step);
  const std::uint64_t number = first_number(args.draws, t, n);
  const A amount = static_cast<A>(args.amount);
  std::array<float, kChunk> uniform;
  for (std::int64_t begin = 0; begin < n; begin += kChunk) {
    const std::int64_t count = std::min(kChunk, n - begin);
    rng.uniforms(step, number + static_cast<std::uint64_t>(begin),
                 {uniform.data(), static_cast<std::size_t>(count)});
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) {
      const A u = A(1) + amount * (A(2) * static_cast<A>(uniform[i]) - A(1));
      y[begin + i] = static_cast<A>(x[begin + i]) * u;
    }
  }
}

/// Calls fn(i, eps) for the normal numbers of row t. A call of the generator gives four; the first
/// and the last one of a row may serve in part only.
template <class Fn>
void for_normals(const TokenDraws& draws, std::int64_t t, std::int64_t n, Fn&& fn) {
  const Rng rng(draws.key);
  const std::uint64_t first = first_number(draws, t, n);
  for (std::int64_t i = 0; i < n;) {
    const std::uint64_t number = first + static_cast<std::uint64_t>(i);
    const auto normals = rng.normals(static_cast<std::uint64_t>(draws.step), number / 4);
    for (std::size_t lane = number % 4; lane < 4 && i < n; ++lane, ++i) fn(i, normals[lane]);
  }
}

// ---- cosine ----------------------------------------------------------------------------------

constexpr double kLeastNorm = 1e-12;

template <class T, class A = Acc<T>>
A normalize_row(A* y, const T* x, std::int64_t n) {
  const A inv_norm = A(1) / std::max(std::sqrt(dot<A>(x, x, n)), static_cast<A>(kLeastNorm));
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) y[i] = static_cast<A>(x[i]) * inv_norm;
  return inv_norm;
}

/// dx = (dy - y <dy, y>) inv_norm.
template <class A>
void normalize_row_backward(A* dx, const A* dy, const A* y, A inv_norm, std::int64_t n) {
  const A along = dot<A>(dy, y, n);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) dx[i] = (dy[i] - y[i] * along) * inv_norm;
}

constexpr double kMostTemperature = 4.605170185988091368;  ///< ln 100

/// a = exp(min(temperature, ln 100)).
template <class A>
A cosine_factor(A temperature) {
  return exp(std::min(temperature, static_cast<A>(kMostTemperature)));
}

/// e = a dz in place, and e / |W_i|.
template <class A>
void cosine_row_backward(A* dz, A* e_scaled, const A* w_inv_norm, std::int64_t num_experts,
                         A factor) {
#pragma omp simd
  for (std::int64_t i = 0; i < num_experts; ++i) {
    dz[i] *= factor;
    e_scaled[i] = dz[i] * w_inv_norm[i];
  }
}

/// sum[i] = sum_t e_ti c_ti for columns begin..begin + count, count <= kStripe, in blocks of rows.
template <class A>
void column_products(double* sum, const ConstTensorView& e, const ConstTensorView& cosine,
                     std::int64_t begin, std::int64_t count) {
  std::array<double, kStripe> total{};
  for (std::int64_t first = 0; first < e.rows; first += kBlockRows) {
    const std::int64_t end = std::min(e.rows, first + kBlockRows);
    std::array<double, kStripe> block{};
    for (std::int64_t t = first; t < end; ++t) {
      const A* et = e.row<A>(t) + begin;
      const A* ct = cosine.row<A>(t) + begin;
#pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) {
        block[i] += static_cast<double>(et[i]) * static_cast<double>(ct[i]);
      }
    }
    for (std::int64_t i = 0; i < count; ++i) total[i] += block[i];
  }
  std::copy_n(total.begin(), count, sum + begin);
}

/// Adds row i of W's second piece, - W^_i (sum_t e_ti c_ti) / |W_i|.
template <class A>
void add_weight_row(const CosineLogitsBackward& args, std::int64_t i, double product) {
  const A* w_hat = args.w_hat.row<A>(i);
  const std::int64_t n = args.w_hat.cols;
  const auto factor = static_cast<A>(-product * static_cast<double>(args.w_inv_norm.row<A>(i)[0]));
  std::array<A, kChunk> leaf;
  for (std::int64_t begin = 0; begin < n; begin += kChunk) {
    const std::int64_t count = std::min(kChunk, n - begin);
    for (std::int64_t k = 0; k < count; ++k) leaf[k] = w_hat[begin + k] * factor;
    add_leaf_rows(args.dweight.at(i * n + begin), count, leaf.data(), count, 1, count,
                  args.micro_batch);
  }
}

/// The leaf of the temperature, sum_ti e_ti c_ti; none where the temperature is cut off.
template <class A>
void add_temperature(const CosineLogitsBackward& args, const double* products) {
  double sum = 0;
  for (std::int64_t i = 0; i < args.cosine.cols; ++i) sum += products[i];
  const bool cut = args.temperature.as<A>()[0] > static_cast<A>(kMostTemperature);
  const A leaf = cut ? A(0) : static_cast<A>(sum);
  add_leaf_rows(args.dtemperature, 1, &leaf, 1, 1, 1, args.micro_batch);
}

}  // namespace

void jitter(Stream& stream, const Jitter& args) {
  check_same_shape("jitter", args.y, args.x);
  dispatch_compute(args.x.dtype, [&]<class T>() {
    using A = Acc<T>;
    parallel_rows(stream, args.x.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) {
        jitter_row(args.y.row<A>(t), args.x.row<T>(t), args.x.cols, args, t);
      }
    });
  });
}

void gate_noise(Stream& stream, const GateNoise& args) {
  check_same_shape("gate_noise", args.z, args.n);
  dispatch_accumulate(args.z.dtype, [&]<class A>() {
    const A amount = static_cast<A>(args.amount);
    parallel_rows(stream, args.z.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) {
        A* z = args.z.row<A>(t);
        const A* n = args.n.row<A>(t);
        for_normals(args.draws, t, args.z.cols, [=](std::int64_t i, float eps) {
          z[i] += amount * static_cast<A>(eps) * softplus(n[i]);
        });
      }
    });
  });
}

void gate_noise_backward(Stream& stream, const GateNoiseBackward& args) {
  check_same_shape("gate_noise_backward", args.dn, args.n);
  check_same_shape("gate_noise_backward", args.dz, args.n);
  dispatch_accumulate(args.dn.dtype, [&]<class A>() {
    const A amount = static_cast<A>(args.amount);
    parallel_rows(stream, args.dn.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) {
        A* dn = args.dn.row<A>(t);
        const A* dz = args.dz.row<A>(t);
        const A* n = args.n.row<A>(t);
        for_normals(args.draws, t, args.dn.cols, [=](std::int64_t i, float eps) {
          dn[i] += dz[i] * (amount * static_cast<A>(eps)) * sigmoid(n[i]);
        });
      }
    });
  });
}

void normalize_rows(Stream& stream, const NormalizeRows& args) {
  check_same_shape("normalize_rows", args.y, args.x);
  dispatch_compute(args.x.dtype, [&]<class T>() {
    using A = Acc<T>;
    parallel_rows(stream, args.x.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) {
        args.inv_norm.row<A>(t)[0] = normalize_row(args.y.row<A>(t), args.x.row<T>(t), args.x.cols);
      }
    });
  });
}

void normalize_rows_backward(Stream& stream, const NormalizeRowsBackward& args) {
  check_same_shape("normalize_rows_backward", args.dx, args.dy);
  check_same_shape("normalize_rows_backward", args.dy, args.y);
  dispatch_accumulate(args.dx.dtype, [&]<class A>() {
    parallel_rows(stream, args.dx.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) {
        normalize_row_backward(args.dx.row<A>(t), args.dy.row<A>(t), args.y.row<A>(t),
                               args.inv_norm.row<A>(t)[0], args.dx.cols);
      }
    });
  });
}

void cosine_logits(Stream& stream, const CosineLogits& args) {
  check_same_shape("cosine_logits", args.z, args.cosine);
  dispatch_accumulate(args.z.dtype, [&]<class A>() {
    const A factor = cosine_factor(args.temperature.as<A>()[0]);
    const A* bias = args.bias.empty() ? nullptr : args.bias.as<A>();
    parallel_rows(stream, args.z.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) {
        A* z = args.z.row<A>(t);
        std::copy_n(z, args.z.cols, args.cosine.row<A>(t));
        for (std::int64_t i = 0; i < args.z.cols; ++i) {
          z[i] = bias == nullptr ? factor * z[i] : factor * z[i] + bias[i];
        }
      }
    });
  });
}

void cosine_logits_backward(Stream& stream, const CosineLogitsBackward& args) {
  check_same_shape("cosine_logits_backward", args.dz, args.cosine);
  check_same_shape("cosine_logits_backward", args.e_scaled, args.cosine);
  const std::int64_t num_experts = args.dz.cols;
  ARCUS_CHECK(args.w_hat.rows == num_experts && args.w_inv_norm.rows == num_experts &&
                  args.w_inv_norm.contiguous(),
              "cosine_logits_backward: weight of {} rows, {} norms, {} experts", args.w_hat.rows,
              args.w_inv_norm.rows, num_experts);
  ARCUS_CHECK(args.scratch.size() >= num_experts,
              "cosine_logits_backward: scratch of {} for {} experts", args.scratch.size(),
              num_experts);
  dispatch_accumulate(args.dz.dtype, [&]<class A>() {
    const A factor = cosine_factor(args.temperature.as<A>()[0]);
    const A* w_inv_norm = args.w_inv_norm.as<A>();
    parallel_rows(stream, args.dz.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) {
        cosine_row_backward(args.dz.row<A>(t), args.e_scaled.row<A>(t), w_inv_norm, num_experts,
                            factor);
      }
    });
    if (args.dtemperature.sum == nullptr && args.dweight.sum == nullptr) return;
    auto* products = args.scratch.as<double>();
    parallel_tasks(stream, (num_experts + kStripe - 1) / kStripe, [&](std::int64_t stripe, int) {
      const std::int64_t begin = stripe * kStripe;
      column_products<A>(products, args.dz, args.cosine, begin,
                         std::min(kStripe, num_experts - begin));
    });
    if (args.dtemperature.sum != nullptr) add_temperature<A>(args, products);
    if (args.dweight.sum == nullptr) return;
    parallel_rows(stream, num_experts, 1, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t i = begin; i < end; ++i) add_weight_row<A>(args, i, products[i]);
    });
  });
}

}  // namespace arcus::cpu
