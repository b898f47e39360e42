#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "src/base/rng.hpp"

/// What src/model/ROUTING.md and the contract say, in double, straight from the formulas: slow and
/// obvious, for kernels and model alike. T tokens, E experts, K choices.
namespace arcus::reference {

using Row = std::vector<double>;
using Table = std::vector<Row>;                 ///< [T][E] and the like
using Choices = std::vector<std::vector<int>>;  ///< [T][K], -1 = none

inline double sum(const Row& row) { return std::accumulate(row.begin(), row.end(), 0.0); }
inline double largest(const Row& row) { return *std::max_element(row.begin(), row.end()); }

// ---- scores ----------------------------------------------------------------------------------

inline double log_sum_exp(const Row& z) {
  double total = 0;
  for (const double value : z) total += std::exp(value - largest(z));
  return largest(z) + std::log(total);
}
inline Row softmax(const Row& z) {
  Row s;
  for (const double value : z) s.push_back(std::exp(value - log_sum_exp(z)));
  return s;
}
inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
inline double softplus(double x) { return x > 30 ? x : std::log1p(std::exp(x)); }

/// exp(min(theta, ln 100)) cos(x, w).
inline double cosine_logit(const Row& x, const Row& w, double theta) {
  double xx = 0, ww = 0, xw = 0;
  for (std::size_t h = 0; h < x.size(); ++h) {
    xx += x[h] * x[h];
    ww += w[h] * w[h];
    xw += x[h] * w[h];
  }
  return std::exp(std::min(theta, std::log(100.0))) * xw /
         (std::max(std::sqrt(xx), 1e-12) * std::max(std::sqrt(ww), 1e-12));
}

// ---- noise -----------------------------------------------------------------------------------

/// Number `element` of call space `step`, as words: 24 bits of word 0.
inline double uniform(std::uint64_t key, std::uint64_t step, std::uint64_t element) {
  const auto low = static_cast<std::uint32_t>(element);
  const auto high = static_cast<std::uint32_t>(element >> 32);
  const auto w = philox4x32(
      {low, high, static_cast<std::uint32_t>(step), static_cast<std::uint32_t>(step >> 32)}, key);
  return (w[0] >> 8) / 16777216.0;
}
/// Box-Muller on the words of call (step, element div 4); within f32 rounding of the generator.
inline double normal(std::uint64_t key, std::uint64_t step, std::uint64_t element) {
  const std::uint64_t call = element / 4;
  const auto w =
      philox4x32({static_cast<std::uint32_t>(call), static_cast<std::uint32_t>(call >> 32),
                  static_cast<std::uint32_t>(step), static_cast<std::uint32_t>(step >> 32)},
                 key);
  const std::size_t pair = element % 4 < 2 ? 0 : 2;
  const double radius = std::sqrt(-2 * std::log((w[pair] + 1.0) / 4294967296.0));
  const double angle = 2 * std::acos(-1.0) * w[pair + 1] / 4294967296.0;
  return element % 2 == 0 ? radius * std::cos(angle) : radius * std::sin(angle);
}

// ---- selection -------------------------------------------------------------------------------

/// Numbers 0..n-1 by descending value, equal ones in ascending order.
inline std::vector<int> by_value(const Row& value) {
  std::vector<int> order(value.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return value[static_cast<std::size_t>(a)] > value[static_cast<std::size_t>(b)];
  });
  return order;
}
inline std::vector<int> topk(const Row& c, std::int64_t k) {
  auto order = by_value(c);
  order.resize(static_cast<std::size_t>(k));
  return order;
}
/// Inside the topk_group groups with the largest sum of two c (or the largest c).
inline std::vector<int> topk_in_groups(const Row& c, std::int64_t k, std::int64_t n_group,
                                       std::int64_t topk_group, bool top2_sum) {
  const auto width = static_cast<std::int64_t>(c.size()) / n_group;
  Row score;
  for (std::int64_t g = 0; g < n_group; ++g) {
    Row members(c.begin() + g * width, c.begin() + (g + 1) * width);
    std::sort(members.rbegin(), members.rend());
    score.push_back(top2_sum ? members[0] + members[1] : members[0]);
  }
  const auto kept = topk(score, topk_group);
  std::vector<int> chosen;
  for (const int e : by_value(c)) {
    if (std::find(kept.begin(), kept.end(), e / width) != kept.end()) chosen.push_back(e);
  }
  chosen.resize(static_cast<std::size_t>(k));
  return chosen;
}

/// Is the second choice wanted? In f32, as the contract says.
inline bool second_wanted(std::uint64_t key, std::uint64_t step, std::uint64_t token, float s1,
                          float s2) {
  return uniform(key, step, token) < static_cast<double>(2.0F * s2 / (s1 + s2 + 1e-20F));
}

inline std::vector<int> hash_choices(std::uint64_t key, int token_id, std::int64_t experts,
                                     std::int64_t k) {
  const auto w = philox4x32({static_cast<std::uint32_t>(token_id), 0, 0, 0}, key);
  const KeyedPermutation permutation(static_cast<std::uint64_t>(experts),
                                     w[0] + (static_cast<std::uint64_t>(w[1]) << 32));
  std::vector<int> chosen;
  for (std::int64_t j = 0; j < k; ++j) {
    chosen.push_back(static_cast<int>(permutation(static_cast<std::uint64_t>(j))));
  }
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

/// ln q of Sinkhorn's algorithm.
inline Row sinkhorn_log_scaling(const Table& z, std::int64_t iterations) {
  const std::size_t tokens = z.size(), experts = z[0].size();
  Table a = z;
  for (auto& row : a) {
    const double most = largest(row);
    for (double& value : row) value = std::exp(value - most);
  }
  Row q(experts, 1), r(tokens);
  for (std::int64_t i = 0; i < iterations; ++i) {
    for (std::size_t t = 0; t < tokens; ++t) {
      double total = 0;
      for (std::size_t e = 0; e < experts; ++e) total += q[e] * a[t][e];
      r[t] = 1 / (static_cast<double>(tokens) * (total + 1e-8));
    }
    for (std::size_t e = 0; e < experts; ++e) {
      double total = 0;
      for (std::size_t t = 0; t < tokens; ++t) total += r[t] * a[t][e];
      q[e] = 1 / (static_cast<double>(experts) * (total + 1e-8));
    }
  }
  for (double& value : q) value = std::log(value);
  return q;
}
inline Choices sinkhorn(Table z, std::int64_t k, std::int64_t iterations) {
  if (z.empty()) return {};
  const Row log_q = sinkhorn_log_scaling(z, iterations);
  Choices chosen;
  for (auto& row : z) {
    for (std::size_t e = 0; e < row.size(); ++e) row[e] += log_q[e];
    chosen.push_back(topk(row, k));
  }
  return chosen;
}

/// Each expert its `capacity` largest s; rows of E, ascending, then -1.
inline Choices expert_choice(const Table& s, std::int64_t capacity) {
  Choices chosen(s.size());
  const std::size_t experts = s.empty() ? 0 : s[0].size();
  for (std::size_t e = 0; e < experts; ++e) {
    Row column;
    for (const Row& row : s) column.push_back(row[e]);
    for (const int t : topk(column, std::min<std::int64_t>(capacity, std::ssize(column)))) {
      chosen[static_cast<std::size_t>(t)].push_back(static_cast<int>(e));
    }
  }
  for (auto& row : chosen) row.resize(experts, -1);
  return chosen;
}

/// What stays of `wanted` when each expert takes `capacity` (0 = all): by (rank, token), or by
/// descending s.
inline Choices kept_choices(const Choices& wanted, const Table& s, std::int64_t capacity,
                            bool by_score) {
  struct Slot {
    double s;
    std::size_t token, rank;
  };
  Choices kept = wanted;
  const std::size_t experts = s.empty() ? 0 : s[0].size();
  for (std::size_t e = 0; e < experts && capacity > 0; ++e) {
    std::vector<Slot> slots;
    for (std::size_t t = 0; t < wanted.size(); ++t) {
      for (std::size_t j = 0; j < wanted[t].size(); ++j) {
        if (wanted[t][j] == static_cast<int>(e)) slots.push_back({s[t][e], t, j});
      }
    }
    std::sort(slots.begin(), slots.end(), [&](const Slot& a, const Slot& b) {
      if (by_score && a.s != b.s) return a.s > b.s;
      if (!by_score && a.rank != b.rank) return a.rank < b.rank;
      return a.token != b.token ? a.token < b.token : a.rank < b.rank;
    });
    for (auto i = static_cast<std::size_t>(capacity); i < slots.size(); ++i) {
      kept[slots[i].token][slots[i].rank] = -1;
    }
  }
  return kept;
}

// ---- weights ---------------------------------------------------------------------------------

/// w of one token before drops and scale: s of the chosen, renormalised over `counted`.
inline Row choice_values(const Row& s, const std::vector<int>& chosen,
                         const std::vector<int>& counted, bool renormalize) {
  double total = 1e-20;
  for (std::size_t j = 0; j < chosen.size(); ++j) {
    if (counted[j] >= 0) total += s[static_cast<std::size_t>(chosen[j])];
  }
  Row v;
  for (const int e : chosen) {
    v.push_back(e < 0 ? 0 : s[static_cast<std::size_t>(e)] / (renormalize ? total : 1));
  }
  return v;
}
/// Combine weights of one token.
inline Row combine_weights(const Row& s, const std::vector<int>& chosen,
                           const std::vector<int>& kept, bool renormalize, bool after_drop,
                           double scale) {
  Row w = choice_values(s, chosen, after_drop ? kept : chosen, renormalize);
  for (std::size_t j = 0; j < w.size(); ++j) w[j] = kept[j] < 0 ? 0 : w[j] * scale;
  return w;
}

// ---- balance ---------------------------------------------------------------------------------

/// Tokens whose k largest s hold the expert.
inline Row unbiased_counts(const Table& s, std::int64_t experts, std::int64_t k) {
  Row counts(static_cast<std::size_t>(experts));
  for (const Row& row : s) {
    for (const int e : topk(row, k)) counts[static_cast<std::size_t>(e)] += 1;
  }
  return counts;
}
/// f of a group of tokens.
inline Row fractions(const Table& s, std::int64_t experts, std::int64_t k) {
  Row f = unbiased_counts(s, experts, k);
  for (double& value : f) value /= static_cast<double>(k) * static_cast<double>(s.size());
  return f;
}
/// E sum_i f_i P_i of one group of tokens.
inline double aux(const Table& s, const Row& f) {
  double total = 0;
  for (const Row& row : s) {
    for (std::size_t e = 0; e < row.size(); ++e) total += f[e] * row[e] / (sum(row) + 1e-20);
  }
  return s.empty() ? 0 : static_cast<double>(f.size()) * total / static_cast<double>(s.size());
}
inline double entropy(const Row& s) {
  double total = 0;
  for (const double value : s) {
    const double p = value / (sum(s) + 1e-20);
    if (p > 0) total -= p * std::log(p);
  }
  return total;
}
/// The squared coefficient of variation: variance over squared mean.
inline double cv2(const Row& u) {
  const auto n = static_cast<double>(u.size());
  const double mean = sum(u) / n;
  double variance = 0;
  for (const double value : u) variance += (value - mean) * (value - mean) / n;
  return mean == 0 ? 0 : variance / (mean * mean);
}
inline Row importance(const Table& s, const Choices& chosen, std::int64_t experts,
                      bool renormalize) {
  Row total(static_cast<std::size_t>(experts));
  for (std::size_t t = 0; t < s.size(); ++t) {
    const Row v = choice_values(s[t], chosen[t], chosen[t], renormalize);
    for (std::size_t j = 0; j < v.size(); ++j) {
      if (chosen[t][j] >= 0) total[static_cast<std::size_t>(chosen[t][j])] += v[j];
    }
  }
  return total;
}
/// sum_t Phi((z - h) / (amount softplus(n))), h the k-th largest z' among the others.
inline Row load(const Table& z, const Table& z_noisy, const Table& n, double amount, std::int64_t k,
                std::int64_t experts) {
  Row total(static_cast<std::size_t>(experts));
  for (std::size_t t = 0; t < z.size(); ++t) {
    for (std::size_t e = 0; e < z[t].size(); ++e) {
      Row others = z_noisy[t];
      others.erase(others.begin() + static_cast<std::ptrdiff_t>(e));
      std::sort(others.rbegin(), others.rend());
      const double h = others[static_cast<std::size_t>(k - 1)];
      const double y = (z[t][e] - h) / (amount * softplus(n[t][e]));
      total[e] += std::erfc(-y / std::sqrt(2.0)) / 2;
    }
  }
  return total;
}
/// s - the (k+1)-th largest s + b.
inline Row quantile_scores(Row s, const Row& bias, std::int64_t k) {
  Row c = s;
  for (std::size_t e = 0; e < c.size(); ++e) c[e] += bias[e];
  std::sort(c.rbegin(), c.rend());
  for (double& value : s) value -= c[static_cast<std::size_t>(k)];
  return s;
}

}  // namespace arcus::reference
