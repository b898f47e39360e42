#include "kernels/gate.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "kernels/cpu/chosen.hpp"
#include "kernels/cpu/few_rows.hpp"
#include "kernels/cpu/math.hpp"
#include "kernels/cpu/parallel.hpp"
#include "kernels/cpu/rows.hpp"

namespace arcus::cpu {
namespace {

constexpr std::int64_t kRowGrain = 16;

// ---- logits ----------------------------------------------------------------------------------

/// Logits of tokens begin..end; false when one is not finite. (A library product of so few columns
/// is neither faster nor known to be row-invariant.)
template <class A>
bool logits_of_rows(const GateLogits& args, const ConstTensorView& x, std::int64_t begin,
                    std::int64_t end) {
  const std::int64_t num_experts = args.weight.rows;
  const A* bias = args.bias.empty() ? nullptr : args.bias.as<A>();
  // Groups of tokens stay in the first-level cache while the experts go by.
  for (std::int64_t t = begin; t < end; t += kFewRowsGroup) {
    few_rows_product<A>(args.z.row<A>(t), args.z.stride, x.row<A>(t), x.stride,
                        std::min(kFewRowsGroup, end - t), args.weight.as<A>(), args.weight.stride,
                        num_experts, x.cols);
  }
  bool finite = true;
  for (std::int64_t t = begin; t < end; ++t) {
    A* z = args.z.row<A>(t);
    for (std::int64_t e = 0; e < num_experts; ++e) {
      if (bias != nullptr) z[e] += bias[e];
      finite = finite && std::isfinite(z[e]);
    }
  }
  return finite;
}

template <class T, class A = Acc<T>>
void widen_rows(const GateLogits& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t t = begin; t < end; ++t) {
    const T* x = args.x.row<T>(t);
    A* wide = args.x_wide.row<A>(t);
#pragma omp simd
    for (std::int64_t i = 0; i < args.x.cols; ++i) wide[i] = static_cast<A>(x[i]);
  }
}

// ---- scores ----------------------------------------------------------------------------------

template <class A>
A scores_row(A* s, const A* z, std::int64_t num_experts, Score score) {
  const A max = max_terms<A>(num_experts, -std::numeric_limits<A>::infinity(),
                             [=](std::int64_t i) { return z[i]; });
  const A sum = sum_terms<A>(num_experts, [=](std::int64_t i) { return exp(z[i] - max); });
  if (score == Score::softmax) {  // NOLINT(bugprone-branch-clone): it does not look into the loops
#pragma omp simd
    for (std::int64_t i = 0; i < num_experts; ++i) s[i] = exp(z[i] - max) / sum;
  } else {
#pragma omp simd
    for (std::int64_t i = 0; i < num_experts; ++i) s[i] = sigmoid(z[i]);
  }
  return max + std::log(sum);
}

// ---- weights ---------------------------------------------------------------------------------

template <class A>
void weights_row(A* weight, const A* s, const std::int32_t* chosen, const std::int32_t* kept,
                 const CombineWeights& args) {
  const std::int64_t topk = args.weight.cols;
  const A sum = args.renormalize
                    ? sum_of_chosen(s, chosen, args.renormalize_after_drop ? kept : chosen, topk)
                    : A(1);
  for (std::int64_t j = 0; j < topk; ++j) {
    weight[j] = kept[j] < 0 ? A(0) : s[chosen[j]] / sum * static_cast<A>(args.scale);
  }
}

// ---- backward --------------------------------------------------------------------------------

/// ds of the chosen experts from the gradient of the combine weights; ds holds zeros.
template <class A>
void weights_row_backward(A* ds, const A* dweight, const A* s, const std::int32_t* chosen,
                          const std::int32_t* kept, const CombineWeightsBackward& args) {
  const std::int64_t topk = args.dweight.cols;
  const A scale = static_cast<A>(args.scale);
  const auto dw = [=](std::int64_t j) { return kept[j] < 0 ? A(0) : dweight[j]; };
  if (!args.renormalize) {
    for (std::int64_t j = 0; j < topk; ++j) {
      if (chosen[j] >= 0) ds[chosen[j]] = scale * dw(j);
    }
    return;
  }
  const std::int32_t* counted = args.renormalize_after_drop ? kept : chosen;
  const A sum = sum_of_chosen(s, chosen, counted, topk);
  A mean(0);
  for (std::int64_t j = 0; j < topk; ++j) {
    if (kept[j] >= 0) mean += dw(j) * s[chosen[j]];
  }
  mean /= sum;
  for (std::int64_t j = 0; j < topk; ++j) {
    if (counted[j] >= 0) ds[chosen[j]] = scale / sum * (dw(j) - mean);
  }
}

template <class A>
void through_score(A* dz, const A* s, std::int64_t num_experts, Score score) {
  if (score == Score::softmax) {
    const A mean = dot<A>(s, dz, num_experts);
#pragma omp simd
    for (std::int64_t i = 0; i < num_experts; ++i) dz[i] = s[i] * (dz[i] - mean);
  } else {
#pragma omp simd
    for (std::int64_t i = 0; i < num_experts; ++i) dz[i] = dz[i] * s[i] * (A(1) - s[i]);
  }
}

/// dz += factor softmax(z), the z loss.
template <class A>
void add_z_gradient(A* dz, const A* z, A lse, std::int64_t num_experts, A factor) {
#pragma omp simd
  for (std::int64_t i = 0; i < num_experts; ++i) dz[i] += factor * exp(z[i] - lse);
}

}  // namespace

void gate_logits(Stream& stream, const GateLogits& args) {
  ARCUS_CHECK(args.x.cols == args.weight.cols && args.z.cols == args.weight.rows,
              "gate: x of {}, weight {} x {}, z of {} columns", args.x.cols, args.weight.rows,
              args.weight.cols, args.z.cols);
  dispatch_compute(args.x.dtype, [&]<class T>() {
    using A = Acc<T>;
    constexpr bool kWiden = !std::is_same_v<T, A>;
    const ConstTensorView x = kWiden ? ConstTensorView(args.x_wide) : args.x;
    parallel_rows(stream, args.x.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
      if constexpr (kWiden) widen_rows<T>(args, begin, end);
      if (!logits_of_rows<A>(args, x, begin, end) && args.flag != nullptr) {
        raise_bad_leaf(*args.flag, args.flag_key);
      }
    });
  });
}

void gate_scores(Stream& stream, const GateScores& args) {
  dispatch_accumulate(args.z.dtype, [&]<class A>() {
    parallel_rows(stream, args.z.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) {
        args.lse.row<A>(t)[0] =
            scores_row(args.s.row<A>(t), args.z.row<A>(t), args.z.cols, args.score);
      }
    });
  });
}

void combine_weights(Stream& stream, const CombineWeights& args) {
  dispatch_accumulate(args.s.dtype, [&]<class A>() {
    parallel_rows(stream, args.s.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) {
        weights_row(args.weight.row<A>(t), args.s.row<A>(t), args.topk_idx.row<std::int32_t>(t),
                    args.expert_of_slot.row<std::int32_t>(t), args);
      }
    });
  });
}

void combine_weights_backward(Stream& stream, const CombineWeightsBackward& args) {
  dispatch_accumulate(args.s.dtype, [&]<class A>() {
    parallel_rows(stream, args.s.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) {
        std::fill_n(args.ds.row<A>(t), args.s.cols, A(0));
        weights_row_backward(args.ds.row<A>(t), args.dweight.row<A>(t), args.s.row<A>(t),
                             args.topk_idx.row<std::int32_t>(t),
                             args.expert_of_slot.row<std::int32_t>(t), args);
      }
    });
  });
}

void gate_scores_backward(Stream& stream, const GateScoresBackward& args) {
  dispatch_accumulate(args.s.dtype, [&]<class A>() {
    const std::int64_t num_experts = args.s.cols;
    const A z_factor = static_cast<A>(args.z_coeff) * (A(2) / static_cast<A>(args.s.rows));
    parallel_rows(stream, args.s.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) {
        A* dz = args.dz.row<A>(t);
        through_score(dz, args.s.row<A>(t), num_experts, args.score);
        if (args.z_coeff == 0) continue;
        const A lse = args.lse.row<A>(t)[0];
        add_z_gradient(dz, args.z.row<A>(t), lse, num_experts, z_factor * lse);
      }
    });
  });
}

}  // namespace arcus::cpu
