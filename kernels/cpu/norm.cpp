#include "kernels/norm.hpp"

#include <algorithm>
#include <array>
#include <cmath>

#include "kernels/cpu/context.hpp"
#include "kernels/cpu/leaf.hpp"
#include "kernels/cpu/parallel.hpp"
#include "kernels/cpu/rows.hpp"

namespace arcus::cpu {
namespace {

constexpr std::int64_t kRowGrain = 16;
constexpr std::int64_t kGainBlockRows = 64;  ///< part of the definition of a gain's leaf
constexpr std::int64_t kGainChunk = 1024;    ///< columns whose leaf stands on the stack

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

/// The leaf of the gain from its blocks' sums, [blocks, group]: blocks in order, rounded once.
template <class A>
void add_gain_leaf(const RmsNormBackward& args, const double* sums, std::int64_t blocks) {
  const std::int64_t group = args.gain.cols;
  for (std::int64_t begin = 0; begin < group; begin += kGainChunk) {
    const std::int64_t cols = std::min(kGainChunk, group - begin);
    std::array<double, kGainChunk> total{};
    std::array<A, kGainChunk> leaf;
    for (std::int64_t block = 0; block < blocks; ++block) {
      const double* part = sums + block * group + begin;
      for (std::int64_t c = 0; c < cols; ++c) total[static_cast<std::size_t>(c)] += part[c];
    }
    std::transform(total.begin(), total.begin() + cols, leaf.begin(),
                   [](double value) { return static_cast<A>(value); });
    add_leaf_rows(args.dgain.at(begin), cols, leaf.data(), cols, 1, cols, args.micro_batch);
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
  const std::int64_t blocks = (args.x.rows + kGainBlockRows - 1) / kGainBlockRows;
  const bool with_gain = args.dgain.sum != nullptr;
  auto* sums = static_cast<double*>(
      with_gain ? stream.cpu().op_scratch(blocks * group * std::int64_t{sizeof(double)}) : nullptr);
  dispatch_compute(args.x.dtype, [&]<class T>() {
    parallel_tasks(stream, blocks, [&](std::int64_t block, int) {
      const std::int64_t first = block * kGainBlockRows;
      const std::int64_t end = std::min(args.x.rows, first + kGainBlockRows);
      // First the gain: dx may stand where dy stands.
      if (with_gain) gain_block<T>(args, first, end, sums + block * group);
      for (std::int64_t t = first; t < end; ++t) norm_backward_row<T>(args, t);
    });
    if (with_gain) add_gain_leaf<Acc<T>>(args, sums, blocks);
  });
}

}  // namespace arcus::cpu
