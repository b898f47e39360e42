#include "kernels/balance.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "kernels/cpu/chosen.hpp"
#include "kernels/cpu/column_rank.hpp"
#include "kernels/cpu/math.hpp"
#include "kernels/cpu/parallel.hpp"
#include "kernels/cpu/rows.hpp"
#include "kernels/cpu/top.hpp"
#include "kernels/cpu/variation.hpp"

namespace arcus::cpu {
namespace {

constexpr std::int64_t kRowGrain = 16;
/// Rows whose intermediate values stand on the stack: rows of a chunk are worked on in parallel,
/// then what they give is added in token order.
constexpr std::int64_t kChunkRows = 512;

template <class A>
double row_sum(const A* s, std::int64_t num_experts) {
  return sum_terms<double>(num_experts, [=](std::int64_t e) { return static_cast<double>(s[e]); }) +
         kTiny;
}

// ---- statistics ------------------------------------------------------------------------------

/// -sum p ln p with p = s / sum s, as ln (sum s) - (sum s ln s) / sum s.
template <class A>
double row_entropy(const A* s, std::int64_t num_experts) {
  const double sum = row_sum(s, num_experts);
  const double weighted = sum_terms<double>(num_experts, [=](std::int64_t e) {
    // What is smaller adds nothing; 0 ln 0 = 0.
    constexpr A kLeast = std::numeric_limits<A>::min();
    return static_cast<double>(s[e]) * static_cast<double>(log(s[e] > kLeast ? s[e] : kLeast));
  });
  const double entropy = std::log(sum) - weighted / sum;
  return entropy < 0 ? 0 : entropy;  // a rounding below; a NaN stays one
}

template <class A>
void statistics(Stream& stream, const GateStatistics& args) {
  const std::int64_t num_experts = args.s.cols;
  auto* counts = args.counts.as<std::int64_t>();
  std::fill_n(counts, num_experts, 0);
  double squares = 0;
  double entropy = 0;
  std::array<double, kChunkRows> entropy_of_row;
  std::array<Rank<A>, kChunkRows> last;
  for (std::int64_t first = 0; first < args.s.rows; first += kChunkRows) {
    const std::int64_t rows = std::min(kChunkRows, args.s.rows - first);
    parallel_rows(stream, rows, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) {
        const A* s = args.s.row<A>(first + t);
        entropy_of_row[t] = row_entropy(s, num_experts);
        last[t] = nth_largest(num_experts, args.topk, [=](std::int64_t e) { return s[e]; });
      }
    });
    parallel_column_blocks(stream, num_experts, [&](std::int64_t begin, std::int64_t count) {
      for (std::int64_t t = 0; t < rows; ++t) {
        const A* s = args.s.row<A>(first + t) + begin;
        for (std::int64_t c = 0; c < count; ++c) {
          counts[begin + c] += last[t].covers(s[c], begin + c) ? 1 : 0;
        }
      }
    });
    for (std::int64_t t = 0; t < rows; ++t) {
      const auto lse = static_cast<double>(args.lse.row<A>(first + t)[0]);
      squares += lse * lse;
      entropy += entropy_of_row[t];
    }
  }
  *args.z_loss = args.s.rows > 0 ? squares / static_cast<double>(args.s.rows) : 0;
  *args.entropy = entropy;
}

// ---- aux loss --------------------------------------------------------------------------------

void check_groups(std::span<const std::int64_t> offsets, const ConstTensorView& fraction,
                  const ConstTensorView& s) {
  ARCUS_CHECK(!offsets.empty() && offsets.front() == 0 && offsets.back() == s.rows &&
                  std::is_sorted(offsets.begin(), offsets.end()),
              "aux_loss: groups do not run from 0 to {} tokens", s.rows);
  ARCUS_CHECK(
      fraction.rows + 1 >= static_cast<std::int64_t>(offsets.size()) && fraction.cols == s.cols,
      "aux_loss: fraction of {} x {} for {} groups and {} experts", fraction.rows, fraction.cols,
      offsets.size() - 1, s.cols);
}

/// count[e] = tokens begin..end whose K largest s hold e (unless f is given); share[e] = sum of
/// s / sum s.
template <class A>
void sum_group(Stream& stream, const AuxLoss& args, std::int64_t begin, std::int64_t end,
               double* count, double* share) {
  const std::int64_t num_experts = args.s.cols;
  std::fill_n(count, num_experts, 0.0);
  std::fill_n(share, num_experts, 0.0);
  std::array<double, kChunkRows> sum;
  std::array<Rank<A>, kChunkRows> last;
  for (std::int64_t first = begin; first < end; first += kChunkRows) {
    const std::int64_t rows = std::min(kChunkRows, end - first);
    parallel_rows(stream, rows, kRowGrain, [&](std::int64_t row_begin, std::int64_t row_end, int) {
      for (std::int64_t t = row_begin; t < row_end; ++t) {
        const A* s = args.s.row<A>(first + t);
        sum[t] = row_sum(s, num_experts);
        if (args.given) continue;
        last[t] = nth_largest(num_experts, args.topk, [=](std::int64_t e) { return s[e]; });
      }
    });
    parallel_column_blocks(stream, num_experts, [&](std::int64_t col, std::int64_t cols) {
      for (std::int64_t t = 0; t < rows; ++t) {
        const A* s = args.s.row<A>(first + t) + col;
        for (std::int64_t c = 0; c < cols; ++c) {
          share[col + c] += static_cast<double>(s[c]) / sum[t];
        }
        if (args.given) continue;
        for (std::int64_t c = 0; c < cols; ++c) {
          count[col + c] += last[t].covers(s[c], col + c) ? 1 : 0;
        }
      }
    });
  }
}

/// E sum_i f_i P_i of a group of `tokens` tokens; writes f unless it is given.
template <class A>
double aux_of_group(const AuxLoss& args, A* fraction, const double* count, const double* share,
                    std::int64_t tokens) {
  double aux = 0;
  for (std::int64_t e = 0; e < args.s.cols; ++e) {
    double f = static_cast<double>(fraction[e]);
    if (!args.given) {
      f = count[e] / static_cast<double>(args.topk * tokens);
      fraction[e] = static_cast<A>(f);
    }
    aux += f * (share[e] / static_cast<double>(tokens));
  }
  return static_cast<double>(args.s.cols) * aux;
}

template <class A>
double aux_of_groups(Stream& stream, const AuxLoss& args) {
  auto* count = args.scratch.as<double>();
  auto* share = count + args.s.cols;
  const auto tokens = static_cast<double>(args.s.rows);
  double aux = 0;
  for (std::size_t group = 0; group + 1 < args.group_offsets.size(); ++group) {
    const std::int64_t begin = args.group_offsets[group];
    const std::int64_t end = args.group_offsets[group + 1];
    A* fraction = args.fraction.row<A>(static_cast<std::int64_t>(group));
    if (begin == end) {
      if (!args.given) std::fill_n(fraction, args.s.cols, A(0));
      continue;
    }
    sum_group<A>(stream, args, begin, end, count, share);
    const double weight = args.group_weights.empty() ? static_cast<double>(end - begin) / tokens
                                                     : args.group_weights[group];
    aux += aux_of_group(args, fraction, count, share, end - begin) * weight;
  }
  return aux;
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

// ---- importance ------------------------------------------------------------------------------

template <class A>
void sum_importance(double* importance, const ImportanceLoss& args) {
  const std::int64_t topk = args.topk_idx.cols;
  std::fill_n(importance, args.s.cols, 0.0);
  for (std::int64_t t = 0; t < args.s.rows; ++t) {
    const A* s = args.s.row<A>(t);
    const auto* chosen = args.topk_idx.row<std::int32_t>(t);
    const A sum = args.renormalize ? sum_of_chosen(s, chosen, chosen, topk) : A(1);
    for (std::int64_t j = 0; j < topk; ++j) {
      if (chosen[j] >= 0) importance[chosen[j]] += static_cast<double>(s[chosen[j]] / sum);
    }
  }
}

/// ds of one token from dv_j = coeff dCV2/dI of the expert, v = s (/ sum of the chosen s).
template <class A>
void add_importance_gradient(A* ds, const A* s, const std::int32_t* chosen,
                             const ImportanceLossBackward& args) {
  const std::int64_t topk = args.topk_idx.cols;
  const auto* derivative = args.derivative.as<double>();
  const auto dv = [=](std::int64_t j) {
    return chosen[j] < 0 ? A(0) : static_cast<A>(args.coeff * derivative[chosen[j]]);
  };
  A sum(1);
  A mean(0);
  if (args.renormalize) {
    sum = sum_of_chosen(s, chosen, chosen, topk);
    for (std::int64_t j = 0; j < topk; ++j) {
      if (chosen[j] >= 0) mean += dv(j) * s[chosen[j]];
    }
    mean /= sum;
  }
  for (std::int64_t j = 0; j < topk; ++j) {
    if (chosen[j] >= 0) ds[chosen[j]] += (dv(j) - mean) / sum;
  }
}

}  // namespace

void gate_statistics(Stream& stream, const GateStatistics& args) {
  ARCUS_CHECK(args.counts.size() == args.s.cols && args.topk >= 1 && args.topk <= args.s.cols,
              "gate_statistics: top {} of {} experts, {} counts", args.topk, args.s.cols,
              args.counts.size());
  dispatch_accumulate(args.s.dtype, [&]<class A>() { statistics<A>(stream, args); });
}

void aux_loss(Stream& stream, const AuxLoss& args) {
  check_groups(args.group_offsets, args.fraction, args.s);
  ARCUS_CHECK(args.scratch.size() >= 2 * args.s.cols, "aux_loss: scratch of {} for {} experts",
              args.scratch.size(), args.s.cols);
  ARCUS_CHECK(args.given || (args.topk >= 1 && args.topk <= args.s.cols),
              "aux_loss: top {} of {} experts", args.topk, args.s.cols);
  dispatch_accumulate(args.s.dtype, [&]<class A>() { *args.aux = aux_of_groups<A>(stream, args); });
}

void aux_loss_backward(Stream& stream, const AuxLossBackward& args) {
  check_groups(args.group_offsets, args.fraction, args.s);
  dispatch_accumulate(args.s.dtype, [&]<class A>() {
    const auto offsets = args.group_offsets;
    const auto factor_of = [&](std::size_t group) {
      // Without weights a group's share of the loss is its share of the tokens: its length cancels.
      if (args.group_weights.empty()) {
        return static_cast<A>(args.coeff) * static_cast<A>(args.s.cols) /
               static_cast<A>(args.s.rows);
      }
      return static_cast<A>(args.coeff * args.group_weights[group]) * static_cast<A>(args.s.cols) /
             static_cast<A>(offsets[group + 1] - offsets[group]);
    };
    parallel_rows(stream, args.s.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
      std::int64_t group =
          std::upper_bound(offsets.begin(), offsets.end(), begin) - offsets.begin() - 1;
      for (std::int64_t t = begin; t < end; ++t) {
        while (t >= offsets[static_cast<std::size_t>(group + 1)]) ++group;
        add_aux_gradient(args.ds.row<A>(t), args.s.row<A>(t), args.fraction.row<A>(group),
                         args.s.cols, factor_of(static_cast<std::size_t>(group)));
      }
    });
  });
}

void importance_loss(Stream&, const ImportanceLoss& args) {
  ARCUS_CHECK(args.derivative.size() == args.s.cols, "importance_loss: {} sums for {} experts",
              args.derivative.size(), args.s.cols);
  auto* importance = args.derivative.as<double>();
  dispatch_accumulate(args.s.dtype, [&]<class A>() { sum_importance<A>(importance, args); });
  *args.cv2 = take_variation(importance, args.s.cols);
}

void importance_loss_backward(Stream& stream, const ImportanceLossBackward& args) {
  dispatch_accumulate(args.s.dtype, [&]<class A>() {
    parallel_rows(stream, args.s.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) {
        add_importance_gradient(args.ds.row<A>(t), args.s.row<A>(t),
                                args.topk_idx.row<std::int32_t>(t), args);
      }
    });
  });
}

void quantile_scores(Stream& stream, const QuantileScores& args) {
  const std::int64_t num_experts = args.s.cols;
  ARCUS_CHECK(args.topk < num_experts && args.expert_bias.cols == num_experts,
              "quantile_scores: top {} of {} experts, bias of {}", args.topk, num_experts,
              args.expert_bias.cols);
  const auto* bias = args.expert_bias.as<float>();
  dispatch_accumulate(args.s.dtype, [&]<class A>() {
    parallel_rows(stream, args.s.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) {
        const A* s = args.s.row<A>(t);
        const A alpha = nth_largest(num_experts, args.topk + 1, [=](std::int64_t e) {
                          return s[e] + static_cast<A>(bias[e]);
                        }).value;
        auto* u = args.u.row<float>(t);
        for (std::int64_t e = 0; e < num_experts; ++e) u[e] = static_cast<float>(s[e] - alpha);
      }
    });
  });
}

void column_quantiles(Stream& stream, const ColumnQuantiles& args) {
  ARCUS_CHECK(args.rank >= 1 && args.rank <= args.u.rows && args.q.size() == args.u.cols,
              "column_quantiles: rank {} of {} values, {} columns, {} results", args.rank,
              args.u.rows, args.u.cols, args.q.size());
  auto* q = args.q.as<float>();
  parallel_column_blocks(stream, args.u.cols, [&](std::int64_t begin, std::int64_t count) {
    std::array<RankedKey<float>, kRankedColumns> ranked;
    rank_columns<float>(ranked, args.u, begin, count, args.rank);
    for (std::int64_t c = 0; c < count; ++c) {
      q[begin + c] = OrderedKey<float>::value(ranked[c].key);
    }
  });
}

}  // namespace arcus::cpu
