#include "kernels/gate.hpp"

#include <array>
#include <numeric>
#include <set>
#include <tuple>

#include "tests/kernels/op_test.hpp"

namespace arcus {
namespace {

using namespace test;  // NOLINT(google-build-using-namespace)

using Longs = Matrix<std::int64_t>;

// ---- logits ----------------------------------------------------------------------------------

template <class T>
Matrix<Acc<T>> logits(Stream& stream, const Matrix<T>& x, const Matrix<Acc<T>>& weight,
                      const Matrix<Acc<T>>* bias, BadLeafFlag* flag = nullptr) {
  using A = Acc<T>;
  Matrix<A> z(x.rows(), weight.rows(), 2);
  Matrix<A> x_wide(x.rows(), x.cols(), 1);
  gate_logits(stream, {.z = z,
                       .x_wide = std::is_same_v<T, A> ? TensorView() : x_wide.view(),
                       .x = x,
                       .weight = weight,
                       .bias = bias == nullptr ? ConstTensorView() : bias->view(),
                       .flag = flag,
                       .flag_key = 5});
  for (std::int64_t t = 0; t < x.rows() && !std::is_same_v<T, A>; ++t) {
    for (std::int64_t i = 0; i < x.cols(); ++i) {
      EXPECT_EQ(to_double(x_wide.at(t, i)), to_double(x.at(t, i)));
    }
  }
  return z;
}

struct LogitCase {
  std::int64_t tokens, hidden, experts;
};
const std::vector<LogitCase> kLogitCases = {{0, 8, 2},  {1, 1, 1},   {3, 15, 5},
                                            {9, 64, 8}, {37, 70, 9}, {6, 513, 130}};

TEST(GateLogits, DoubleMatchesTheFormula) {
  Stream stream(2);
  for (const auto& [tokens, hidden, experts] : kLogitCases) {
    const Doubles x = normals(tokens, hidden, 1);
    const Doubles weight = normals(experts, hidden, 2);
    const Doubles bias = normals(1, experts, 3);
    for (const bool with_bias : {false, true}) {
      Doubles expected(tokens, experts);
      for (std::int64_t t = 0; t < tokens; ++t) {
        for (std::int64_t e = 0; e < experts; ++e) {
          double sum = with_bias ? bias.at(0, e) : 0;
          for (std::int64_t i = 0; i < hidden; ++i) sum += x.at(t, i) * weight.at(e, i);
          expected.at(t, e) = sum;
        }
      }
      expect_near(logits<double>(stream, x, weight, with_bias ? &bias : nullptr), expected, 1e-14,
                  "z");
    }
  }
}

template <class T>
void expect_logits_near_double() {
  using A = Acc<T>;
  Stream one(1);
  Stream three(3);
  for (const auto& [tokens, hidden, experts] : kLogitCases) {
    const Doubles x = normals(tokens, hidden, 1);
    const Doubles weight = normals(experts, hidden, 2);
    const Matrix<A> weight_a = as<A>(weight, 3);
    const auto z = logits<T>(one, as<T>(x, 5), weight_a, nullptr);
    expect_near(z, widened(logits<double>(one, x, weight, nullptr)), 0x1p-21, "z");
    EXPECT_TRUE(logits<T>(three, as<T>(x), weight_a, nullptr).same_bits(z));
    // A token's logits do not depend on the tokens beside it.
    for (std::int64_t t = 0; t < tokens; ++t) {
      const auto alone = logits<T>(one, rows_of(as<T>(x), t, 1), weight_a, nullptr);
      EXPECT_TRUE(rows_of(alone, 0, 1).same_bits(rows_of(z, t, 1)));
    }
  }
}
TEST(GateLogits, FloatMatchesDouble) { expect_logits_near_double<float>(); }
TEST(GateLogits, Bf16MatchesDouble) { expect_logits_near_double<bf16>(); }

TEST(GateLogits, RaisesTheFlagOnNonFiniteLogits) {
  Stream stream(2);
  const Matrix<float> weight = as<float>(normals(5, 20, 1));
  for (const float bad :
       {0.0F, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    Matrix<float> x = as<float>(normals(40, 20, 2));
    if (bad != 0.0F) x.at(38, 19) = bad;
    BadLeafFlag flag{kNoBadLeaf};
    logits<float>(stream, x, weight, nullptr, &flag);
    EXPECT_EQ(flag.load(), bad == 0.0F ? kNoBadLeaf : 5);
  }
}

// ---- scores ----------------------------------------------------------------------------------

template <class A>
struct Scores {
  Matrix<A> s, lse;
};
template <class A>
Scores<A> scores(Stream& stream, const Matrix<A>& z, Score score) {
  Scores<A> r{Matrix<A>(z.rows(), z.cols(), 1), Matrix<A>(z.rows(), 1)};
  gate_scores(stream, {.s = r.s, .lse = r.lse, .z = z, .score = score});
  return r;
}

TEST(GateScores, MatchTheFormulas) {
  Stream stream(2);
  for (const std::int64_t experts : {1, 3, 32, 45}) {
    const Doubles z = normals(20, experts, 1, 3);
    for (const Score score : {Score::softmax, Score::sigmoid}) {
      const auto r = scores<double>(stream, z, score);
      for (std::int64_t t = 0; t < z.rows(); ++t) {
        double sum = 0;
        for (std::int64_t e = 0; e < experts; ++e) sum += std::exp(z.at(t, e));
        EXPECT_NEAR(r.lse.at(t, 0), std::log(sum), 1e-13);
        for (std::int64_t e = 0; e < experts; ++e) {
          const double expected = score == Score::softmax ? std::exp(z.at(t, e)) / sum
                                                          : 1 / (1 + std::exp(-z.at(t, e)));
          EXPECT_NEAR(r.s.at(t, e), expected, 1e-14);
        }
      }
      const auto f = scores<float>(stream, as<float>(z), score);
      expect_near(f.s, widened(r.s), 0x1p-21, "s");
      expect_near(f.lse, r.lse, 0x1p-21, "lse");
    }
  }
}
TEST(GateScores, AreStableFarOut) {
  Stream stream(1);
  Matrix<float> z = filled<float>(1, 3, -3e38F);
  z.at(0, 1) = 3e38F;
  EXPECT_EQ(scores<float>(stream, z, Score::softmax).s.at(0, 1), 1.0F);
  EXPECT_EQ(scores<float>(stream, z, Score::sigmoid).s.at(0, 0), 0.0F);
  EXPECT_EQ(scores<float>(stream, z, Score::sigmoid).s.at(0, 1), 1.0F);
}

// ---- selection -------------------------------------------------------------------------------

struct Selection {
  std::int64_t topk = 1;
  std::int64_t n_group = 1, topk_group = 1;
  GroupScore group_score = GroupScore::top2_sum;
};
template <class A>
Ints select(Stream& stream, const Matrix<A>& s, const Matrix<float>& bias, const Selection& how) {
  Ints topk_idx(s.rows(), how.topk, 1);
  select_topk(stream, {.topk_idx = topk_idx,
                       .s = s,
                       .expert_bias = bias.rows() == 0 ? ConstTensorView() : bias.view(),
                       .n_group = how.n_group,
                       .topk_group = how.topk_group,
                       .group_score = how.group_score});
  EXPECT_TRUE(topk_idx.padding_untouched());
  return topk_idx;
}

/// Numbers 0..n-1 by descending value, equal ones in ascending order.
std::vector<std::int64_t> by_value(const std::vector<float>& value) {
  std::vector<std::int64_t> order(value.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
    return value[static_cast<std::size_t>(a)] > value[static_cast<std::size_t>(b)];
  });
  return order;
}

std::vector<std::int64_t> reference_topk(const std::vector<float>& c, const Selection& how) {
  const auto width = static_cast<std::int64_t>(c.size()) / how.n_group;
  std::vector<float> group;
  for (std::int64_t g = 0; g < how.n_group; ++g) {
    std::vector<float> members(c.begin() + g * width, c.begin() + (g + 1) * width);
    std::sort(members.rbegin(), members.rend());
    group.push_back(how.group_score == GroupScore::max ? members[0]
                                                       : members[0] + (width > 1 ? members[1] : 0));
  }
  auto kept = by_value(group);
  kept.resize(static_cast<std::size_t>(how.n_group > 1 ? how.topk_group : 1));
  std::vector<std::int64_t> chosen;
  for (const std::int64_t e : by_value(c)) {
    if (std::find(kept.begin(), kept.end(), e / width) != kept.end()) chosen.push_back(e);
  }
  chosen.resize(static_cast<std::size_t>(how.topk));
  return chosen;
}

/// Scores from a few values, so that ties are the rule; -0 among them.
Matrix<float> tied_scores(std::int64_t tokens, std::int64_t experts, std::uint64_t seed) {
  const std::array<float, 5> values = {0.0F, -0.0F, 0.25F, 0.5F, 0.125F};
  Matrix<float> s(tokens, experts, 1);
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t e = 0; e < experts; ++e) {
      const auto at = static_cast<std::uint64_t>(t * experts + e);
      s.at(t, e) = seed % 3 == 0 ? 1.0F / static_cast<float>(1 + draw(seed, at, 1 << 20))
                                 : values[static_cast<std::size_t>(draw(seed, at, 5))];
    }
  }
  return s;
}

TEST(SelectTopk, MatchesASortOverHundredsOfCases) {
  Stream stream(2);
  for (std::uint64_t seed = 0; seed < 400; ++seed) {
    Selection how;
    how.n_group = 1 + draw(seed, 1, 4);
    how.group_score = draw(seed, 2, 2) == 0 ? GroupScore::max : GroupScore::top2_sum;
    // Every ninth case chooses more than one pass of the selection finds.
    const std::int64_t width =
        (seed % 9 == 0 ? 30 : 2) + draw(seed, 3, 5) - (how.group_score == GroupScore::max ? 1 : 0);
    const std::int64_t experts = how.n_group * width;
    how.topk_group = 1 + draw(seed, 4, how.n_group);
    const std::int64_t most = how.n_group > 1 ? how.topk_group * width : experts;
    how.topk = seed % 5 == 0 ? most : 1 + draw(seed, 5, most);
    const std::array<std::int64_t, 4> sizes = {0, 1, 7, 40};
    const std::int64_t tokens = sizes[static_cast<std::size_t>(draw(seed, 6, 4))];
    const Matrix<float> s = tied_scores(tokens, experts, seed + 1000);
    Matrix<float> bias(seed % 2 == 0 ? 0 : 1, experts);
    for (float& b : bias.data()) b = 0.125F * static_cast<float>(draw(seed, 7, 5) - 2);
    const Ints topk_idx = select(stream, s, bias, how);
    for (std::int64_t t = 0; t < tokens; ++t) {
      std::vector<float> c;
      for (std::int64_t e = 0; e < experts; ++e) {
        c.push_back(bias.rows() == 0 ? s.at(t, e) : s.at(t, e) + bias.at(0, e));
      }
      const auto expected = reference_topk(c, how);
      for (std::int64_t j = 0; j < how.topk; ++j) {
        ASSERT_EQ(topk_idx.at(t, j), expected[static_cast<std::size_t>(j)])
            << "seed " << seed << ", token " << t << ", rank " << j;
      }
    }
  }
}

TEST(SelectTopk, StaysValidWithoutNumbers) {
  Stream stream(1);
  Matrix<float> s = filled<float>(1, 6, std::numeric_limits<float>::quiet_NaN());
  s.at(0, 4) = -std::numeric_limits<float>::infinity();
  s.at(0, 2) = 1;
  const Matrix<float> none;
  const Ints all = select(stream, s, none, {.topk = 6});
  const std::set<std::int32_t> distinct(&all.at(0, 0), &all.at(0, 0) + 6);
  EXPECT_EQ(distinct, (std::set<std::int32_t>{0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(all.at(0, 0), 2);
}

TEST(SelectTopk, RefusesWhatCannotBe) {
  Stream stream(1);
  const Matrix<float> s = filled<float>(1, 6, 0.5F);
  const Matrix<float> none;
  EXPECT_THROW(select(stream, s, none, {.topk = 7}), Error);
  EXPECT_THROW(select(stream, s, none, {.topk = 1, .n_group = 4, .topk_group = 2}), Error);
  EXPECT_THROW(select(stream, s, none, {.topk = 3, .n_group = 3, .topk_group = 1}), Error);
  EXPECT_THROW(select(stream, s, none, {.topk = 1, .n_group = 6, .topk_group = 2}), Error);
}

// ---- capacity --------------------------------------------------------------------------------

struct Capacity {
  Ints expert_of_slot;
  Longs demand;
};
template <class A>
Capacity apply(Stream& stream, const Ints& topk_idx, const Matrix<A>& s, std::int64_t capacity,
               DropPolicy policy) {
  Capacity r{Ints(topk_idx.rows(), topk_idx.cols(), 1), Longs(1, s.cols())};
  Longs scratch(1, 2 * std::max(topk_idx.rows() * topk_idx.cols(), s.cols()));
  apply_capacity(stream, {.expert_of_slot = r.expert_of_slot,
                          .demand = r.demand,
                          .scratch = scratch,
                          .topk_idx = topk_idx,
                          .s = s,
                          .num_experts = s.cols(),
                          .capacity = capacity,
                          .policy = policy});
  EXPECT_TRUE(r.expert_of_slot.padding_untouched());
  return r;
}

struct Assignment {
  std::int64_t token, rank;
  float s;
};

TEST(ApplyCapacity, MatchesASortOverHundredsOfCases) {
  Stream stream(1);
  for (std::uint64_t seed = 0; seed < 600; ++seed) {
    const std::int64_t experts = 1 + draw(seed, 1, 9);
    const std::int64_t topk = seed % 7 == 0 ? experts : 1 + draw(seed, 2, experts);
    const std::array<std::int64_t, 5> sizes = {0, 1, 2, 17, 60};
    const std::int64_t tokens = sizes[static_cast<std::size_t>(draw(seed, 3, 5))];
    const std::int64_t capacity = draw(seed, 4, tokens + 2);
    const DropPolicy policy = seed % 2 == 0 ? DropPolicy::position : DropPolicy::probs;
    const Matrix<float> s = tied_scores(tokens, experts, seed + 5000);
    const Matrix<float> none;
    Ints topk_idx = select(stream, s, none, {.topk = topk});
    for (std::int64_t t = 0; t < tokens; ++t) {
      if (draw(seed, static_cast<std::uint64_t>(100 + t), 8) != 0) continue;
      for (std::int64_t j = 0; j < topk; ++j) topk_idx.at(t, j) = -1;  // a padding token
    }
    const Capacity r = apply(stream, topk_idx, s, capacity, policy);
    for (std::int64_t e = 0; e < experts; ++e) {
      std::vector<Assignment> wanted;
      for (std::int64_t t = 0; t < tokens; ++t) {
        for (std::int64_t j = 0; j < topk; ++j) {
          if (topk_idx.at(t, j) == e) wanted.push_back({t, j, s.at(t, e)});
        }
      }
      EXPECT_EQ(r.demand.at(0, e), static_cast<std::int64_t>(wanted.size()));
      std::sort(wanted.begin(), wanted.end(), [&](const Assignment& a, const Assignment& b) {
        if (policy == DropPolicy::position) {
          return std::tie(a.rank, a.token) < std::tie(b.rank, b.token);
        }
        return a.s != b.s ? a.s > b.s : std::tie(a.token, a.rank) < std::tie(b.token, b.rank);
      });
      for (std::size_t i = 0; i < wanted.size(); ++i) {
        const bool kept = capacity == 0 || static_cast<std::int64_t>(i) < capacity;
        ASSERT_EQ(r.expert_of_slot.at(wanted[i].token, wanted[i].rank), kept ? e : -1)
            << "seed " << seed << ", expert " << e << ", place " << i;
      }
    }
    for (std::int64_t t = 0; t < tokens; ++t) {
      for (std::int64_t j = 0; j < topk; ++j) {
        if (topk_idx.at(t, j) < 0) {
          ASSERT_EQ(r.expert_of_slot.at(t, j), -1);
        }
      }
    }
  }
}

// ---- weights, statistics, backward -----------------------------------------------------------

struct Options {
  Score score = Score::softmax;
  bool renormalize = false, renormalize_after_drop = false;
  double scale = 1;
  double aux_coeff = 0, z_coeff = 0;
  std::int64_t tokens_per_group = 0;
  std::int64_t capacity = 0;
};
std::string name_of_options(const Options& o) {
  return fmt::format("score {} renormalize {}{} scale {} aux {} z {} group {} capacity {}",
                     o.score == Score::softmax ? "softmax" : "sigmoid", o.renormalize,
                     o.renormalize_after_drop ? " after drop" : "", o.scale, o.aux_coeff, o.z_coeff,
                     o.tokens_per_group, o.capacity);
}

/// Both scores with every way to weigh, drops on and off, every loss and scope.
std::vector<Options> all_options(std::int64_t tokens) {
  std::vector<Options> all;
  for (const Score score : {Score::softmax, Score::sigmoid}) {
    for (const int weigh : {0, 1, 2}) {
      for (const std::int64_t capacity : {0, 3}) {
        for (const int losses : {0, 1, 2, 3}) {
          Options o{.score = score,
                    .renormalize = weigh > 0,
                    .renormalize_after_drop = weigh == 2,
                    .scale = losses == 3 ? 2.5 : 1,
                    .aux_coeff = losses == 0 ? 0 : 0.7,
                    .z_coeff = losses >= 2 ? 0.3 : 0,
                    .tokens_per_group = losses == 1 ? 3 : tokens,
                    .capacity = capacity};
          all.push_back(o);
        }
      }
    }
  }
  return all;
}

struct Statistics {
  double aux = -1, z_loss = -1, entropy = -1;
  Doubles fraction;
};
template <class A>
Statistics statistics(Stream& stream, const Scores<A>& r, std::int64_t topk,
                      std::int64_t tokens_per_group) {
  Statistics out;
  const std::int64_t groups =
      r.s.rows() == 0 ? 0 : (r.s.rows() + tokens_per_group - 1) / tokens_per_group;
  Matrix<A> fraction(groups, r.s.cols());
  Doubles scratch(1, 2 * r.s.cols() + topk);
  gate_statistics(stream, {.aux = &out.aux,
                           .z_loss = &out.z_loss,
                           .entropy = &out.entropy,
                           .fraction = fraction,
                           .scratch = scratch,
                           .s = r.s,
                           .lse = r.lse,
                           .topk = topk,
                           .tokens_per_group = tokens_per_group});
  out.fraction = widened(fraction);
  return out;
}

template <class A>
Matrix<A> weights(Stream& stream, const Matrix<A>& s, const Ints& topk_idx, const Ints& kept,
                  const Options& o) {
  Matrix<A> w(s.rows(), topk_idx.cols(), 2);
  combine_weights(stream, {.weight = w,
                           .s = s,
                           .topk_idx = topk_idx,
                           .expert_of_slot = kept,
                           .renormalize = o.renormalize,
                           .renormalize_after_drop = o.renormalize_after_drop,
                           .scale = o.scale});
  return w;
}

template <class A>
Matrix<A> backward(Stream& stream, const Matrix<A>& z, const Scores<A>& r, const Ints& topk_idx,
                   const Ints& kept, const Matrix<A>& dweight, const Matrix<A>& fraction,
                   const Options& o) {
  Matrix<A> dz(z.rows(), z.cols(), 3);
  gate_backward(stream, {.dz = dz,
                         .dweight = dweight,
                         .s = r.s,
                         .lse = r.lse,
                         .z = z,
                         .topk_idx = topk_idx,
                         .expert_of_slot = kept,
                         .fraction = fraction,
                         .score = o.score,
                         .renormalize = o.renormalize,
                         .renormalize_after_drop = o.renormalize_after_drop,
                         .scale = o.scale,
                         .aux_coeff = o.aux_coeff,
                         .z_coeff = o.z_coeff,
                         .tokens_per_group = o.tokens_per_group});
  return dz;
}

/// One gate with its routing: frozen while z is perturbed.
struct Gate {
  Gate(Stream& stream, std::int64_t tokens, std::int64_t experts, std::int64_t topk,
       const Options& o)
      : z(normals(tokens, experts, 1)), dweight(normals(tokens, topk, 2)) {
    const auto r = scores<double>(stream, z, o.score);
    const Matrix<float> none;
    topk_idx = select(stream, r.s, none, {.topk = topk});
    kept = apply(stream, topk_idx, r.s, o.capacity, DropPolicy::position).expert_of_slot;
  }
  Doubles z, dweight;
  Ints topk_idx, kept;
};

TEST(CombineWeights, MatchTheFormulas) {
  Stream stream(2);
  for (const Options& o : all_options(7)) {
    const Gate g(stream, 7, 6, 3, o);
    const auto r = scores<double>(stream, g.z, o.score);
    const Doubles w = weights<double>(stream, r.s, g.topk_idx, g.kept, o);
    for (std::int64_t t = 0; t < 7; ++t) {
      double sum = 0;
      for (std::int64_t j = 0; j < 3; ++j) {
        const bool counts = !o.renormalize_after_drop || g.kept.at(t, j) >= 0;
        if (counts) sum += r.s.at(t, g.topk_idx.at(t, j));
      }
      for (std::int64_t j = 0; j < 3; ++j) {
        const double s = r.s.at(t, g.topk_idx.at(t, j));
        const double expected = g.kept.at(t, j) < 0 ? 0 : o.scale * (o.renormalize ? s / sum : s);
        EXPECT_NEAR(w.at(t, j), expected, 1e-14) << name_of_options(o);
      }
    }
    EXPECT_TRUE(w.padding_untouched());
    const auto f = weights<float>(stream, as<float>(widened(r.s)), g.topk_idx, g.kept, o);
    expect_near(f, widened(w), 0x1p-21, name_of_options(o));
  }
}

TEST(CombineWeights, TokensWithoutExpertsGetZeros) {
  Stream stream(1);
  const Options o{.renormalize = true, .renormalize_after_drop = true};
  const Matrix<float> s = filled<float>(2, 3, 0.25F);
  Ints chosen = filled<std::int32_t>(2, 2, -1);
  chosen.at(0, 0) = 0;
  chosen.at(0, 1) = 2;
  const Ints kept = filled<std::int32_t>(2, 2, -1);
  const auto w = weights<float>(stream, s, chosen, kept, o);
  for (const std::int64_t t : {0, 1}) {
    for (const std::int64_t j : {0, 1}) EXPECT_EQ(w.at(t, j), 0.0F);
  }
}

TEST(GateStatistics, MatchTheFormulas) {
  Stream stream(1);
  for (const Score score : {Score::softmax, Score::sigmoid}) {
    for (const std::int64_t group : {1, 3, 4, 10}) {
      const std::int64_t tokens = 10, experts = 5, topk = 2;
      const auto r = scores<double>(stream, normals(tokens, experts, 1), score);
      const Statistics out = statistics(stream, r, topk, group);
      const Matrix<float> none;
      const Ints chosen = select(stream, r.s, none, {.topk = topk});
      double aux = 0, squares = 0, entropy = 0;
      for (std::int64_t begin = 0; begin < tokens; begin += group) {
        const std::int64_t end = std::min(tokens, begin + group);
        const auto length = static_cast<double>(end - begin);
        for (std::int64_t e = 0; e < experts; ++e) {
          double count = 0, share = 0;
          for (std::int64_t t = begin; t < end; ++t) {
            double sum = 0;
            for (std::int64_t i = 0; i < experts; ++i) sum += r.s.at(t, i);
            const double p = r.s.at(t, e) / sum;
            share += p;
            entropy -= p * std::log(p);
            for (std::int64_t j = 0; j < topk; ++j) count += chosen.at(t, j) == e ? 1 : 0;
          }
          const double f = count / (static_cast<double>(topk) * length);
          EXPECT_NEAR(out.fraction.at(begin / group, e), f, 1e-15);
          aux += static_cast<double>(experts) * f * (share / length) * length /
                 static_cast<double>(tokens);
        }
      }
      for (std::int64_t t = 0; t < tokens; ++t) squares += r.lse.at(t, 0) * r.lse.at(t, 0);
      EXPECT_NEAR(out.aux, aux, 1e-13);
      EXPECT_NEAR(out.z_loss, squares / static_cast<double>(tokens), 1e-13);
      EXPECT_NEAR(out.entropy, entropy, 1e-12);
    }
  }
}
TEST(GateStatistics, BalanceGivesOneAndLogOfExperts) {
  Stream stream(1);
  Doubles z(4, 4);
  for (std::int64_t t = 0; t < 4; ++t) {
    for (std::int64_t e = 0; e < 4; ++e) z.at(t, e) = e == t ? 1e-9 : 0;
  }
  const Statistics out = statistics(stream, scores<double>(stream, z, Score::softmax), 1, 4);
  EXPECT_NEAR(out.aux, 1, 1e-8);
  EXPECT_NEAR(out.entropy, 4 * std::log(4.0), 1e-8);
}

TEST(GateBackward, MatchesDifferences) {
  Stream stream(1);
  const std::int64_t tokens = 7;  // groups of 3: the last one is short
  for (const Options& o : all_options(tokens)) {
    for (const std::int64_t topk : {2, 5}) {
      Gate g(stream, tokens, 5, topk, o);
      if (o.capacity > 0) {
        // Drops must be among the cases, and a token that keeps only part of its experts.
        ASSERT_LT(*std::min_element(&g.kept.at(0, 0), &g.kept.at(tokens - 1, topk - 1) + 1), 0);
      }
      const auto r = scores<double>(stream, g.z, o.score);
      const Doubles fraction = statistics(stream, r, topk, o.tokens_per_group).fraction;
      const Doubles dz =
          widened(backward<double>(stream, g.z, r, g.topk_idx, g.kept, g.dweight, fraction, o));
      const auto loss = [&] {
        const auto now = scores<double>(stream, g.z, o.score);
        const Statistics losses = statistics(stream, now, topk, o.tokens_per_group);
        return inner(widened(weights<double>(stream, now.s, g.topk_idx, g.kept, o)), g.dweight) +
               o.aux_coeff * losses.aux + o.z_coeff * losses.z_loss;
      };
      expect_gradient(g.z, dz, loss, name_of_options(o));
    }
  }
}

TEST(GateBackward, TakesTheFractionFromElsewhere) {
  // Scope global: f is a constant from the previous step.
  Stream stream(1);
  const std::int64_t tokens = 6, experts = 4;
  for (const Score score : {Score::softmax, Score::sigmoid}) {
    const Options o{.score = score, .aux_coeff = 0.9, .tokens_per_group = tokens};
    Gate g(stream, tokens, experts, 2, o);
    Doubles fraction(1, experts);
    for (std::int64_t e = 0; e < experts; ++e) {
      fraction.at(0, e) = 0.1 + 0.1 * static_cast<double>(e);
    }
    const auto r = scores<double>(stream, g.z, score);
    const Doubles dz = widened(backward<double>(stream, g.z, r, g.topk_idx, g.kept,
                                                filled<double>(tokens, 2, 0), fraction, o));
    const auto loss = [&] {
      const auto now = scores<double>(stream, g.z, score);
      double aux = 0;
      for (std::int64_t t = 0; t < tokens; ++t) {
        double sum = 0, product = 0;
        for (std::int64_t e = 0; e < experts; ++e) {
          sum += now.s.at(t, e);
          product += fraction.at(0, e) * now.s.at(t, e);
        }
        aux += product / sum * static_cast<double>(experts) / static_cast<double>(tokens);
      }
      return 0.9 * aux;
    };
    expect_gradient(g.z, dz, loss, "global fraction");
  }
}

TEST(GateBackward, DroppedExpertsIgnoreTheirGradient) {
  Stream stream(1);
  const Options o{.renormalize = true, .tokens_per_group = 7, .capacity = 3};
  Gate g(stream, 7, 5, 2, o);
  const auto r = scores<double>(stream, g.z, o.score);
  const Doubles fraction = filled<double>(1, 5, 0);
  const Doubles before =
      widened(backward<double>(stream, g.z, r, g.topk_idx, g.kept, g.dweight, fraction, o));
  for (std::int64_t t = 0; t < 7; ++t) {
    for (std::int64_t j = 0; j < 2; ++j) {
      if (g.kept.at(t, j) < 0) g.dweight.at(t, j) = std::numeric_limits<double>::quiet_NaN();
    }
  }
  const Doubles after =
      widened(backward<double>(stream, g.z, r, g.topk_idx, g.kept, g.dweight, fraction, o));
  EXPECT_TRUE(after.same_bits(before));
}

TEST(Gate, FloatMatchesDoubleOnAnyThreads) {
  Stream one(1);
  Stream three(3);
  const std::int64_t tokens = 90, experts = 40, topk = 6;
  for (const Options& o : all_options(tokens)) {
    const Gate g(one, tokens, experts, topk, o);
    const auto exact = scores<double>(one, g.z, o.score);
    const Statistics exact_stats = statistics(one, exact, topk, o.tokens_per_group);
    const Doubles exact_dz = widened(
        backward<double>(one, g.z, exact, g.topk_idx, g.kept, g.dweight, exact_stats.fraction, o));
    const Matrix<float> z = as<float>(g.z);
    const auto run = [&](Stream& stream) {
      const auto r = scores<float>(stream, z, o.score);
      const Statistics stats = statistics(stream, r, topk, o.tokens_per_group);
      EXPECT_NEAR(stats.aux, exact_stats.aux, 1e-6);
      EXPECT_NEAR(stats.z_loss, exact_stats.z_loss, 1e-5);
      EXPECT_NEAR(stats.entropy, exact_stats.entropy, 1e-4);
      return backward<float>(stream, z, r, g.topk_idx, g.kept, as<float>(g.dweight),
                             as<float>(stats.fraction), o);
    };
    const Matrix<float> dz = run(one);
    expect_near(dz, exact_dz, 1e-5, name_of_options(o));
    EXPECT_TRUE(run(three).same_bits(dz));
  }
}

TEST(Gate, ZeroTokens) {
  Stream stream(2);
  const Options o{.aux_coeff = 1, .z_coeff = 1, .tokens_per_group = 0, .capacity = 1};
  const Matrix<float> z(0, 4);
  const auto r = scores<float>(stream, z, Score::softmax);
  const Matrix<float> none;
  const Ints topk_idx = select(stream, r.s, none, {.topk = 2});
  for (const DropPolicy policy : {DropPolicy::position, DropPolicy::probs}) {
    const Capacity c = apply(stream, topk_idx, r.s, 1, policy);
    for (std::int64_t e = 0; e < 4; ++e) EXPECT_EQ(c.demand.at(0, e), 0);
  }
  weights<float>(stream, r.s, topk_idx, topk_idx, o);
  const Statistics stats = statistics(stream, r, 2, 0);
  EXPECT_EQ(stats.aux, 0);
  EXPECT_EQ(stats.z_loss, 0);
  EXPECT_EQ(stats.entropy, 0);
  backward<float>(stream, z, r, topk_idx, topk_idx, Matrix<float>(0, 2), Matrix<float>(0, 4), o);
}

}  // namespace
}  // namespace arcus
