#include "kernels/gate.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/cpu/math.hpp"
#include "kernels/cpu/parallel.hpp"
#include "kernels/cpu/rows.hpp"
#include "kernels/cpu/top.hpp"

namespace arcus::cpu {
namespace {

constexpr std::int64_t kRowGrain = 16;
constexpr double kTiny = 1e-20;            ///< keeps sums of scores from being 0
constexpr std::int64_t kMaxGroups = 1024;  ///< group marks stand on the stack

// ---- logits ----------------------------------------------------------------------------------

/// One 64-byte register of A; narrower processors split it, with the same bits.
template <class A>
struct Wide {
  static constexpr int kCount = 64 / sizeof(A);
  typedef A Type __attribute__((vector_size(64)));  // NOLINT(modernize-use-using)
};

template <class A>
typename Wide<A>::Type load(const A* from, std::int64_t count) {
  typename Wide<A>::Type value{};
  std::memcpy(&value, from, static_cast<std::size_t>(count) * sizeof(A));
  return value;
}

constexpr int kTile = 4;  ///< tokens by experts whose sums stand in registers

/// out[i][j] = <x[i], w[j]>, n long. Each product has its own sums, so its bits do not depend on
/// its place in the tile. (A library product of so few columns is neither faster nor known to be
/// row-invariant.)
template <class A>
void dot_tile(const std::array<const A*, kTile>& x, const std::array<const A*, kTile>& w,
              std::int64_t n, A (&out)[kTile][kTile]) {
  using V = typename Wide<A>::Type;
  constexpr int kCount = Wide<A>::kCount;
  V sum[kTile][kTile] = {};
  const auto step = [&](std::int64_t at, std::int64_t count) {
    V wv[kTile];
    for (int j = 0; j < kTile; ++j) wv[j] = load(w[j] + at, count);
    for (int i = 0; i < kTile; ++i) {
      const V xv = load(x[i] + at, count);
      for (int j = 0; j < kTile; ++j) sum[i][j] += xv * wv[j];
    }
  };
  std::int64_t at = 0;
  for (; at + kCount <= n; at += kCount) step(at, kCount);
  if (at < n) step(at, n - at);
  for (int i = 0; i < kTile; ++i) {
    for (int j = 0; j < kTile; ++j) {
      A lane[kCount];
      std::memcpy(lane, &sum[i][j], sizeof(lane));
      for (int width = kCount / 2; width > 0; width /= 2) {
        for (int l = 0; l < width; ++l) lane[l] += lane[l + width];
      }
      out[i][j] = lane[0];
    }
  }
}

/// Rows `first`.. of a matrix, the last one repeated where fewer than a tile are left.
template <class A>
std::array<const A*, kTile> tile_rows(const ConstTensorView& matrix, std::int64_t first) {
  std::array<const A*, kTile> rows;
  for (int i = 0; i < kTile; ++i) rows[i] = matrix.row<A>(std::min(first + i, matrix.rows - 1));
  return rows;
}

/// Logits of tokens begin..end; false when one is not finite.
template <class A>
bool logits_of_rows(const GateLogits& args, const ConstTensorView& x, std::int64_t begin,
                    std::int64_t end) {
  const A* bias = args.bias.empty() ? nullptr : args.bias.as<A>();
  bool finite = true;
  for (std::int64_t t = begin; t < end; t += kTile) {
    for (std::int64_t e = 0; e < args.weight.rows; e += kTile) {
      A out[kTile][kTile];
      dot_tile(tile_rows<A>(x, t), tile_rows<A>(args.weight, e), x.cols, out);
      for (std::int64_t i = 0; i < std::min<std::int64_t>(kTile, end - t); ++i) {
        A* z = args.z.row<A>(t + i) + e;
        for (std::int64_t j = 0; j < std::min<std::int64_t>(kTile, args.weight.rows - e); ++j) {
          z[j] = bias == nullptr ? out[i][j] : out[i][j] + bias[e + j];
          finite = finite && std::isfinite(z[j]);
        }
      }
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
  if (score == Score::softmax) {
#pragma omp simd
    for (std::int64_t i = 0; i < num_experts; ++i) s[i] = exp(z[i] - max) / sum;
  } else {
#pragma omp simd
    for (std::int64_t i = 0; i < num_experts; ++i) s[i] = sigmoid(z[i]);
  }
  return max + std::log(sum);
}

// ---- selection -------------------------------------------------------------------------------

/// c = s + expert_bias of one token.
template <class A>
struct Choice {
  const A* s;
  const float* bias;
  A operator()(std::int64_t expert) const {
    return bias == nullptr ? s[expert] : s[expert] + static_cast<A>(bias[expert]);
  }
};

/// A group's score: the sum of its two largest c, or its largest.
template <class A>
A group_score_of(const Choice<A>& choice, std::int64_t begin, std::int64_t end, GroupScore score) {
  A first = -std::numeric_limits<A>::infinity();
  A second = first;
  for (std::int64_t e = begin; e < end; ++e) {
    const A c = choice(e);
    if (c > first) {
      second = first;
      first = c;
    } else if (c > second) {
      second = c;
    }
  }
  return score == GroupScore::max ? first : first + second;
}

template <class A>
void select_row(std::int32_t* topk_idx, const Choice<A>& choice, std::int64_t num_experts,
                const SelectTopk& args) {
  const std::int64_t topk = args.topk_idx.cols;
  if (args.n_group <= 1) {
    select_largest(
        num_experts, topk, choice, [](std::int64_t) { return true; },
        [&](std::int64_t j, std::int64_t e) { topk_idx[j] = static_cast<std::int32_t>(e); });
    return;
  }
  const std::int64_t width = num_experts / args.n_group;
  std::array<A, kMaxGroups> score;
  std::array<bool, kMaxGroups> kept;
  for (std::int64_t g = 0; g < args.n_group; ++g) {
    score[g] = group_score_of(choice, g * width, (g + 1) * width, args.group_score);
    kept[g] = false;
  }
  select_largest(
      args.n_group, args.topk_group, [&](std::int64_t g) { return score[g]; },
      [](std::int64_t) { return true; }, [&](std::int64_t, std::int64_t g) { kept[g] = true; });
  select_largest(
      num_experts, topk, choice, [&](std::int64_t e) { return kept[e / width]; },
      [&](std::int64_t j, std::int64_t e) { topk_idx[j] = static_cast<std::int32_t>(e); });
}

void check_selection(const SelectTopk& args) {
  const std::int64_t num_experts = args.s.cols;
  const std::int64_t topk = args.topk_idx.cols;
  ARCUS_CHECK(topk <= num_experts, "top {} of {} experts", topk, num_experts);
  ARCUS_CHECK(args.expert_bias.empty() || args.expert_bias.cols == num_experts,
              "expert_bias of {} for {} experts", args.expert_bias.cols, num_experts);
  if (args.n_group <= 1) return;
  ARCUS_CHECK(args.n_group <= kMaxGroups && num_experts % args.n_group == 0,
              "{} experts in {} groups", num_experts, args.n_group);
  const std::int64_t width = num_experts / args.n_group;
  ARCUS_CHECK(width > 1 || args.group_score == GroupScore::max,
              "top2_sum needs groups of two experts or more");
  ARCUS_CHECK(
      args.topk_group >= 1 && args.topk_group <= args.n_group && topk <= args.topk_group * width,
      "top {} inside {} groups of {} experts", topk, args.topk_group, width);
}

// ---- capacity --------------------------------------------------------------------------------

/// Fills expert_of_slot with topk_idx, counts demand; with `limit`, a slot behind the limit-th of
/// its expert, in the order choice rank, then token, is dropped.
void take_by_position(const ApplyCapacity& args, std::int64_t limit) {
  auto* demand = args.demand.as<std::int64_t>();
  const std::int64_t topk = args.topk_idx.cols;
  for (std::int64_t j = 0; j < topk; ++j) {
    for (std::int64_t t = 0; t < args.topk_idx.rows; ++t) {
      const std::int32_t expert = args.topk_idx.row<std::int32_t>(t)[j];
      const bool taken = expert >= 0 && demand[expert]++ < limit;
      args.expert_of_slot.row<std::int32_t>(t)[j] = taken ? expert : -1;
    }
  }
}

/// Drops from every expert that more than `capacity` want all but its largest scores, ties by
/// token.
template <class A>
void keep_best_scores(const ApplyCapacity& args) {
  const std::int64_t topk = args.topk_idx.cols;
  const std::int64_t num_slots = args.topk_idx.rows * topk;
  const auto* demand = args.demand.as<std::int64_t>();
  // Slots sorted by expert; slot = token * topk + choice rank. end[e] walks from the begin of the
  // expert's part to its end.
  auto* slots = args.scratch.as<std::int64_t>();
  auto* end = slots + std::max(num_slots, args.num_experts);
  std::int64_t begin = 0;
  for (std::int64_t e = 0; e < args.num_experts; ++e) {
    end[e] = begin;
    begin += demand[e];
  }
  for (std::int64_t slot = 0; slot < num_slots; ++slot) {
    const std::int32_t e = args.topk_idx.row<std::int32_t>(slot / topk)[slot % topk];
    if (e >= 0) slots[end[e]++] = slot;
  }
  for (std::int64_t e = 0; e < args.num_experts; ++e) {
    if (demand[e] <= args.capacity) continue;
    const auto score = [&](std::int64_t slot) { return ordered(args.s.row<A>(slot / topk)[e]); };
    std::int64_t* const last = slots + end[e];
    std::int64_t* const cut = last - demand[e] + args.capacity;
    std::nth_element(last - demand[e], cut, last, [&](std::int64_t a, std::int64_t b) {
      const A sa = score(a);
      const A sb = score(b);
      return sa > sb || (sa == sb && a < b);
    });
    for (const std::int64_t* slot = cut; slot != last; ++slot) {
      args.expert_of_slot.row<std::int32_t>(*slot / topk)[*slot % topk] = -1;
    }
  }
}

// ---- weights ---------------------------------------------------------------------------------

/// What the weights of one token are divided by: sum over its chosen (or only its kept) experts.
template <class A>
A renormalizer(const A* s, const std::int32_t* chosen, const std::int32_t* kept, std::int64_t topk,
               bool kept_only) {
  A sum(0);
  for (std::int64_t j = 0; j < topk; ++j) {
    if ((kept_only ? kept : chosen)[j] >= 0) sum += s[chosen[j]];
  }
  return sum + static_cast<A>(kTiny);
}

template <class A>
void weights_row(A* weight, const A* s, const std::int32_t* chosen, const std::int32_t* kept,
                 const CombineWeights& args) {
  const std::int64_t topk = args.weight.cols;
  const A sum =
      args.renormalize ? renormalizer(s, chosen, kept, topk, args.renormalize_after_drop) : A(1);
  for (std::int64_t j = 0; j < topk; ++j) {
    weight[j] = kept[j] < 0 ? A(0) : s[chosen[j]] / sum * static_cast<A>(args.scale);
  }
}

// ---- statistics ------------------------------------------------------------------------------

/// Adds one token to the counts of its `topk` largest s and to the sums of s / sum s; returns its
/// entropy.
template <class A>
double count_token(const A* s, std::int64_t num_experts, std::int64_t topk, double* count,
                   double* share) {
  select_largest(
      num_experts, topk, [=](std::int64_t e) { return s[e]; }, [](std::int64_t) { return true; },
      [=](std::int64_t, std::int64_t e) { count[e] += 1; });
  double sum = 0;
  for (std::int64_t e = 0; e < num_experts; ++e) sum += static_cast<double>(s[e]);
  sum += kTiny;
  double entropy = 0;
  for (std::int64_t e = 0; e < num_experts; ++e) {
    const double p = static_cast<double>(s[e]) / sum;
    share[e] += p;
    if (p > 0) entropy -= p * std::log(p);
  }
  return entropy;
}

/// E sum_i f_i P_i of `tokens` tokens; writes f.
template <class A>
double aux_of_group(A* fraction, const double* count, const double* share, std::int64_t num_experts,
                    std::int64_t topk, std::int64_t tokens) {
  double aux = 0;
  for (std::int64_t e = 0; e < num_experts; ++e) {
    const double f = count[e] / static_cast<double>(topk * tokens);
    fraction[e] = static_cast<A>(f);
    aux += f * (share[e] / static_cast<double>(tokens));
  }
  return static_cast<double>(num_experts) * aux;
}

template <class A>
void statistics(const GateStatistics& args) {
  const std::int64_t tokens = args.s.rows;
  const std::int64_t num_experts = args.s.cols;
  auto* count = args.scratch.as<double>();
  auto* share = count + num_experts;
  double aux = 0;
  double squares = 0;
  double entropy = 0;
  for (std::int64_t begin = 0, group = 0; begin < tokens; begin += args.tokens_per_group, ++group) {
    const std::int64_t end = std::min(tokens, begin + args.tokens_per_group);
    std::fill_n(count, 2 * num_experts, 0.0);
    for (std::int64_t t = begin; t < end; ++t) {
      entropy += count_token(args.s.row<A>(t), num_experts, args.topk, count, share);
      const auto lse = static_cast<double>(args.lse.row<A>(t)[0]);
      squares += lse * lse;
    }
    const double group_aux = aux_of_group(args.fraction.row<A>(group), count, share, num_experts,
                                          args.topk, end - begin);
    aux += group_aux * static_cast<double>(end - begin) / static_cast<double>(tokens);
  }
  *args.aux = aux;
  *args.z_loss = tokens > 0 ? squares / static_cast<double>(tokens) : 0;
  *args.entropy = entropy;
}

// ---- backward --------------------------------------------------------------------------------

/// ds of the chosen experts from the gradient of the combine weights; ds holds zeros.
template <class A>
void add_weight_gradient(A* ds, const A* dweight, const A* s, const std::int32_t* chosen,
                         const std::int32_t* kept, const GateBackward& args) {
  const std::int64_t topk = args.dweight.cols;
  const A scale = static_cast<A>(args.scale);
  const auto dw = [=](std::int64_t j) { return kept[j] < 0 ? A(0) : dweight[j]; };
  if (!args.renormalize) {
    for (std::int64_t j = 0; j < topk; ++j) {
      if (chosen[j] >= 0) ds[chosen[j]] = scale * dw(j);
    }
    return;
  }
  const A sum = renormalizer(s, chosen, kept, topk, args.renormalize_after_drop);
  A mean(0);
  for (std::int64_t j = 0; j < topk; ++j) {
    if (kept[j] >= 0) mean += dw(j) * s[chosen[j]];
  }
  mean /= sum;
  for (std::int64_t j = 0; j < topk; ++j) {
    if ((args.renormalize_after_drop ? kept : chosen)[j] >= 0) {
      ds[chosen[j]] = scale / sum * (dw(j) - mean);
    }
  }
}

/// ds += a (E / T) (f - sum_n f_n s_n / R) / R, with `factor` = a E / T.
template <class A>
void add_aux_gradient(A* ds, const A* s, const A* fraction, std::int64_t num_experts, A factor) {
  const A sum =
      sum_terms<A>(num_experts, [=](std::int64_t i) { return s[i]; }) + static_cast<A>(kTiny);
  const A mean = dot<A>(fraction, s, num_experts) / sum;
#pragma omp simd
  for (std::int64_t i = 0; i < num_experts; ++i) ds[i] += factor * (fraction[i] - mean) / sum;
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

template <class A>
void backward_row(const GateBackward& args, std::int64_t t) {
  const std::int64_t num_experts = args.s.cols;
  const auto tokens = static_cast<A>(args.s.rows);
  const A* s = args.s.row<A>(t);
  A* dz = args.dz.row<A>(t);
  std::fill_n(dz, num_experts, A(0));
  add_weight_gradient(dz, args.dweight.row<A>(t), s, args.topk_idx.row<std::int32_t>(t),
                      args.expert_of_slot.row<std::int32_t>(t), args);
  if (args.aux_coeff != 0) {
    // A group's share of the loss is its share of the tokens, so its own length cancels.
    const A factor = static_cast<A>(args.aux_coeff) * static_cast<A>(num_experts) / tokens;
    add_aux_gradient(dz, s, args.fraction.row<A>(t / args.tokens_per_group), num_experts, factor);
  }
  through_score(dz, s, num_experts, args.score);
  if (args.z_coeff != 0) {
    const A* z = args.z.row<A>(t);
    const A lse = args.lse.row<A>(t)[0];
    const A factor = static_cast<A>(args.z_coeff) * (A(2) / tokens) * lse;
#pragma omp simd
    for (std::int64_t i = 0; i < num_experts; ++i) dz[i] += factor * exp(z[i] - lse);
  }
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

void select_topk(Stream& stream, const SelectTopk& args) {
  check_selection(args);
  const float* bias = args.expert_bias.empty() ? nullptr : args.expert_bias.as<float>();
  dispatch_accumulate(args.s.dtype, [&]<class A>() {
    parallel_rows(stream, args.s.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) {
        select_row(args.topk_idx.row<std::int32_t>(t), Choice<A>{args.s.row<A>(t), bias},
                   args.s.cols, args);
      }
    });
  });
}

void apply_capacity(Stream&, const ApplyCapacity& args) {
  auto* demand = args.demand.as<std::int64_t>();
  std::fill_n(demand, args.num_experts, 0);
  const bool by_position = args.capacity > 0 && args.policy == DropPolicy::position;
  take_by_position(args, by_position ? args.capacity : std::numeric_limits<std::int64_t>::max());
  if (args.capacity == 0 || by_position) return;
  ARCUS_CHECK(args.scratch.cols >= 2 * std::max(args.topk_idx.size(), args.num_experts),
              "apply_capacity: scratch of {} for {} slots and {} experts", args.scratch.cols,
              args.topk_idx.size(), args.num_experts);
  dispatch_accumulate(args.s.dtype, [&]<class A>() { keep_best_scores<A>(args); });
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

void gate_statistics(Stream&, const GateStatistics& args) {
  ARCUS_CHECK(args.tokens_per_group > 0 || args.s.rows == 0, "gate_statistics: empty groups");
  dispatch_accumulate(args.s.dtype, [&]<class A>() { statistics<A>(args); });
}

void gate_backward(Stream& stream, const GateBackward& args) {
  dispatch_accumulate(args.s.dtype, [&]<class A>() {
    parallel_rows(stream, args.s.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) backward_row<A>(args, t);
    });
  });
}

}  // namespace arcus::cpu
