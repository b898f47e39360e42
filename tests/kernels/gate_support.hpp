#pragma once

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "kernels/balance.hpp"
#include "kernels/gate.hpp"
#include "kernels/select.hpp"
#include "tests/kernels/op_test.hpp"
#include "tests/support/routing_reference.hpp"

/// The gate's ops on matrices that own their elements, and the situations that they are tested in.
namespace arcus::test {

using Longs = Matrix<std::int64_t>;

/// For the references.
template <class T>
reference::Table table(const Matrix<T>& from) {
  reference::Table to(static_cast<std::size_t>(from.rows()));
  for (std::int64_t i = 0; i < from.rows(); ++i) {
    for (std::int64_t j = 0; j < from.cols(); ++j) {
      to[static_cast<std::size_t>(i)].push_back(to_double(from.at(i, j)));
    }
  }
  return to;
}
inline reference::Choices choices(const Ints& from) {
  reference::Choices to(static_cast<std::size_t>(from.rows()));
  for (std::int64_t i = 0; i < from.rows(); ++i) {
    for (std::int64_t j = 0; j < from.cols(); ++j) {
      to[static_cast<std::size_t>(i)].push_back(from.at(i, j));
    }
  }
  return to;
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
Capacity apply(Stream& stream, const Ints& wanted, const Matrix<A>& s, std::int64_t capacity,
               DropPolicy policy) {
  Capacity r{Ints(wanted.rows(), wanted.cols(), 1), Longs(1, s.cols())};
  Longs scratch(1, 2 * std::max(wanted.rows() * wanted.cols(), s.cols()));
  apply_capacity(stream, {.expert_of_slot = r.expert_of_slot,
                          .demand = r.demand,
                          .scratch = scratch,
                          .wanted = wanted,
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

/// Offsets of groups of `tokens_per_group` consecutive tokens, the last one short.
inline std::vector<std::int64_t> group_offsets(std::int64_t tokens, std::int64_t tokens_per_group) {
  std::vector<std::int64_t> offsets{0};
  while (offsets.back() < tokens) {
    offsets.push_back(std::min(tokens, offsets.back() + tokens_per_group));
  }
  return offsets;
}

struct Statistics {
  double aux = -1, z_loss = -1, entropy = -1;
  Longs counts;
  Doubles fraction;
};
template <class A>
Statistics statistics(Stream& stream, const Scores<A>& r, std::int64_t topk,
                      std::int64_t tokens_per_group) {
  Statistics out;
  out.counts = Longs(1, r.s.cols());
  gate_statistics(stream, {.z_loss = &out.z_loss,
                           .entropy = &out.entropy,
                           .counts = out.counts,
                           .s = r.s,
                           .lse = r.lse,
                           .topk = topk});
  const auto offsets = group_offsets(r.s.rows(), tokens_per_group);
  Matrix<A> fraction(std::ssize(offsets) - 1, r.s.cols());
  Doubles scratch(1, 2 * r.s.cols());
  aux_loss(stream, {.aux = &out.aux,
                    .fraction = fraction,
                    .scratch = scratch,
                    .s = r.s,
                    .group_offsets = offsets,
                    .topk = topk});
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
  combine_weights_backward(stream, {.ds = dz,
                                    .dweight = dweight,
                                    .s = r.s,
                                    .topk_idx = topk_idx,
                                    .expert_of_slot = kept,
                                    .renormalize = o.renormalize,
                                    .renormalize_after_drop = o.renormalize_after_drop,
                                    .scale = o.scale});
  if (o.aux_coeff != 0) {
    aux_loss_backward(stream, {.ds = dz,
                               .s = r.s,
                               .fraction = fraction,
                               .group_offsets = group_offsets(z.rows(), o.tokens_per_group),
                               .coeff = o.aux_coeff});
  }
  gate_scores_backward(
      stream, {.dz = dz, .s = r.s, .lse = r.lse, .z = z, .score = o.score, .z_coeff = o.z_coeff});
  EXPECT_TRUE(dz.padding_untouched());
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
