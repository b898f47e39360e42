// Law: a layer with adapters is the layer of the merged weight W + scale B A, and the gradients of
// its adapters follow from that weight's, dA = scale B^T dW and dB = scale dW A^T. Bits depend on
// nothing but the rows themselves.

#include "kernels/low_rank.hpp"

#include <gtest/gtest.h>

#include <cmath>

#include "kernels/cpu/gemm_cache.hpp"
#include "tests/kernels/gemm_support.hpp"

namespace arcus {
namespace {

using testing::Matrix;
using testing::same_bits;
using testing::unit_roundoff;

template <class T>
class LowRank : public ::testing::Test {
 protected:
  void SetUp() override {
    if (std::is_same_v<T, bf16> && !cpu::bf16_is_native()) GTEST_SKIP() << "no native bf16";
  }
};
using ComputeTypes = ::testing::Types<float, bf16, double>;
TYPED_TEST_SUITE(LowRank, ComputeTypes);

constexpr double kScale = 1.75;

/// One weight of `experts` experts with its adapters.
template <class T>
struct Adapted {
  Adapted(std::int64_t experts, std::int64_t out_size, std::int64_t in_size,
          std::int64_t inner_size, std::uint32_t seed)
      : out(out_size),
        in(in_size),
        rank(inner_size),
        stride((inner_size * (in_size + out_size) + 31) / 32 * 32),
        adapters(1, experts * stride) {
    adapters.randomize(seed, 0.3);
  }
  T* a(std::int64_t e) { return adapters.row(0) + e * stride; }
  T* b(std::int64_t e) { return a(e) + rank * in; }
  LowRankWeights views() {
    return {{a(0), dtype_of<T>(), rank, in}, {b(0), dtype_of<T>(), out, rank}, stride, kScale};
  }
  double product(std::int64_t e, std::int64_t i, std::int64_t j) {
    double sum = 0;
    for (std::int64_t k = 0; k < rank; ++k) {
      sum += static_cast<double>(b(e)[i * rank + k]) * static_cast<double>(a(e)[k * in + j]);
    }
    return kScale * sum;
  }
  /// w [out, in] += scale B A.
  template <class W>
  void merge(std::int64_t e, W* w) {
    for (std::int64_t i = 0; i < out; ++i) {
      for (std::int64_t j = 0; j < in; ++j) w[i * in + j] += static_cast<W>(product(e, i, j));
    }
  }

  std::int64_t out, in, rank, stride;
  Matrix<T> adapters;
};

/// What an adapter adds to y, and to dx, of dense rows, beside the same in double.
template <class T>
void check_dense(std::int64_t rows, std::int64_t out, std::int64_t in, std::int64_t rank,
                 std::int64_t pad, bool few_rows) {
  Stream stream(2);
  Adapted<T> adapted(1, out, in, rank, 1);
  Matrix<T> x(rows, in, in + pad), y(rows, out, out + pad), dx(rows, in, in + pad);
  Matrix<T> dy(rows, out, out + pad), u(rows, rank), v(rows, rank);
  x.randomize(2), y.randomize(3), dy.randomize(4), dx.randomize(5);
  const Matrix<T> y_before = y, dx_before = dx;
  low_rank_forward(stream, {.y = y.view(),
                            .u = u.view(),
                            .x = x.view(),
                            .weights = adapted.views(),
                            .few_rows = few_rows});
  low_rank_backward(stream,
                    {.dx = dx.view(), .v = v.view(), .dy = dy.view(), .weights = adapted.views()});
  // Roundings of the inner row, of the sum and of the products' own sums.
  const double tolerance = unit_roundoff<T>() * 8 * (1 + 0.1 * static_cast<double>(in + out)) +
                           unit_roundoff<Acc<T>>() * 64 * static_cast<double>(in + out);
  for (std::int64_t t = 0; t < rows; ++t) {
    for (std::int64_t i = 0; i < out; ++i) {
      double expected = static_cast<double>(y_before.at(t, i));
      for (std::int64_t j = 0; j < in; ++j) {
        expected += static_cast<double>(x.at(t, j)) * adapted.product(0, i, j);
      }
      ASSERT_NEAR(static_cast<double>(y.at(t, i)), expected, tolerance) << "y " << t << ", " << i;
    }
    for (std::int64_t j = 0; j < in; ++j) {
      double expected = static_cast<double>(dx_before.at(t, j));
      for (std::int64_t i = 0; i < out; ++i) {
        expected += static_cast<double>(dy.at(t, i)) * adapted.product(0, i, j);
      }
      ASSERT_NEAR(static_cast<double>(dx.at(t, j)), expected, tolerance) << "dx " << t << ", " << j;
    }
    for (std::int64_t j = out; j < out + pad; ++j) ASSERT_EQ(y.at(t, j), y_before.at(t, j));
  }
}

TYPED_TEST(LowRank, DenseRowsAgreeWithDouble) {
  check_dense<TypeParam>(0, 8, 8, 4, 0, false);
  check_dense<TypeParam>(1, 5, 7, 1, 0, false);
  check_dense<TypeParam>(70, 24, 40, 4, 0, false);
  check_dense<TypeParam>(257, 33, 16, 3, 8, false);
  check_dense<TypeParam>(3, 130, 67, 16, 8, true);
  check_dense<TypeParam>(19, 24, 40, 70, 0, true);
}

TYPED_TEST(LowRank, ARowHasItsOwnBits) {
  using T = TypeParam;
  const std::int64_t rows = 300, out = 48, in = 72;
  Stream one(1), three(3);
  for (const std::int64_t rank : {1, 4, 6, 16}) {
    for (const bool few_rows : {false, true}) {
      Adapted<T> adapted(1, out, in, rank, 1);
      Matrix<T> x(rows, in), y(rows, out), u(rows, rank), dx(rows, in), v(rows, rank);
      x.randomize(2), y.randomize(3), dx.randomize(5);
      Matrix<T> y_part = y, dx_part = dx, u_part = u, v_part = v;
      const auto run = [&](Stream& stream, Matrix<T>& y_of, Matrix<T>& u_of, Matrix<T>& dx_of,
                           Matrix<T>& v_of, std::int64_t begin, std::int64_t count) {
        low_rank_forward(stream, {.y = y_of.rows(begin, count),
                                  .u = u_of.rows(begin, count),
                                  .x = x.rows(begin, count),
                                  .weights = adapted.views(),
                                  .few_rows = few_rows});
        // y as dy: any numbers will do.
        low_rank_backward(stream, {.dx = dx_of.rows(begin, count),
                                   .v = v_of.rows(begin, count),
                                   .dy = y_of.rows(begin, count),
                                   .weights = adapted.views()});
      };
      run(three, y, u, dx, v, 0, rows);
      std::int64_t begin = 0;
      for (const std::int64_t count : {1, 7, 131, 5, 156}) {
        run(one, y_part, u_part, dx_part, v_part, begin, count);
        begin += count;
      }
      ASSERT_EQ(begin, rows);
      EXPECT_TRUE(same_bits(y.values, y_part.values)) << rank;
      EXPECT_TRUE(same_bits(u.values, u_part.values)) << rank;
      EXPECT_TRUE(same_bits(dx.values, dx_part.values)) << rank;
      EXPECT_TRUE(same_bits(v.values, v_part.values)) << rank;
    }
  }
}

struct Rows {
  std::int32_t expert;
  std::int64_t micro_batch;
  std::int64_t rows;
};

/// A feed-forward of some experts with adapters everywhere, both passes and all gradients.
template <class T>
struct AdaptedFfn {
  using A = Acc<T>;
  AdaptedFfn(FfnShape ffn_shape, std::int64_t rank, std::int64_t experts,
             const std::vector<Rows>& parts)
      : shape(ffn_shape),
        expert_stride(3 * shape.hidden_size * shape.ff_size),
        weights(1, experts * expert_stride),
        gate(experts, shape.ff_size, shape.hidden_size, rank, 11),
        up(experts, shape.ff_size, shape.hidden_size, rank, 12),
        down(experts, shape.hidden_size, shape.ff_size, rank, 13),
        x(place(parts), shape.hidden_size, 0, kWgradRowPadding),
        y(num_rows, shape.hidden_size),
        dout(num_rows, shape.hidden_size),
        dx(num_rows, shape.hidden_size),
        gate_up(num_padded, 2 * shape.ff_size),
        act(num_padded, shape.ff_size),
        dy(num_padded, shape.hidden_size),
        dgate_up(num_padded, 2 * shape.ff_size) {
    weights.randomize(1, 0.3), x.randomize(2), dout.randomize(3);
    for (Matrix<T>* inner : {&u_gate, &u_up, &u_down, &v_gate, &v_up, &v_down}) {
      *inner = Matrix<T>(num_padded, rank);
      // What earlier steps left must not matter.
      std::fill(inner->values.begin(), inner->values.end(), static_cast<T>(static_cast<A>(NAN)));
    }
  }
  std::int64_t place(const std::vector<Rows>& parts) {
    for (const Rows& part : parts) {
      segments.push_back({part.expert, part.micro_batch, num_rows, num_padded, part.rows});
      num_rows += part.rows;
      num_padded += padded_rows(part.rows);
    }
    return num_rows;
  }
  FfnWeights views() {
    const std::int64_t h = shape.hidden_size, f = shape.ff_size;
    T* first = weights.row(0);
    return {
        {first, dtype_of<T>(), 2 * f, h}, {first + 2 * f * h, dtype_of<T>(), h, f}, expert_stride};
  }
  void run(Stream& stream, bool adapted, bool few_rows = false) {
    FfnForward forward{.y = y.view(),
                       .gate_up = gate_up.view(),
                       .act = act.view(),
                       .x = x.view(),
                       .weights = views(),
                       .shape = shape,
                       .segments = segments,
                       .few_rows = few_rows};
    FfnBackward backward{.dx = dx.view(),
                         .dy = dy.view(),
                         .dgate_up = dgate_up.view(),
                         .dout = dout.view(),
                         .gate_up = gate_up.view(),
                         .weights = views(),
                         .shape = shape,
                         .segments = segments};
    if (adapted) {
      forward.low_rank = {
          {gate.views(), u_gate.view()}, {up.views(), u_up.view()}, {down.views(), u_down.view()}};
      backward.low_rank = {
          {gate.views(), v_gate.view()}, {up.views(), v_up.view()}, {down.views(), v_down.view()}};
    }
    ffn_forward(stream, forward);
    if (!few_rows) ffn_backward(stream, backward);
  }
  /// Sums of the weights' gradients, laid out like them.
  template <class S>
  std::vector<S> wgrad(Stream& stream) {
    std::vector<S> sums(weights.values.size(), S(0));
    const std::int64_t matrix = shape.hidden_size * shape.ff_size;
    const GradientSum sum{.sum = sums.data(), .dtype = dtype_of<S>(), .limit = leaf_limit(8)};
    ffn_wgrad(stream, {.dgate = sum,
                       .dup = sum.at(matrix),
                       .ddown = sum.at(2 * matrix),
                       .expert_stride = expert_stride,
                       .x = x.view(),
                       .act = act.view(),
                       .dy = dy.view(),
                       .dgate_up = dgate_up.view(),
                       .shape = shape,
                       .segments = segments});
    return sums;
  }
  /// The same of one projection's adapters.
  template <class S>
  std::vector<S> adapter_wgrad(Stream& stream, Adapted<T>& of, BadLeafFlag* flag = nullptr) {
    std::vector<S> sums(of.adapters.values.size(), S(0));
    const GradientSum sum{.sum = sums.data(),
                          .dtype = dtype_of<S>(),
                          .limit = leaf_limit(8),
                          .tensor_idx = 10,
                          .flag = flag};
    const bool is_down = &of == &down;
    const std::int64_t f = shape.ff_size;
    LowRankWgrad args{.da = sum,
                      .db = sum.at(of.rank * of.in),
                      .expert_stride = of.stride,
                      .tensor_idx_stride = 1,
                      .x = is_down ? act.view() : x.view(),
                      .x_is_padded = is_down,
                      .dy = is_down      ? dy.view()
                            : &of == &up ? dgate_up.view().col_range(f, f)
                                         : dgate_up.view().col_range(0, f),
                      .u = (is_down      ? u_down
                            : &of == &up ? u_up
                                         : u_gate)
                               .view(),
                      .v = (is_down      ? v_down
                            : &of == &up ? v_up
                                         : v_gate)
                               .view(),
                      .segments = segments};
    args.db.tensor_idx = 100;
    low_rank_wgrad(stream, args);
    return sums;
  }

  FfnShape shape;
  std::int64_t expert_stride;
  std::int64_t num_rows = 0, num_padded = 0;
  std::vector<Segment> segments;
  Matrix<T> weights;
  Adapted<T> gate, up, down;
  Matrix<T> x, y, dout, dx, gate_up, act, dy, dgate_up;
  Matrix<T> u_gate{0, 1}, u_up{0, 1}, u_down{0, 1}, v_gate{0, 1}, v_up{0, 1}, v_down{0, 1};
};

const FfnShape kShape{24, 40};
const std::vector<Rows> kParts = {{0, 3, 1},  {0, 5, 33}, {1, 0, 0},
                                  {1, 3, 64}, {1, 4, 7},  {3, 9, 31}};

TEST(LowRankFfn, IsTheFeedForwardOfTheMergedWeights) {
  Stream stream(2);
  for (const std::int64_t rank : {1, 4, 7}) {
    AdaptedFfn<double> adapted(kShape, rank, 4, kParts);
    AdaptedFfn<double> merged(kShape, rank, 4, kParts);
    const std::int64_t matrix = kShape.hidden_size * kShape.ff_size;
    for (std::int64_t e = 0; e < 4; ++e) {
      double* w = merged.weights.row(0) + e * merged.expert_stride;
      adapted.gate.merge(e, w);
      adapted.up.merge(e, w + matrix);
      adapted.down.merge(e, w + 2 * matrix);
    }
    adapted.run(stream, true);
    merged.run(stream, false);
    const auto expect_near = [](const std::vector<double>& a, const std::vector<double>& b) {
      ASSERT_EQ(a.size(), b.size());
      for (std::size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], 1e-11);
    };
    expect_near(adapted.y.values, merged.y.values);
    expect_near(adapted.dx.values, merged.dx.values);
    // dA = scale B^T dW, dB = scale dW A^T.
    const std::vector<double> dw = merged.wgrad<double>(stream);
    adapted.wgrad<double>(stream);  // zeroes act's padding, as the model does
    std::int64_t offset = 0;
    for (Adapted<double>* of : {&adapted.gate, &adapted.up, &adapted.down}) {
      const std::vector<double> sums = adapted.adapter_wgrad<double>(stream, *of);
      for (std::int64_t e = 0; e < 4; ++e) {
        const double* w = dw.data() + e * adapted.expert_stride + offset;
        const double* da = sums.data() + e * of->stride;
        const double* db = da + rank * of->in;
        for (std::int64_t k = 0; k < rank; ++k) {
          for (std::int64_t j = 0; j < of->in; ++j) {
            double expected = 0;
            for (std::int64_t i = 0; i < of->out; ++i) {
              expected += kScale * of->b(e)[i * rank + k] * w[i * of->in + j];
            }
            ASSERT_NEAR(da[k * of->in + j], expected, 1e-10) << "dA of expert " << e;
          }
          for (std::int64_t i = 0; i < of->out; ++i) {
            double expected = 0;
            for (std::int64_t j = 0; j < of->in; ++j) {
              expected += kScale * w[i * of->in + j] * of->a(e)[k * of->in + j];
            }
            ASSERT_NEAR(db[i * rank + k], expected, 1e-10) << "dB of expert " << e;
          }
        }
      }
      offset += matrix;
    }
  }
}

// Other compute types do what double does.
TYPED_TEST(LowRank, FeedForwardAgreesWithDouble) {
  using T = TypeParam;
  Stream stream(2);
  AdaptedFfn<T> small(kShape, 4, 4, kParts);
  AdaptedFfn<double> exact(kShape, 4, 4, kParts);
  const auto widen = [](const Matrix<T>& from, Matrix<double>& to) {
    for (std::size_t i = 0; i < from.values.size(); ++i)
      to.values[i] = static_cast<double>(from.values[i]);
  };
  widen(small.weights, exact.weights), widen(small.x, exact.x), widen(small.dout, exact.dout);
  widen(small.gate.adapters, exact.gate.adapters), widen(small.up.adapters, exact.up.adapters);
  widen(small.down.adapters, exact.down.adapters);
  exact.run(stream, true);
  const auto expect_near = [](const Matrix<T>& a, const Matrix<double>& b, const char* what) {
    double largest = 0;
    for (const double value : b.values) largest = std::max(largest, std::abs(value));
    const double tolerance = 32 * unit_roundoff<T>() * largest + 1e-13;
    for (std::size_t i = 0; i < static_cast<std::size_t>(b.num_rows * b.num_cols); ++i) {
      ASSERT_NEAR(static_cast<double>(a.values[i]), b.values[i], tolerance) << what;
    }
  };
  small.run(stream, true);
  expect_near(small.y, exact.y, "y");
  expect_near(small.dx, exact.dx, "dx");
  small.run(stream, true, /*few_rows=*/true);
  expect_near(small.y, exact.y, "y of few rows");
}

TYPED_TEST(LowRank, ASegmentAloneHasTheBitsItHasAmongOthers) {
  using T = TypeParam;
  Stream one(1), two(2), three(3);
  const FfnShape shape{64, 96};
  AdaptedFfn<T> all(shape, 6, 2, {{0, 0, 300}, {0, 1, 37}, {1, 0, 5}, {1, 1, 129}});
  all.run(two, true);
  for (const Segment& segment : all.segments) {
    AdaptedFfn<T> alone(shape, 6, 2,
                        {{segment.local_expert_idx, segment.micro_batch, segment.rows}});
    const std::int64_t count = segment.rows * shape.hidden_size;
    std::copy_n(all.x.row(segment.row_begin), count, alone.x.row(0));
    std::copy_n(all.dout.row(segment.row_begin), count, alone.dout.row(0));
    alone.run(segment.rows % 2 == 0 ? one : three, true);
    EXPECT_TRUE(same_bits(alone.y.row(0), all.y.row(segment.row_begin), count));
    EXPECT_TRUE(same_bits(alone.dx.row(0), all.dx.row(segment.row_begin), count));
    for (const auto& [a, b] :
         {std::pair{&alone.u_down, &all.u_down}, {&alone.v_gate, &all.v_gate}}) {
      EXPECT_TRUE(same_bits(a->row(0), b->row(segment.padded_begin), segment.rows * 6));
    }
  }
}

TEST(LowRankFfn, SumsDoNotDependOnOrderOrThreads) {
  Stream one(1), three(3);
  AdaptedFfn<float> ffn({48, 600}, 5, 2, {{0, 0, 130}, {0, 1, 40}, {0, 7, 9}, {1, 2, 33}});
  ffn.run(three, true);
  ffn.wgrad<float>(one);
  for (Adapted<float>* of : {&ffn.gate, &ffn.up, &ffn.down}) {
    const auto expected = ffn.adapter_wgrad<std::int64_t>(one, *of);
    EXPECT_EQ(ffn.adapter_wgrad<std::int64_t>(three, *of), expected);
    // Segment by segment, the last first.
    std::vector<std::int64_t> sums(expected.size());
    const std::vector<Segment> all = ffn.segments;
    for (auto segment = all.rbegin(); segment != all.rend(); ++segment) {
      ffn.segments = {*segment};
      const auto part = ffn.adapter_wgrad<std::int64_t>(one, *of);
      for (std::size_t i = 0; i < sums.size(); ++i) sums[i] += part[i];
    }
    ffn.segments = all;
    EXPECT_EQ(sums, expected);
  }
}

TEST(LowRankFfn, ABadLeafIsNamed) {
  Stream stream(1);
  AdaptedFfn<float> ffn({16, 16}, 2, 3, {{0, 0, 4}, {2, 5, 4}});
  ffn.run(stream, true);
  ffn.wgrad<float>(stream);
  ffn.v_up.row(ffn.segments[1].padded_begin)[0] = INFINITY;
  BadLeafFlag flag{kNoBadLeaf};
  ffn.adapter_wgrad<std::int64_t>(stream, ffn.up, &flag);
  EXPECT_EQ(flag, bad_leaf_key(10 + 2, 5));
}

}  // namespace
}  // namespace arcus
