#include "kernels/norm.hpp"

#include <algorithm>
#include <array>
#include <cmath>

#include "kernels/cpu/parallel.hpp"
#include "kernels/cpu/rows.hpp"

namespace arcus::cpu {
namespace {

constexpr std::int64_t kRowGrain = 16;
constexpr std::int64_t kGainBlockRows = 64;  ///< part of the definition of a gain's leaf
constexpr std::int64_t kGainStripe = 64;     ///< columns of one task
constexpr std::int64_t kGainChunk = 4096;    ///< columns whose leaf stands on the stack

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
  if (residual == nullptr) {  // NOLINT(bugprone-branch-clone): it does not look into the loops
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) store(dx[i], through_norm(i));
  } else {
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) {
      store(dx[i], through_norm(i) + static_cast<A>(residual[i]));
    }
  }
}

/// leaf[c] = sum over rows and heads of dy x_hat at column begin + c of the group, count <= stripe.
template <class T, class A = Acc<T>>
void gain_leaf_stripe(const RmsNormBackward& args, std::int64_t begin, std::int64_t count,
                      A* leaf) {
  const std::int64_t group = args.gain.cols;
  const std::int64_t heads = args.x.cols / group;
  std::array<double, kGainStripe> total{};
  for (std::int64_t first = 0; first < args.x.rows; first += kGainBlockRows) {
    const std::int64_t end = std::min(args.x.rows, first + kGainBlockRows);
    std::array<double, kGainStripe> block{};
    for (std::int64_t t = first; t < end; ++t) {
      for (std::int64_t h = 0; h < heads; ++h) {
        const T* dy = args.dy.row<T>(t) + h * group + begin;
        const T* x = args.x.row<T>(t) + h * group + begin;
        const double inv_rms = args.inv_rms.row<A>(t)[h];
#pragma omp simd
        for (std::int64_t c = 0; c < count; ++c) {
          block[c] += static_cast<double>(dy[c]) * static_cast<double>(x[c]) * inv_rms;
        }
      }
    }
    for (std::int64_t c = 0; c < count; ++c) total[c] += block[c];
  }
  for (std::int64_t c = 0; c < count; ++c) leaf[c] = static_cast<A>(total[c]);
}

template <class T, class A = Acc<T>>
void add_gain_leaf(Stream& stream, const RmsNormBackward& args) {
  const std::int64_t group = args.gain.cols;
  std::array<A, kGainChunk> leaf;
  for (std::int64_t chunk = 0; chunk < group; chunk += kGainChunk) {
    const std::int64_t cols = std::min(kGainChunk, group - chunk);
    const std::int64_t stripes = (cols + kGainStripe - 1) / kGainStripe;
    parallel_tasks(stream, stripes, [&](std::int64_t stripe, int) {
      const std::int64_t begin = stripe * kGainStripe;
      gain_leaf_stripe<T>(args, chunk + begin, std::min(kGainStripe, cols - begin),
                          leaf.data() + begin);
    });
    cpu::add_leaf(stream, {.target = args.dgain.at(chunk),
                           .target_stride = cols,
                           .leaf = ConstTensorView(leaf.data(), dtype_of<A>(), 1, cols),
                           .micro_batch = args.micro_batch});
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
  const std::int64_t heads = heads_of(args.x, args.gain, args.inv_rms);
  const std::int64_t group = args.gain.cols;
  if (args.x.rows == 0) return;
  dispatch_compute(args.x.dtype, [&]<class T>() {
    using A = Acc<T>;
    // First the gain: dx may stand where dy stands.
    if (args.dgain.sum != nullptr) add_gain_leaf<T>(stream, args);
    parallel_rows(stream, args.x.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) {
        const T* residual = args.residual.empty() ? nullptr : args.residual.row<T>(t);
        for (std::int64_t h = 0; h < heads; ++h) {
          const std::int64_t at = h * group;
          norm_backward_group(args.dx.row<T>(t) + at, args.dy.row<T>(t) + at,
                              residual == nullptr ? nullptr : residual + at, args.x.row<T>(t) + at,
                              args.gain.as<A>(), args.inv_rms.row<A>(t)[h], group);
        }
      }
    });
  });
}

}  // namespace arcus::cpu
