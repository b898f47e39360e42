#include "kernels/attention.hpp"

#include "kernels/cpu/gemm_cache.hpp"
#include "tests/kernels/op_test.hpp"

namespace arcus {
namespace {

using namespace test;  // NOLINT(google-build-using-namespace)

/// S below, at and above multiples of 64; G = 1, MHA, MQA; D not a multiple of 16.
const std::vector<AttentionShape> kShapes = {{1, 1, 1, 1, 4},    {2, 5, 2, 2, 6},
                                             {1, 64, 4, 2, 16},  {2, 70, 4, 1, 8},
                                             {1, 129, 3, 3, 10}, {2, 150, 6, 2, 20}};

std::string name_of_shape(const AttentionShape& s) {
  return fmt::format("B {} S {} heads {} KV {} D {}", s.num_seqs, s.seq_len, s.num_heads,
                     s.num_kv_heads, s.head_dim);
}

enum class Mask { causal, documents };
/// Documents of uneven length: a token sees its own document only.
Ints first_keys(const AttentionShape& shape, Mask mask) {
  Ints first(1, shape.num_seqs * shape.seq_len);
  for (std::int64_t b = 0; b < shape.num_seqs; ++b) {
    std::int32_t begin = 0;
    for (std::int64_t s = 0; s < shape.seq_len; ++s) {
      const auto token = static_cast<std::uint64_t>(b * shape.seq_len + s);
      if (mask == Mask::documents && draw(17, token, 23) == 0) begin = static_cast<std::int32_t>(s);
      first.at(0, static_cast<std::int64_t>(token)) = begin;
    }
  }
  return first;
}

/// q, k in attention's layout, v and dout by token.
struct Inputs {
  explicit Inputs(const AttentionShape& s)
      : q(normals(s.num_seqs * s.num_heads * s.seq_len, s.head_dim, 1)),
        k(normals(s.num_seqs * s.num_kv_heads * s.seq_len, s.head_dim, 2)),
        v(normals(s.num_seqs * s.seq_len, s.num_kv_heads * s.head_dim, 3)),
        dout(normals(s.num_seqs * s.seq_len, s.num_heads * s.head_dim, 4)) {}
  Doubles q, k, v, dout;
};

template <class T>
struct Forward {
  Matrix<T> out;
  Matrix<Acc<T>> lse;
};
template <class T>
Forward<T> forward(Stream& stream, const AttentionShape& s, const Matrix<T>& q, const Matrix<T>& k,
                   const Matrix<T>& v, const Ints& first_key) {
  Forward<T> r{Matrix<T>(s.num_seqs * s.seq_len, s.num_heads * s.head_dim, 3),
               Matrix<Acc<T>>(s.num_seqs * s.num_heads * s.seq_len, 1)};
  attention_forward(
      stream,
      {.out = r.out, .lse = r.lse, .q = q, .k = k, .v = v, .first_key = first_key, .shape = s});
  return r;
}

template <class T>
struct Backward {
  Matrix<T> dq, dk, dv;
};
template <class T>
Backward<T> backward(Stream& stream, const AttentionShape& s, const Matrix<T>& q,
                     const Matrix<T>& k, const Matrix<T>& v, const Matrix<T>& dout,
                     const Ints& first_key, const Forward<T>& saved) {
  Backward<T> r{Matrix<T>(q.rows(), q.cols()), Matrix<T>(k.rows(), k.cols()),
                Matrix<T>(v.rows(), v.cols(), 5)};
  attention_backward(stream, {.dq = r.dq,
                              .dk = r.dk,
                              .dv = r.dv,
                              .dout = dout,
                              .out = saved.out,
                              .lse = saved.lse,
                              .q = q,
                              .k = k,
                              .v = v,
                              .first_key = first_key,
                              .shape = s});
  return r;
}

/// softmax(q k^T / sqrt(D)) v, one query at a time.
Forward<double> reference(const AttentionShape& s, const Inputs& in, const Ints& first_key) {
  const std::int64_t dim = s.head_dim;
  Forward<double> r{Doubles(s.num_seqs * s.seq_len, s.num_heads * dim),
                    Doubles(s.num_seqs * s.num_heads * s.seq_len, 1)};
  for (std::int64_t b = 0; b < s.num_seqs; ++b) {
    for (std::int64_t h = 0; h < s.num_heads; ++h) {
      const std::int64_t kv = h / s.group();
      for (std::int64_t t = 0; t < s.seq_len; ++t) {
        const std::int64_t problem = b * s.num_kv_heads + kv;
        const std::int64_t q_row = (problem * s.seq_len + t) * s.group() + h % s.group();
        double sum = 0;
        std::vector<double> out(static_cast<std::size_t>(dim));
        for (std::int64_t j = first_key.at(0, b * s.seq_len + t); j <= t; ++j) {
          double score = 0;
          for (std::int64_t i = 0; i < dim; ++i) {
            score += in.q.at(q_row, i) * in.k.at(problem * s.seq_len + j, i);
          }
          const double p = std::exp(score / std::sqrt(static_cast<double>(dim)));
          sum += p;
          for (std::int64_t i = 0; i < dim; ++i) {
            out[static_cast<std::size_t>(i)] += p * in.v.at(b * s.seq_len + j, kv * dim + i);
          }
        }
        r.lse.at(q_row, 0) = std::log(sum);
        for (std::int64_t i = 0; i < dim; ++i) {
          r.out.at(b * s.seq_len + t, h * dim + i) = out[static_cast<std::size_t>(i)] / sum;
        }
      }
    }
  }
  return r;
}

TEST(Attention, DoubleMatchesTheReference) {
  Stream stream(2);
  for (const AttentionShape& shape : kShapes) {
    for (const Mask mask : {Mask::causal, Mask::documents}) {
      const Inputs in(shape);
      const Ints first = first_keys(shape, mask);
      const auto expected = reference(shape, in, first);
      const auto actual = forward<double>(stream, shape, in.q, in.k, in.v, first);
      expect_near(actual.out, expected.out, 1e-13, name_of_shape(shape));
      expect_near(actual.lse, expected.lse, 1e-13, name_of_shape(shape));
    }
  }
}

template <class T>
void expect_type_near_double(double tolerance) {
  Stream stream(2);
  for (const AttentionShape& shape : kShapes) {
    for (const Mask mask : {Mask::causal, Mask::documents}) {
      const Inputs in(shape);
      const Ints first = first_keys(shape, mask);
      const auto exact = forward<double>(stream, shape, in.q, in.k, in.v, first);
      const auto exact_back =
          backward<double>(stream, shape, in.q, in.k, in.v, in.dout, first, exact);
      const Matrix<T> q = as<T>(in.q);
      const Matrix<T> k = as<T>(in.k);
      const Matrix<T> v = as<T>(in.v, 7);
      const auto out = forward<T>(stream, shape, q, k, v, first);
      const auto back = backward<T>(stream, shape, q, k, v, as<T>(in.dout, 2), first, out);
      const std::string what = name_of_shape(shape);
      expect_near(out.out, widened(exact.out), tolerance, what + " out");
      expect_near(out.lse, exact.lse, 1e-5, what + " lse");
      expect_near(back.dq, exact_back.dq, tolerance, what + " dq");
      expect_near(back.dk, exact_back.dk, tolerance, what + " dk");
      expect_near(back.dv, widened(exact_back.dv), tolerance, what + " dv");
    }
  }
}
TEST(Attention, FloatMatchesDouble) { expect_type_near_double<float>(1e-5); }
// P, dS, out and dout are rounded to 8 bits on the way: a few units in the last place.
TEST(Attention, Bf16MatchesDouble) {
  if (!cpu::bf16_is_native()) GTEST_SKIP() << "no bf16 products on this processor";
  expect_type_near_double<bf16>(4 * unit_roundoff<bf16>());
}

TEST(Attention, GradientsMatchDifferences) {
  Stream stream(1);
  for (const AttentionShape& shape :
       std::vector<AttentionShape>{{2, 7, 4, 2, 3}, {1, 67, 2, 1, 2}, {1, 5, 2, 2, 4}}) {
    for (const Mask mask : {Mask::causal, Mask::documents}) {
      Inputs in(shape);
      const Ints first = first_keys(shape, mask);
      const auto run = [&] { return forward<double>(stream, shape, in.q, in.k, in.v, first); };
      const auto back = backward<double>(stream, shape, in.q, in.k, in.v, in.dout, first, run());
      const auto loss = [&] { return inner(run().out, in.dout); };
      expect_gradient(in.q, back.dq, loss, name_of_shape(shape) + " dq");
      expect_gradient(in.k, back.dk, loss, name_of_shape(shape) + " dk");
      expect_gradient(in.v, widened(back.dv), loss, name_of_shape(shape) + " dv");
    }
  }
}

template <class T>
void expect_same_bits_on_any_threads() {
  Stream one(1);
  Stream three(3);
  const AttentionShape shape{2, 130, 4, 2, 16};
  const Inputs in(shape);
  const Ints first = first_keys(shape, Mask::documents);
  const Matrix<T> q = as<T>(in.q), k = as<T>(in.k), v = as<T>(in.v), dout = as<T>(in.dout);
  const auto a = forward<T>(one, shape, q, k, v, first);
  const auto b = forward<T>(three, shape, q, k, v, first);
  EXPECT_TRUE(a.out.same_bits(b.out));
  EXPECT_TRUE(a.lse.same_bits(b.lse));
  const auto back_a = backward<T>(one, shape, q, k, v, dout, first, a);
  const auto back_b = backward<T>(three, shape, q, k, v, dout, first, a);
  EXPECT_TRUE(back_a.dq.same_bits(back_b.dq));
  EXPECT_TRUE(back_a.dk.same_bits(back_b.dk));
  EXPECT_TRUE(back_a.dv.same_bits(back_b.dv));
}
TEST(Attention, BitsDoNotDependOnThreads) {
  expect_same_bits_on_any_threads<float>();
  if (cpu::bf16_is_native()) expect_same_bits_on_any_threads<bf16>();
}

template <class T>
void expect_sequences_independent() {
  Stream stream(2);
  const AttentionShape batch{3, 75, 4, 2, 8};
  AttentionShape alone = batch;
  alone.num_seqs = 1;
  const Inputs in(batch);
  const Ints first = first_keys(batch, Mask::documents);
  const Matrix<T> q = as<T>(in.q), k = as<T>(in.k), v = as<T>(in.v), dout = as<T>(in.dout);
  const auto whole = forward<T>(stream, batch, q, k, v, first);
  const auto whole_back = backward<T>(stream, batch, q, k, v, dout, first, whole);
  for (std::int64_t b = 0; b < batch.num_seqs; ++b) {
    const auto part = [b](const Matrix<T>& m) {
      return rows_of(m, b * (m.rows() / 3), m.rows() / 3);
    };
    Ints first_b(1, batch.seq_len);
    for (std::int64_t s = 0; s < batch.seq_len; ++s) {
      first_b.at(0, s) = first.at(0, b * batch.seq_len + s);
    }
    const auto one = forward<T>(stream, alone, part(q), part(k), part(v), first_b);
    const auto back =
        backward<T>(stream, alone, part(q), part(k), part(v), part(dout), first_b, one);
    EXPECT_TRUE(part(whole.out).same_bits(rows_of(one.out, 0, one.out.rows())));
    EXPECT_TRUE(part(whole_back.dq).same_bits(back.dq));
    EXPECT_TRUE(part(whole_back.dk).same_bits(back.dk));
    EXPECT_TRUE(part(whole_back.dv).same_bits(rows_of(back.dv, 0, back.dv.rows())));
  }
}
TEST(Attention, SequencesDoNotSeeTheirBatch) {
  expect_sequences_independent<float>();
  if (cpu::bf16_is_native()) expect_sequences_independent<bf16>();
}

TEST(Attention, NothingToDo) {
  Stream stream(2);
  for (const AttentionShape& shape :
       std::vector<AttentionShape>{{0, 8, 2, 1, 4}, {2, 0, 2, 1, 4}}) {
    const Inputs in(shape);
    const Ints first = first_keys(shape, Mask::causal);
    const auto out = forward<double>(stream, shape, in.q, in.k, in.v, first);
    backward<double>(stream, shape, in.q, in.k, in.v, in.dout, first, out);
  }
}

TEST(Attention, RefusesKeysFromTheFuture) {
  Stream stream(1);
  const AttentionShape shape{1, 4, 1, 1, 4};
  const Inputs in(shape);
  Ints first = first_keys(shape, Mask::causal);
  first.at(0, 2) = 3;
  EXPECT_THROW(forward<double>(stream, shape, in.q, in.k, in.v, first), Error);
}

TEST(Attention, LargeScoresDoNotOverflow) {
  Stream stream(1);
  const AttentionShape shape{1, 3, 1, 1, 4};
  const Matrix<float> q = filled<float>(3, 4, 1e4F);
  const Matrix<float> v = filled<float>(3, 4, 2.0F);
  const auto out = forward<float>(stream, shape, q, q, v, first_keys(shape, Mask::causal));
  for (const std::int64_t t : {0, 1, 2}) EXPECT_EQ(out.out.at(t, 0), 2.0F);
}

TEST(Attention, PrimitivesAreBuiltAhead) {
  Stream stream(2);
  const AttentionShape shape{2, 150, 4, 2, 8};
  const Inputs in(shape);
  const Matrix<float> q = as<float>(in.q), k = as<float>(in.k), v = as<float>(in.v, 7);
  const PrimitiveReport report = build_attention_primitives(stream, shape, DType::f32, true);
  // Three blocks; q k^T and dout v^T share a shape, and so do P v and dS k.
  EXPECT_EQ(report.primitives, 3 * 3);
  EXPECT_GT(report.bytes, 0);
  const Ints first = first_keys(shape, Mask::causal);
  const auto out = forward<float>(stream, shape, q, k, v, first);
  backward<float>(stream, shape, q, k, v, as<float>(in.dout), first, out);
  EXPECT_EQ(stream.cpu().gemm().late_primitives(), 0);
}

// ---- rotary embedding ------------------------------------------------------------------------

Doubles inv_freq_of(std::int64_t count) {
  Doubles f(1, count);
  for (std::int64_t i = 0; i < count; ++i)
    f.at(0, i) = std::pow(10000.0, -static_cast<double>(i) / static_cast<double>(count));
  return f;
}
/// Positions that start again at documents, differently in each sequence.
Ints positions_of(const AttentionShape& shape) {
  const Ints first = first_keys(shape, Mask::documents);
  Ints position(1, first.cols());
  for (std::int64_t t = 0; t < first.cols(); ++t) {
    position.at(0, t) = static_cast<std::int32_t>(t % shape.seq_len) - first.at(0, t);
  }
  return position;
}

template <class T>
struct Rotated {
  Matrix<T> q, k;
};
template <class T>
Rotated<T> rope(Stream& stream, const AttentionShape& s, const Matrix<T>& q, const Matrix<T>& k,
                const Doubles& inv_freq, const Ints& position) {
  Rotated<T> r{Matrix<T>(s.num_seqs * s.num_heads * s.seq_len, s.head_dim),
               Matrix<T>(s.num_seqs * s.num_kv_heads * s.seq_len, s.head_dim)};
  rope_forward(stream, {.q_out = r.q,
                        .k_out = r.k,
                        .q = q,
                        .k = k,
                        .inv_freq = inv_freq,
                        .position = position,
                        .shape = s});
  return r;
}
template <class T>
Rotated<T> rope_back(Stream& stream, const AttentionShape& s, const Matrix<T>& dq_out,
                     const Matrix<T>& dk_out, const Doubles& inv_freq, const Ints& position) {
  Rotated<T> r{Matrix<T>(s.num_seqs * s.seq_len, s.num_heads * s.head_dim, 3),
               Matrix<T>(s.num_seqs * s.seq_len, s.num_kv_heads * s.head_dim, 1)};
  rope_backward(stream, {.dq = r.q,
                         .dk = r.k,
                         .dq_out = dq_out,
                         .dk_out = dk_out,
                         .inv_freq = inv_freq,
                         .position = position,
                         .shape = s});
  return r;
}

const std::vector<AttentionShape> kRopeShapes = {
    {0, 4, 2, 1, 8}, {1, 1, 1, 1, 2}, {2, 9, 4, 2, 8}, {3, 33, 6, 3, 10}, {2, 20, 3, 1, 20}};

TEST(Rope, RotatesHalvesAndGroupsQueries) {
  Stream stream(2);
  for (const AttentionShape& s : kRopeShapes) {
    const std::int64_t dim = s.head_dim;
    for (const std::int64_t n : {dim / 2, dim / 4}) {
      const Doubles q = normals(s.num_seqs * s.seq_len, s.num_heads * dim, 1);
      const Doubles k = normals(s.num_seqs * s.seq_len, s.num_kv_heads * dim, 2);
      const Doubles inv_freq = inv_freq_of(n);
      const Ints position = positions_of(s);
      const auto out = rope<double>(stream, s, q, k, inv_freq, position);
      Doubles q_expected(out.q.rows(), dim);
      for (std::int64_t t = 0; t < s.num_seqs * s.seq_len; ++t) {
        for (std::int64_t h = 0; h < s.num_heads; ++h) {
          const std::int64_t problem = t / s.seq_len * s.num_kv_heads + h / s.group();
          const std::int64_t row =
              (problem * s.seq_len + t % s.seq_len) * s.group() + h % s.group();
          for (std::int64_t i = 0; i < dim; ++i) {
            const double x = q.at(t, h * dim + i);
            double expected = x;
            if (i < 2 * n) {
              const double angle = position.at(0, t) * inv_freq.at(0, i % n);
              const double partner = i < n ? -q.at(t, h * dim + i + n) : q.at(t, h * dim + i - n);
              expected = x * std::cos(angle) + partner * std::sin(angle);
            }
            q_expected.at(row, i) = expected;
          }
        }
      }
      expect_near(out.q, q_expected, 1e-14, "q");
      // Keys are queries of groups of one.
      AttentionShape keys = s;
      keys.num_heads = s.num_kv_heads;
      EXPECT_TRUE(rope<double>(stream, keys, k, k, inv_freq, position).q.same_bits(out.k));
    }
  }
}

TEST(Rope, BackwardIsTheTranspose) {
  Stream stream(2);
  for (const AttentionShape& s : kRopeShapes) {
    const std::int64_t tokens = s.num_seqs * s.seq_len;
    const Doubles q = normals(tokens, s.num_heads * s.head_dim, 1);
    const Doubles k = normals(tokens, s.num_kv_heads * s.head_dim, 2);
    const Doubles dq = normals(tokens * s.num_heads, s.head_dim, 3);
    const Doubles dk = normals(tokens * s.num_kv_heads, s.head_dim, 4);
    const Doubles inv_freq = inv_freq_of(s.head_dim / 2);
    const Ints position = positions_of(s);
    const auto out = rope<double>(stream, s, q, k, inv_freq, position);
    const auto back = rope_back<double>(stream, s, dq, dk, inv_freq, position);
    const double size = std::sqrt(static_cast<double>(tokens * s.num_heads * s.head_dim)) + 1;
    EXPECT_NEAR(inner(out.q, dq), inner(q, widened(back.q)), 1e-14 * size * 10);
    EXPECT_NEAR(inner(out.k, dk), inner(k, widened(back.k)), 1e-14 * size * 10);
    EXPECT_TRUE(back.q.padding_untouched() && back.k.padding_untouched());
    // A rotation: its transpose undoes it.
    expect_near(rope_back<double>(stream, s, out.q, out.k, inv_freq, position).q, q, 1e-14, "q");
  }
}

template <class T>
void expect_rope_near_double() {
  Stream one(1);
  Stream three(3);
  for (const AttentionShape& s : kRopeShapes) {
    const std::int64_t tokens = s.num_seqs * s.seq_len;
    const Doubles q = normals(tokens, s.num_heads * s.head_dim, 1);
    const Doubles k = normals(tokens, s.num_kv_heads * s.head_dim, 2);
    const Doubles inv_freq = inv_freq_of(s.head_dim / 4);
    Ints position = positions_of(s);
    // Angles formed in f64 stay exact far out.
    for (std::int32_t& p : position.data()) p += 100000;
    const auto exact = rope<double>(one, s, q, k, inv_freq, position);
    const auto a = rope<T>(one, s, as<T>(q, 5), as<T>(k, 1), inv_freq, position);
    const auto b = rope<T>(three, s, as<T>(q), as<T>(k), inv_freq, position);
    expect_near(a.q, exact.q, 3 * unit_roundoff<T>(), "q");
    expect_near(a.k, exact.k, 3 * unit_roundoff<T>(), "k");
    EXPECT_TRUE(a.q.same_bits(b.q) && a.k.same_bits(b.k));
  }
}
TEST(Rope, FloatMatchesDouble) { expect_rope_near_double<float>(); }
TEST(Rope, Bf16MatchesDouble) { expect_rope_near_double<bf16>(); }

// ---- decoding --------------------------------------------------------------------------------

/// Decoding position s of every sequence from a cache against the full pass.
template <class T>
void expect_decode_near_forward(double tolerance) {
  Stream stream(2);
  for (const AttentionShape& s : kShapes) {
    const std::int64_t dim = s.head_dim;
    const std::int64_t max_len = s.seq_len + 3;
    const Inputs in(s);
    const Ints first = first_keys(s, Mask::causal);
    const Matrix<T> q = as<T>(in.q), k = as<T>(in.k), v = as<T>(in.v);
    const auto full = forward<T>(stream, s, q, k, v, first);
    Matrix<T> k_cache = filled<T>(s.num_seqs * max_len, s.num_kv_heads * dim, from_double<T>(1e30));
    Matrix<T> v_cache = k_cache;
    for (std::int64_t b = 0; b < s.num_seqs; ++b) {
      for (std::int64_t t = 0; t < s.seq_len; ++t) {
        for (std::int64_t c = 0; c < s.num_kv_heads * dim; ++c) {
          const std::int64_t problem = b * s.num_kv_heads + c / dim;
          k_cache.at(b * max_len + t, c) = k.at(problem * s.seq_len + t, c % dim);
          v_cache.at(b * max_len + t, c) = v.at(b * s.seq_len + t, c);
        }
      }
    }
    for (const std::int64_t t : {std::int64_t{0}, s.seq_len / 2, s.seq_len - 1}) {
      Matrix<T> q_now(s.num_seqs, s.num_heads * dim);
      Doubles expected(s.num_seqs, s.num_heads * dim);
      for (std::int64_t b = 0; b < s.num_seqs; ++b) {
        for (std::int64_t c = 0; c < s.num_heads * dim; ++c) {
          const std::int64_t h = c / dim;
          const std::int64_t problem = b * s.num_kv_heads + h / s.group();
          q_now.at(b, c) = q.at((problem * s.seq_len + t) * s.group() + h % s.group(), c % dim);
          expected.at(b, c) = to_double(full.out.at(b * s.seq_len + t, c));
        }
      }
      Matrix<T> out(s.num_seqs, s.num_heads * dim, 2);
      AttentionShape step = s;
      step.seq_len = 1;
      attention_decode(
          stream, {.out = out,
                   .q = q_now,
                   .k_cache = k_cache,
                   .v_cache = v_cache,
                   .length = filled<std::int32_t>(1, s.num_seqs, static_cast<std::int32_t>(t + 1)),
                   .max_len = max_len,
                   .shape = step});
      expect_near(out, expected, tolerance, name_of_shape(s));
    }
  }
}
TEST(AttentionDecode, DoubleMatchesForward) { expect_decode_near_forward<double>(1e-13); }
TEST(AttentionDecode, FloatMatchesForward) { expect_decode_near_forward<float>(1e-5); }
TEST(AttentionDecode, Bf16MatchesForward) {
  if (!cpu::bf16_is_native()) GTEST_SKIP() << "no bf16 products on this processor";
  expect_decode_near_forward<bf16>(4 * unit_roundoff<bf16>());
}

}  // namespace
}  // namespace arcus
