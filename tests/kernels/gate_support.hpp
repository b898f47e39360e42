#pragma once

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "kernels/gate.hpp"
#include "tests/kernels/op_test.hpp"

/// The gate's ops on matrices that own their elements, and the situations that they are tested in.
namespace arcus::test {

using Longs = Matrix<std::int64_t>;

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

/// Scores from a few values, so that ties are the rule; -0 among them.
inline Matrix<float> tied_scores(std::int64_t tokens, std::int64_t experts, std::uint64_t seed) {
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

// ---- weights, statistics, backward -----------------------------------------------------------

struct Options {
  Score score = Score::softmax;
  bool renormalize = false, renormalize_after_drop = false;
  double scale = 1;
  double aux_coeff = 0, z_coeff = 0;
  std::int64_t tokens_per_group = 0;
  std::int64_t capacity = 0;
};
inline std::string name_of_options(const Options& o) {
  return fmt::format("score {} renormalize {}{} scale {} aux {} z {} group {} capacity {}",
                     o.score == Score::softmax ? "softmax" : "sigmoid", o.renormalize,
                     o.renormalize_after_drop ? " after drop" : "", o.scale, o.aux_coeff, o.z_coeff,
                     o.tokens_per_group, o.capacity);
}

/// Both scores with every way to weigh, drops on and off, every loss and scope.
inline std::vector<Options> all_options(std::int64_t tokens) {
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

}  // namespace arcus::test
