#include "kernels/norm.hpp"

#include <algorithm>
#include <cmath>

#include "kernels/cpu/column_leaf.hpp"
#include "kernels/cpu/context.hpp"
#include "kernels/cpu/parallel.hpp"
#include "kernels/cpu/rows.hpp"

namespace arcus::cpu {
namespace {

/// dx[i] = value(i) (+ residual[i]), rounded once; residual may be null.
template <class T, class Value>
void store_with_residual(T* dx, const T* residual, std::int64_t n, const Value& value) {
  using A = Acc<T>;
  if (residual == nullptr) {  // NOLINT(bugprone-branch-clone): it does not look into the loops
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) store(dx[i], value(i));
  } else {
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) {
      store(dx[i], value(i) + static_cast<A>(residual[i]));
    }
  }
}

constexpr std::int64_t kRowGrain = 16;

std::int64_t heads_of(const ConstTensorView& x, const ConstTensorView& gain,
                      const ConstTensorView& inv_rms) {
  ARCUS_CHECK(gain.cols > 0 && x.cols % gain.cols == 0,
              "rmsnorm: rows of {} do not divide into groups of {}", x.cols, gain.cols);
  ARCUS_CHECK(inv_rms.rows == x.rows && inv_rms.cols == x.cols / gain.cols,
              "rmsnorm: inv_rms is {} x {}, expected {} x {}", inv_rms.rows, inv_rms.cols, x.rows,
              x.cols / gain.cols);
  return x.cols / gain.cols;
}

template <class T, class A = Acc<T>>
A norm_forward_group(T* y, const T* x, const A* gain, std::int64_t n, A eps) {
  const A squares = dot<A>(x, x, n);
  const A inv_rms = A(1) / std::sqrt(squares / static_cast<A>(n) + eps);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) store(y[i], static_cast<A>(x[i]) * inv_rms * gain[i]);
  return inv_rms;
}

/// dx = inv_rms (dy gain - x_hat mean(dy gain x_hat)) + residual, x_hat = x inv_rms.
template <class T, class A = Acc<T>>
void norm_backward_group(T* dx, const T* dy, const T* residual, const T* x, const A* gain,
                         A inv_rms, std::int64_t n) {
  const A mean =
      sum_terms<A>(n,
                   [=](std::int64_t i) {
                     return static_cast<A>(dy[i]) * gain[i] * (static_cast<A>(x[i]) * inv_rms);
                   }) /
      static_cast<A>(n);
  const auto through_norm = [=](std::int64_t i) {
    const A x_hat = static_cast<A>(x[i]) * inv_rms;
    return inv_rms * (static_cast<A>(dy[i]) * gain[i] - x_hat * mean);
  };
  store_with_residual(dx, residual, n, through_norm);
}

/// sums[c] = sum over rows [first, end) and heads of dy x_hat at column c of the group.
template <class T, class A = Acc<T>>
void gain_block(const RmsNormBackward& args, std::int64_t first, std::int64_t end, double* sums) {
  const std::int64_t group = args.gain.cols;
  const std::int64_t heads = args.x.cols / group;
  std::fill_n(sums, group, 0.0);
  for (std::int64_t t = first; t < end; ++t) {
    for (std::int64_t h = 0; h < heads; ++h) {
      const T* dy = args.dy.row<T>(t) + h * group;
      const T* x = args.x.row<T>(t) + h * group;
      const double inv_rms = args.inv_rms.row<A>(t)[h];
#pragma omp simd
      for (std::int64_t c = 0; c < group; ++c) {
        sums[c] += static_cast<double>(dy[c]) * static_cast<double>(x[c]) * inv_rms;
      }
    }
  }
}

template <class T, class A = Acc<T>>
void norm_backward_row(const RmsNormBackward& args, std::int64_t t) {
  const std::int64_t group = args.gain.cols;
  const T* residual = args.residual.empty() ? nullptr : args.residual.row<T>(t);
  for (std::int64_t at = 0; at < args.x.cols; at += group) {
    norm_backward_group(args.dx.row<T>(t) + at, args.dy.row<T>(t) + at,
                        residual == nullptr ? nullptr : residual + at, args.x.row<T>(t) + at,
                        args.gain.as<A>(), args.inv_rms.row<A>(t)[at / group], group);
  }
}

}  // namespace

void rmsnorm_forward(Stream& stream, const RmsNormForward& args) {
  const std::int64_t heads = heads_of(args.x, args.gain, args.inv_rms);
  const std::int64_t group = args.gain.cols;
  dispatch_compute(args.x.dtype, [&]<class T>() {
    using A = Acc<T>;
    parallel_rows(stream, args.x.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) {
        for (std::int64_t h = 0; h < heads; ++h) {
          args.inv_rms.row<A>(t)[h] =
              norm_forward_group(args.y.row<T>(t) + h * group, args.x.row<T>(t) + h * group,
                                 args.gain.as<A>(), group, static_cast<A>(args.eps));
        }
      }
    });
  });
}

void rmsnorm_backward(Stream& stream, const RmsNormBackward& args) {
  heads_of(args.x, args.gain, args.inv_rms);
  if (args.x.rows == 0) return;
  const std::int64_t group = args.gain.cols;
  const std::int64_t blocks = (args.x.rows + kColumnBlockRows - 1) / kColumnBlockRows;
  const bool with_gain = args.dgain.sum != nullptr;
  auto* sums = static_cast<double*>(
      with_gain ? stream.cpu().op_scratch(blocks * group * std::int64_t{sizeof(double)}) : nullptr);
  dispatch_compute(args.x.dtype, [&]<class T>() {
    parallel_tasks(stream, blocks, [&](std::int64_t block, int) {
      const std::int64_t first = block * kColumnBlockRows;
      const std::int64_t end = std::min(args.x.rows, first + kColumnBlockRows);
      // First the gain: dx may stand where dy stands.
      if (with_gain) gain_block<T>(args, first, end, sums + block * group);
      for (std::int64_t t = first; t < end; ++t) norm_backward_row<T>(args, t);
    });
    if (with_gain) {
      add_block_sums<Acc<T>>(args.dgain, sums, group, blocks, group, args.micro_batch);
    }
  });
}

namespace {

void check_layernorm(const ConstTensorView& x, const ConstTensorView& gain,
                     const ConstTensorView& mean, const ConstTensorView& inv_std) {
  ARCUS_CHECK(gain.cols == x.cols, "layernorm: rows of {}, gain of {}", x.cols, gain.cols);
  ARCUS_CHECK(mean.rows == x.rows && inv_std.rows == x.rows,
              "layernorm: {} rows, {} means and {} deviations", x.rows, mean.rows, inv_std.rows);
}

template <class T, class A = Acc<T>>
void layernorm_forward_row(const LayerNormForward& args, std::int64_t t) {
  const std::int64_t n = args.x.cols;
  const T* x = args.x.row<T>(t);
  T* y = args.y.row<T>(t);
  const A* gain = args.gain.as<A>();
  const A* bias = args.bias.as<A>();
  const A mean =
      sum_terms<A>(n, [=](std::int64_t i) { return static_cast<A>(x[i]); }) / static_cast<A>(n);
  const A squares = sum_terms<A>(n, [=](std::int64_t i) {
    const A difference = static_cast<A>(x[i]) - mean;
    return difference * difference;
  });
  const A inv_std = A(1) / std::sqrt(squares / static_cast<A>(n) + static_cast<A>(args.eps));
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    store(y[i], (static_cast<A>(x[i]) - mean) * inv_std * gain[i] + bias[i]);
  }
  args.mean.row<A>(t)[0] = mean;
  args.inv_std.row<A>(t)[0] = inv_std;
}

/// dx = inv_std (g - mean(g) - x_hat mean(g x_hat)) + residual, g = dy gain, x_hat = (x - mean)
/// inv_std.
template <class T, class A = Acc<T>>
void layernorm_backward_row(const LayerNormBackward& args, std::int64_t t) {
  const std::int64_t n = args.x.cols;
  const T* x = args.x.row<T>(t);
  const T* dy = args.dy.row<T>(t);
  const A* gain = args.gain.as<A>();
  const A mean = args.mean.row<A>(t)[0];
  const A inv_std = args.inv_std.row<A>(t)[0];
  const auto g = [=](std::int64_t i) { return static_cast<A>(dy[i]) * gain[i]; };
  const auto x_hat = [=](std::int64_t i) { return (static_cast<A>(x[i]) - mean) * inv_std; };
  const A mean_g = sum_terms<A>(n, g) / static_cast<A>(n);
  const A mean_g_x_hat =
      sum_terms<A>(n, [=](std::int64_t i) { return g(i) * x_hat(i); }) / static_cast<A>(n);
  const auto through_norm = [=](std::int64_t i) {
    return inv_std * (g(i) - mean_g - x_hat(i) * mean_g_x_hat);
  };
  T* dx = args.dx.row<T>(t);
  const T* residual = args.residual.empty() ? nullptr : args.residual.row<T>(t);
  store_with_residual(dx, residual, n, through_norm);
}

/// sums[0..C) = sums over rows [first, end) of dy x_hat, sums[C..2C) = of dy.
template <class T, class A = Acc<T>>
void gain_and_bias_block(const LayerNormBackward& args, std::int64_t first, std::int64_t end,
                         double* sums) {
  const std::int64_t n = args.x.cols;
  double* gain = sums;
  double* bias = sums + n;
  std::fill_n(sums, 2 * n, 0.0);
  for (std::int64_t t = first; t < end; ++t) {
    const T* dy = args.dy.row<T>(t);
    const T* x = args.x.row<T>(t);
    const double mean = args.mean.row<A>(t)[0];
    const double inv_std = args.inv_std.row<A>(t)[0];
#pragma omp simd
    for (std::int64_t c = 0; c < n; ++c) {
      const auto gradient = static_cast<double>(dy[c]);
      gain[c] += gradient * ((static_cast<double>(x[c]) - mean) * inv_std);
      bias[c] += gradient;
    }
  }
}

}  // namespace

void layernorm_forward(Stream& stream, const LayerNormForward& args) {
  check_layernorm(args.x, args.gain, args.mean, args.inv_std);
  ARCUS_CHECK(args.bias.cols == args.x.cols, "layernorm: rows of {}, bias of {}", args.x.cols,
              args.bias.cols);
  dispatch_compute(args.x.dtype, [&]<class T>() {
    parallel_rows(stream, args.x.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) layernorm_forward_row<T>(args, t);
    });
  });
}

void layernorm_backward(Stream& stream, const LayerNormBackward& args) {
  check_layernorm(args.x, args.gain, args.mean, args.inv_std);
  if (args.x.rows == 0) return;
  const std::int64_t n = args.x.cols;
  const std::int64_t blocks = (args.x.rows + kColumnBlockRows - 1) / kColumnBlockRows;
  const bool with_leaves = args.dgain.sum != nullptr || args.dbias.sum != nullptr;
  auto* sums = static_cast<double*>(
      with_leaves ? stream.cpu().op_scratch(2 * blocks * n * std::int64_t{sizeof(double)})
                  : nullptr);
  dispatch_compute(args.x.dtype, [&]<class T>() {
    parallel_tasks(stream, blocks, [&](std::int64_t block, int) {
      const std::int64_t first = block * kColumnBlockRows;
      const std::int64_t end = std::min(args.x.rows, first + kColumnBlockRows);
      // First the leaves: dx may stand where dy stands.
      if (with_leaves) gain_and_bias_block<T>(args, first, end, sums + 2 * block * n);
      for (std::int64_t t = first; t < end; ++t) layernorm_backward_row<T>(args, t);
    });
    const auto add = [&](const GradientSum& target, const double* of_blocks) {
      if (target.sum == nullptr) return;
      add_block_sums<Acc<T>>(target, of_blocks, 2 * n, blocks, n, args.micro_batch);
    };
    add(args.dgain, sums);
    add(args.dbias, sums + n);
  });
}

}  // namespace arcus::cpu
