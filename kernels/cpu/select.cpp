#include "kernels/select.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "kernels/cpu/chosen.hpp"
#include "kernels/cpu/column_rank.hpp"
#include "kernels/cpu/parallel.hpp"
#include "kernels/cpu/top.hpp"
#include "src/base/rng.hpp"

namespace arcus::cpu {
namespace {

constexpr std::int64_t kRowGrain = 16;
constexpr std::int64_t kMaxGroups = 1024;  ///< group marks stand on the stack

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

// ---- draws and hashes -----------------------------------------------------------------------

/// True if the second choice of a token is taken up: u < 2 s_2 / (s_1 + s_2 + 1e-20) in f32.
template <class A>
bool takes_second(const Rng& rng, const TokenDraws& draws, std::int64_t t, A s1, A s2) {
  const auto first = static_cast<float>(s1);
  const auto second = static_cast<float>(s2);
  const float chance = 2.0F * second / (first + second + static_cast<float>(kTiny));
  return rng.uniform(static_cast<std::uint64_t>(draws.step),
                     static_cast<std::uint64_t>(draws.first_token + t)) < chance;
}

void hash_row(std::int32_t* topk_idx, std::int64_t topk, std::int64_t num_experts,
              std::uint64_t key, std::int32_t id) {
  const auto w = Rng(key).words(0, static_cast<std::uint64_t>(id));
  const KeyedPermutation permutation(static_cast<std::uint64_t>(num_experts),
                                     w[0] | static_cast<std::uint64_t>(w[1]) << 32);
  for (std::int64_t j = 0; j < topk; ++j) {
    topk_idx[j] = static_cast<std::int32_t>(permutation(static_cast<std::uint64_t>(j)));
  }
  std::sort(topk_idx, topk_idx + topk);
}

// ---- sinkhorn --------------------------------------------------------------------------------

/// The pieces of SelectSinkhorn's scratch.
struct Balanced {
  explicit Balanced(const SelectSinkhorn& args)
      : a(args.scratch.as<double>()), q(a + args.z.size()), r(q + args.z.cols) {}
  double* a;  ///< [T, E]: exp(z - max)
  double* q;  ///< [E]: scaling of the experts
  double* r;  ///< [T]: scaling of the tokens
};
constexpr double kSinkhornTiny = 1e-8;

template <class A>
void exp_row(double* a, const A* z, std::int64_t num_experts) {
  auto max = static_cast<double>(z[0]);
  for (std::int64_t e = 1; e < num_experts; ++e) max = std::max(max, static_cast<double>(z[e]));
  for (std::int64_t e = 0; e < num_experts; ++e) {
    a[e] = std::exp(static_cast<double>(z[e]) - max);
  }
}

/// One iteration: r from q, then q from r. A token's sum runs over experts in order, an expert's
/// over tokens in order.
void balance_once(Stream& stream, const Balanced& m, std::int64_t tokens,
                  std::int64_t num_experts) {
  parallel_rows(stream, tokens, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t t = begin; t < end; ++t) {
      double sum = 0;
      for (std::int64_t e = 0; e < num_experts; ++e) sum += m.q[e] * m.a[t * num_experts + e];
      m.r[t] = 1 / (static_cast<double>(tokens) * (sum + kSinkhornTiny));
    }
  });
  parallel_column_blocks(stream, num_experts, [&](std::int64_t begin, std::int64_t count) {
    std::array<double, kRankedColumns> sum{};
    for (std::int64_t t = 0; t < tokens; ++t) {
      const double* a = m.a + t * num_experts + begin;
#pragma omp simd
      for (std::int64_t c = 0; c < count; ++c) sum[c] += m.r[t] * a[c];
    }
    for (std::int64_t c = 0; c < count; ++c) {
      m.q[begin + c] = 1 / (static_cast<double>(num_experts) * (sum[c] + kSinkhornTiny));
    }
  });
}

// ---- experts choose --------------------------------------------------------------------------

/// What an expert takes: scores above `key`, and those equal to it up to token `last_token`.
struct Takes {
  std::int64_t* key;         ///< [E], bits of OrderedKey
  std::int64_t* last_token;  ///< [E]
};

template <class A>
void find_takes(const SelectByExperts& args, const Takes& takes, std::int64_t capacity,
                std::int64_t begin, std::int64_t count) {
  std::array<RankedKey<A>, kRankedColumns> least;
  rank_columns<A>(least, args.s, begin, count, capacity);
  std::array<std::int64_t, kRankedColumns> open;  // places left for scores equal to the least one
  for (std::int64_t c = 0; c < count; ++c) {
    open[c] = capacity - least[c].num_larger;
    takes.key[begin + c] = static_cast<std::int64_t>(least[c].key);
  }
  for (std::int64_t t = 0; t < args.s.rows; ++t) {
    const A* s = args.s.row<A>(t) + begin;
    for (std::int64_t c = 0; c < count; ++c) {
      if (open[c] > 0 && OrderedKey<A>::of(s[c]) == least[c].key) {
        --open[c];
        takes.last_token[begin + c] = t;
      }
    }
  }
}

template <class A>
bool takes_token(const Takes& takes, std::int64_t expert, std::int64_t t, A s) {
  using Bits = typename OrderedKey<A>::Bits;
  const Bits key = OrderedKey<A>::of(s);
  const auto least = static_cast<Bits>(takes.key[expert]);
  return key > least || (key == least && t <= takes.last_token[expert]);
}

/// topk_idx = the experts with taken(e), ascending, then -1.
template <class Taken>
void list_experts(std::int32_t* topk_idx, std::int64_t num_experts, Taken&& taken) {
  std::int64_t j = 0;
  for (std::int64_t e = 0; e < num_experts; ++e) {
    if (taken(e)) topk_idx[j++] = static_cast<std::int32_t>(e);
  }
  std::fill(topk_idx + j, topk_idx + num_experts, -1);
}

}  // namespace

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

void sample_second(Stream& stream, const SampleSecond& args) {
  ARCUS_CHECK(args.topk_idx.cols == 2 && args.wanted.cols == 2, "sample_second: {} choices",
              args.topk_idx.cols);
  const Rng rng(args.draws.key);
  dispatch_accumulate(args.s.dtype, [&]<class A>() {
    parallel_rows(stream, args.s.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) {
        const A* s = args.s.row<A>(t);
        const auto* chosen = args.topk_idx.row<std::int32_t>(t);
        auto* wanted = args.wanted.row<std::int32_t>(t);
        const bool both = chosen[0] >= 0 && chosen[1] >= 0 &&
                          takes_second(rng, args.draws, t, s[chosen[0]], s[chosen[1]]);
        wanted[0] = chosen[0];
        wanted[1] = both ? chosen[1] : -1;
      }
    });
  });
}

void select_by_hash(Stream& stream, const SelectByHash& args) {
  const std::int64_t topk = args.topk_idx.cols;
  ARCUS_CHECK(topk <= args.num_experts, "top {} of {} experts", topk, args.num_experts);
  ARCUS_CHECK(args.ids.size() == args.topk_idx.rows, "{} token ids for {} tokens", args.ids.size(),
              args.topk_idx.rows);
  const auto* ids = args.ids.as<std::int32_t>();
  parallel_rows(
      stream, args.topk_idx.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t t = begin; t < end; ++t) {
          hash_row(args.topk_idx.row<std::int32_t>(t), topk, args.num_experts, args.key, ids[t]);
        }
      });
}

void select_sinkhorn(Stream& stream, const SelectSinkhorn& args) {
  const std::int64_t tokens = args.z.rows;
  const std::int64_t num_experts = args.z.cols;
  const std::int64_t topk = args.topk_idx.cols;
  ARCUS_CHECK(topk <= num_experts, "top {} of {} experts", topk, num_experts);
  if (tokens == 0) return;
  ARCUS_CHECK(args.scratch.size() >= args.z.size() + num_experts + tokens,
              "select_sinkhorn: scratch of {} for {} tokens and {} experts", args.scratch.size(),
              tokens, num_experts);
  const Balanced m(args);
  dispatch_accumulate(args.z.dtype, [&]<class A>() {
    parallel_rows(stream, tokens, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) {
        exp_row(m.a + t * num_experts, args.z.row<A>(t), num_experts);
      }
    });
    std::fill_n(m.q, num_experts, 1.0);
    for (std::int64_t i = 0; i < args.iterations; ++i) {
      balance_once(stream, m, tokens, num_experts);
    }
    for (std::int64_t e = 0; e < num_experts; ++e) m.q[e] = std::log(m.q[e]);
    parallel_rows(stream, tokens, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) {
        const A* z = args.z.row<A>(t);
        auto* topk_idx = args.topk_idx.row<std::int32_t>(t);
        select_largest(
            num_experts, topk, [&](std::int64_t e) { return static_cast<double>(z[e]) + m.q[e]; },
            [](std::int64_t) { return true; },
            [&](std::int64_t j, std::int64_t e) { topk_idx[j] = static_cast<std::int32_t>(e); });
      }
    });
  });
}

void select_by_experts(Stream& stream, const SelectByExperts& args) {
  const std::int64_t tokens = args.s.rows;
  const std::int64_t num_experts = args.s.cols;
  ARCUS_CHECK(args.topk_idx.cols == num_experts, "{} slots a token for {} experts",
              args.topk_idx.cols, num_experts);
  if (tokens == 0) return;
  ARCUS_CHECK(args.capacity > 0, "select_by_experts: no capacity");
  ARCUS_CHECK(args.scratch.size() >= 2 * num_experts,
              "select_by_experts: scratch of {} for {} experts", args.scratch.size(), num_experts);
  const std::int64_t capacity = std::min(args.capacity, tokens);
  const Takes takes{args.scratch.as<std::int64_t>(), args.scratch.as<std::int64_t>() + num_experts};
  dispatch_accumulate(args.s.dtype, [&]<class A>() {
    parallel_column_blocks(stream, num_experts, [&](std::int64_t begin, std::int64_t count) {
      find_takes<A>(args, takes, capacity, begin, count);
    });
    parallel_rows(stream, tokens, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) {
        const A* s = args.s.row<A>(t);
        list_experts(args.topk_idx.row<std::int32_t>(t), num_experts,
                     [&](std::int64_t e) { return takes_token(takes, e, t, s[e]); });
      }
    });
  });
}

void select_above(Stream& stream, const SelectAbove& args) {
  ARCUS_CHECK(args.topk_idx.cols == args.p.cols, "{} slots a token for {} experts",
              args.topk_idx.cols, args.p.cols);
  dispatch_accumulate(args.p.dtype, [&]<class A>() {
    const A threshold = static_cast<A>(args.threshold);
    parallel_rows(stream, args.p.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) {
        const A* p = args.p.row<A>(t);
        list_experts(args.topk_idx.row<std::int32_t>(t), args.p.cols,
                     [=](std::int64_t e) { return p[e] > threshold; });
      }
    });
  });
}

void list_chosen(Stream&, const ListChosen& args) {
  auto* index = args.index.as<std::int32_t>();
  const auto* chosen = args.chosen.as<std::int32_t>();
  std::int64_t count = 0;
  for (std::int64_t t = 0; t < args.chosen.rows; ++t) {
    if (chosen[t] >= 0) index[count++] = static_cast<std::int32_t>(t);
  }
  *args.count = count;
}

}  // namespace arcus::cpu
