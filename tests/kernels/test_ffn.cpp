#include "kernels/ffn.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>

#include "kernels/cpu/gemm_cache.hpp"
#include "tests/kernels/gemm_support.hpp"

namespace arcus {
namespace {

using testing::Matrix;
using testing::same_bits;
using testing::unit_roundoff;

/// One set of experts with rows of several micro-batches, all buffers and both passes.
template <class T>
struct Experts {
  using A = Acc<T>;
  struct Rows {
    std::int32_t expert;
    std::int64_t micro_batch;
    std::int64_t rows;
  };

  /// `gap` rows between segments of the exchanged buffers: segments start anywhere.
  Experts(FfnShape ffn_shape, std::int64_t experts, const std::vector<Rows>& parts,
          std::int64_t gap = 0)
      : shape(ffn_shape),
        num_experts(experts),
        expert_stride(shape.weight_elements() + 64),
        bias_stride(shape.bias ? shape.gate_up_size() + shape.hidden_size + 5 : 0),
        weights(1, experts * expert_stride),
        biases(1, experts * bias_stride),
        x(place(parts, gap), shape.hidden_size, 0, kWgradRowPadding),
        y(num_rows, shape.hidden_size),
        dout(num_rows, shape.hidden_size),
        dx(num_rows, shape.hidden_size),
        row_weight(1, num_rows),
        drow_weight(1, num_rows),
        gate_up(num_padded, shape.gate_up_size(), ffn_row_stride(shape.gate_up_size())),
        act(num_padded, shape.ff_size, ffn_row_stride(shape.ff_size)),
        dy(num_padded, shape.hidden_size, ffn_row_stride(shape.hidden_size)),
        dgate_up(num_padded, shape.gate_up_size(), ffn_row_stride(shape.gate_up_size())) {
    weights.randomize(1, 0.3), biases.randomize(8), x.randomize(2), dout.randomize(3),
        row_weight.randomize(4);
    y.randomize(5), dx.randomize(6), drow_weight.randomize(7);
    // What earlier steps left in local buffers must not matter.
    for (Matrix<T>* buffer : {&gate_up, &act, &dy, &dgate_up}) {
      std::fill(buffer->values.begin(), buffer->values.end(), static_cast<T>(static_cast<A>(NAN)));
    }
  }

  std::int64_t place(const std::vector<Rows>& parts, std::int64_t gap) {
    for (const Rows& part : parts) {
      segments.push_back({part.expert, part.micro_batch, num_rows + gap, num_padded, part.rows});
      num_rows += part.rows + gap;
      num_padded += padded_rows(part.rows);
    }
    return num_rows;
  }

  /// Where the matrices begin among an expert's weights, and its biases among those; up stands
  /// where gate would without one.
  std::int64_t up_at() const { return shape.gated() ? shape.ff_size * shape.hidden_size : 0; }
  std::int64_t down_at() const { return shape.gate_up_size() * shape.hidden_size; }
  std::int64_t up_bias_at() const { return shape.gated() ? shape.ff_size : 0; }
  T* gate(std::int64_t e) { return weights.row(0) + e * expert_stride; }
  T* up(std::int64_t e) { return gate(e) + up_at(); }
  T* down(std::int64_t e) { return gate(e) + down_at(); }
  FfnWeights views() {
    const std::int64_t h = shape.hidden_size, f = shape.ff_size, u = shape.gate_up_size();
    FfnWeights result{
        {gate(0), dtype_of<T>(), u, h}, {down(0), dtype_of<T>(), h, f}, expert_stride};
    if (!shape.bias) return result;
    result.gate_up_bias = {biases.row(0), dtype_of<A>(), 1, u};
    result.down_bias = {biases.row(0) + u, dtype_of<A>(), 1, h};
    result.bias_stride = bias_stride;
    return result;
  }
  void forward(Stream& stream, bool few_rows = false) {
    ffn_forward(stream, {.y = y.view(),
                         .gate_up = gate_up.view(),
                         .act = act.view(),
                         .x = x.view(),
                         .weights = views(),
                         .shape = shape,
                         .segments = segments,
                         .few_rows = few_rows});
  }
  void backward(Stream& stream, bool with_weights) {
    FfnBackward args{.dx = dx.view(),
                     .dy = dy.view(),
                     .dgate_up = dgate_up.view(),
                     .dout = dout.view(),
                     .gate_up = gate_up.view(),
                     .weights = views(),
                     .shape = shape,
                     .segments = segments};
    if (with_weights) {
      args.drow_weight = drow_weight.view();
      args.row_weight = row_weight.view();
      args.y = y.view();
    }
    ffn_backward(stream, args);
  }
  /// Sums of S laid out like the weights, then the biases.
  template <class S>
  std::vector<S> wgrad(Stream& stream, BadLeafFlag* flag = nullptr) {
    std::vector<S> sums(weights.values.size() + biases.values.size(), S(0));
    const GradientSum sum{.sum = sums.data(),
                          .dtype = dtype_of<S>(),
                          .limit = leaf_limit(8),
                          .tensor_idx = 10,
                          .flag = flag};
    FfnWgrad args{.dgate = shape.gated() ? sum : GradientSum(),
                  .dup = sum.at(up_at()),
                  .ddown = sum.at(down_at()),
                  .expert_stride = expert_stride,
                  .tensor_idx_stride = 3,
                  .x = x.view(),
                  .act = act.view(),
                  .dy = dy.view(),
                  .dgate_up = dgate_up.view(),
                  .shape = shape,
                  .segments = segments};
    args.dup.tensor_idx = 11;
    args.ddown.tensor_idx = 12;
    if (shape.bias) {
      const GradientSum bias = sum.at(std::ssize(weights.values));
      if (shape.gated()) args.dgate_bias = bias;
      args.dup_bias = bias.at(up_bias_at());
      args.ddown_bias = bias.at(shape.gate_up_size());
      args.bias_stride = bias_stride;
      args.dup_bias.tensor_idx = 100;
    }
    ffn_wgrad(stream, args);
    return sums;
  }

  FfnShape shape;
  std::int64_t num_experts, expert_stride, bias_stride;
  std::int64_t num_rows = 0, num_padded = 0;
  std::vector<Segment> segments;
  Matrix<T> weights;
  Matrix<A> biases;
  Matrix<T> x, y, dout, dx;
  Matrix<A> row_weight, drow_weight;
  Matrix<T> gate_up, act, dy, dgate_up;
};

/// act and its derivatives by gate and by up, straight from the formulas.
struct Point {
  double act, by_gate, by_up;
};
Point activate(Activation activation, double gate, double up) {
  const double pi = std::acos(-1.0);
  switch (activation) {
    case Activation::swiglu: {
      const double s = 1 / (1 + std::exp(-gate));
      return {gate * s * up, up * s * (1 + gate * (1 - s)), gate * s};
    }
    case Activation::gelu_new: {
      const double scale = std::sqrt(2 / pi);
      const double t = std::tanh(scale * (up + 0.044715 * std::pow(up, 3)));
      return {
          0.5 * up * (1 + t), 0,
          0.5 * (1 + t) + 0.5 * up * (1 - t * t) * scale * (1 + 3 * 0.044715 * std::pow(up, 2))};
    }
    case Activation::gelu: {
      const double p = 0.5 * (1 + std::erf(up / std::sqrt(2.0)));
      return {up * p, 0, p + up * std::exp(-0.5 * up * up) / std::sqrt(2 * pi)};
    }
  }
  return {};
}

/// The same in double, row by row, straight from the formulas.
struct Reference {
  template <class T>
  explicit Reference(Experts<T>& e, bool with_weights)
      : hidden(e.shape.hidden_size),
        width(e.shape.ff_size),
        y(e.num_rows, hidden),
        dx(e.num_rows, hidden),
        drow_weight(1, e.num_rows),
        sums(1, std::ssize(e.weights.values) + std::ssize(e.biases.values)) {
    for (const Segment& segment : e.segments) {
      for (std::int64_t i = 0; i < segment.rows; ++i) {
        add_row(e, segment.local_expert_idx, segment.row_begin + i, with_weights);
      }
    }
  }

  template <class T>
  void add_row(Experts<T>& e, std::int64_t expert, std::int64_t r, bool with_weights) {
    const bool gated = e.shape.gated();
    const auto w = [](const T* matrix, std::int64_t i) { return static_cast<double>(matrix[i]); };
    const auto bias = [&](std::int64_t at) {
      return e.shape.bias ? static_cast<double>(e.biases.row(0)[expert * e.bias_stride + at]) : 0;
    };
    std::vector<double> dyr(hidden);
    std::vector<Point> points(width);
    for (std::int64_t f = 0; f < width; ++f) {
      double g = gated ? bias(f) : 0;
      double u = bias(e.up_bias_at() + f);
      for (std::int64_t h = 0; h < hidden; ++h) {
        const auto x = static_cast<double>(e.x.at(r, h));
        if (gated) g += x * w(e.gate(expert), f * hidden + h);
        u += x * w(e.up(expert), f * hidden + h);
      }
      points[f] = activate(e.shape.activation, g, u);
    }
    for (std::int64_t h = 0; h < hidden; ++h) {
      y.at(r, h) = bias(e.shape.gate_up_size() + h);
      for (std::int64_t f = 0; f < width; ++f) {
        y.at(r, h) += points[f].act * w(e.down(expert), h * width + f);
      }
      const double dout = static_cast<double>(e.dout.at(r, h));
      dyr[h] = with_weights ? dout * static_cast<double>(e.row_weight.at(0, r)) : dout;
      drow_weight.at(0, r) += dout * y.at(r, h);
    }
    double* sum = sums.row(0) + expert * e.expert_stride;
    double* bias_sum = sums.row(0) + std::ssize(e.weights.values) + expert * e.bias_stride;
    for (std::int64_t h = 0; h < hidden && e.shape.bias; ++h) {
      bias_sum[e.shape.gate_up_size() + h] += dyr[h];
    }
    for (std::int64_t f = 0; f < width; ++f) {
      double da = 0;
      for (std::int64_t h = 0; h < hidden; ++h) {
        da += dyr[h] * w(e.down(expert), h * width + f);
        sum[e.down_at() + h * width + f] += dyr[h] * points[f].act;
      }
      const double du = da * points[f].by_up;
      const double dg = da * points[f].by_gate;
      if (e.shape.bias) {
        bias_sum[e.up_bias_at() + f] += du;
        if (gated) bias_sum[f] += dg;
      }
      for (std::int64_t h = 0; h < hidden; ++h) {
        const auto x = static_cast<double>(e.x.at(r, h));
        dx.at(r, h) += du * w(e.up(expert), f * hidden + h);
        sum[e.up_at() + f * hidden + h] += du * x;
        if (!gated) continue;
        dx.at(r, h) += dg * w(e.gate(expert), f * hidden + h);
        sum[f * hidden + h] += dg * x;
      }
    }
  }

  std::int64_t hidden, width;
  Matrix<double> y, dx, drow_weight, sums;
};

/// Every activation, with and without biases.
std::vector<FfnShape> variants_of(const FfnShape& shape) {
  std::vector<FfnShape> variants;
  for (const Activation activation : {Activation::swiglu, Activation::gelu_new, Activation::gelu}) {
    for (const bool bias : {false, true}) {
      variants.push_back({shape.hidden_size, shape.ff_size, activation, bias});
    }
  }
  return variants;
}

template <class T>
class Ffn : public ::testing::Test {
 protected:
  void SetUp() override {
    if (std::is_same_v<T, bf16> && !cpu::bf16_is_native()) GTEST_SKIP() << "no native bf16";
  }
};
using ComputeTypes = ::testing::Types<float, bf16, double>;
TYPED_TEST_SUITE(Ffn, ComputeTypes);

double largest(const Matrix<double>& matrix) {
  double result = 0;
  for (const double value : matrix.values) result = std::max(result, std::abs(value));
  return result;
}

/// Errors of chained products stay within a few dozen roundings of the largest result.
template <class T, class S>
void check_near(const S* values, const Matrix<double>& expected, double scale, const char* what) {
  const double tolerance = 24 * unit_roundoff<T>() * largest(expected) + 1e-13;
  for (std::size_t i = 0; i < expected.values.size(); ++i) {
    ASSERT_NEAR(static_cast<double>(values[i]) * scale, expected.values[i], tolerance)
        << what << ", element " << i;
  }
}

template <class T>
void check_all(Experts<T>& experts, bool with_weights) {
  Stream stream(2);
  const Matrix<T> y_before = experts.y;
  const Matrix<T> dx_before = experts.dx;
  const Reference reference(experts, with_weights);
  experts.forward(stream);
  experts.backward(stream, with_weights);
  // Rows outside the segments belong to nobody: forward and backward leave them alone.
  Matrix<T> y = experts.y, dx = experts.dx;
  Matrix<Acc<T>> drow_weight = experts.drow_weight;
  std::vector<bool> used(static_cast<std::size_t>(experts.num_rows));
  for (const Segment& s : experts.segments) {
    std::fill_n(used.begin() + s.row_begin, s.rows, true);
  }
  for (std::int64_t r = 0; r < experts.num_rows; ++r) {
    if (used[static_cast<std::size_t>(r)]) continue;
    const std::int64_t hidden = experts.shape.hidden_size;
    ASSERT_TRUE(same_bits(y.row(r), &y_before.at(r, 0), hidden)) << "row " << r;
    ASSERT_TRUE(same_bits(dx.row(r), &dx_before.at(r, 0), hidden)) << "row " << r;
    std::fill_n(y.row(r), hidden, T{}), std::fill_n(dx.row(r), hidden, T{});
    drow_weight.at(0, r) = 0;
  }
  check_near<T>(y.values.data(), reference.y, 1, "y");
  check_near<T>(dx.values.data(), reference.dx, 1, "dx");
  if (with_weights) check_near<T>(drow_weight.values.data(), reference.drow_weight, 1, "dweight");
  const auto plain = experts.template wgrad<Acc<T>>(stream);
  check_near<T>(plain.data(), reference.sums, 1, "plain weight gradients");
  if constexpr (!std::is_same_v<T, double>) {
    BadLeafFlag flag{kNoBadLeaf};
    const auto exact = experts.template wgrad<std::int64_t>(stream, &flag);
    check_near<T>(exact.data(), reference.sums, 0x1p-50, "weight gradients");
    EXPECT_EQ(flag, kNoBadLeaf);
  }
}

TYPED_TEST(Ffn, AgreesWithDouble) {
  // Odd places, empty segments, several micro-batches of one expert, an expert without rows.
  for (const FfnShape& shape : variants_of({24, 40})) {
    SCOPED_TRACE(
        fmt::format("activation {}, bias {}", static_cast<int>(shape.activation), shape.bias));
    Experts<TypeParam> experts(
        shape, 4, {{0, 3, 1}, {0, 5, 33}, {1, 0, 0}, {1, 3, 64}, {1, 4, 7}, {3, 9, 31}}, 3);
    check_all(experts, true);
    FfnShape small = shape;
    small.hidden_size = 17, small.ff_size = 19;
    Experts<TypeParam> odd(small, 1, {{0, 0, 5}});
    check_all(odd, false);
    Experts<TypeParam> nothing(small, 2, {{0, 0, 0}, {1, 0, 0}});
    check_all(nothing, true);
    Experts<TypeParam> none(small, 2, {});
    check_all(none, true);
  }
}

// For decoding: as many rows as there are texts, blocks of 64 columns and what is left.
TYPED_TEST(Ffn, FewRowsAgreeWithDouble) {
  std::vector<FfnShape> shapes = variants_of({24, 40});
  for (const FfnShape& shape : variants_of({130, 67})) shapes.push_back(shape);
  for (const FfnShape& shape : shapes) {
    Experts<TypeParam> experts(shape, 3, {{0, 3, 1}, {1, 0, 0}, {1, 3, 19}, {2, 0, 5}}, 2);
    const Reference reference(experts, false);
    Stream stream(2);
    const Matrix<TypeParam> before = experts.y;
    experts.forward(stream, true);
    Matrix<TypeParam> y = experts.y;
    std::int64_t next = 0;
    for (const Segment& segment : experts.segments) {
      for (; next < segment.row_begin; ++next) {
        ASSERT_TRUE(same_bits(y.row(next), &before.at(next, 0), shape.hidden_size));
        std::fill_n(y.row(next), shape.hidden_size, TypeParam{});
      }
      next += segment.rows;
    }
    check_near<TypeParam>(y.values.data(), reference.y, 1, "y");
  }
}

TYPED_TEST(Ffn, TileEdges) {
  for (const std::int64_t rows : {255, 256, 257}) {
    Experts<TypeParam> experts({16, 8}, 1, {{0, 0, rows}});
    check_all(experts, true);
  }
}

/// One expert, several dW tiles: more than 256 rows of dW, and a tail.
TYPED_TEST(Ffn, SeveralWeightTiles) {
  if (std::is_same_v<TypeParam, double>) GTEST_SKIP() << "shape covered by the small cases";
  for (const FfnShape& shape : variants_of({8, 700})) {
    Experts<TypeParam> experts(shape, 1, {{0, 0, 40}, {0, 1, 3}});
    check_all(experts, true);
  }
}

TYPED_TEST(Ffn, ASegmentAloneHasTheBitsItHasAmongOthers) {
  using T = TypeParam;
  const FfnShape size = std::is_same_v<T, double> ? FfnShape{32, 64} : FfnShape{512, 1024};
  FfnShape biased = size;
  biased.activation = Activation::gelu_new, biased.bias = true;
  for (const FfnShape& shape : {size, biased}) {
    Stream one(1), two(2), three(3);
    Experts<T> all(shape, 2, {{0, 0, 300}, {0, 1, 37}, {1, 0, 5}, {1, 1, 129}}, 1);
    all.forward(two);
    all.backward(two, true);
    std::vector<Acc<T>> total(all.weights.values.size(), 0);
    for (const Segment& segment : all.segments) {
      Experts<T> alone(shape, 2, {{segment.local_expert_idx, segment.micro_batch, segment.rows}});
      const std::int64_t count = segment.rows * shape.hidden_size;
      std::copy_n(all.x.row(segment.row_begin), count, alone.x.row(0));
      std::copy_n(all.dout.row(segment.row_begin), count, alone.dout.row(0));
      std::copy_n(all.row_weight.row(0) + segment.row_begin, segment.rows, alone.row_weight.row(0));
      alone.forward(one);
      alone.backward(three, true);
      EXPECT_TRUE(same_bits(alone.y.row(0), all.y.row(segment.row_begin), count));
      EXPECT_TRUE(same_bits(alone.dx.row(0), all.dx.row(segment.row_begin), count));
      EXPECT_TRUE(same_bits(alone.drow_weight.row(0), all.drow_weight.row(0) + segment.row_begin,
                            segment.rows));
    }
  }
}

/// Leaves added segment by segment, in any order and on any number of threads, give the same sums.
TEST(FfnWgrad, SumsDoNotDependOnOrderOrThreads) {
  for (const FfnShape& shape : variants_of({96, 600})) {
    Stream one(1), two(2), three(3);
    Experts<float> experts(shape, 2, {{0, 0, 130}, {0, 1, 40}, {0, 7, 9}, {1, 0, 64}, {1, 2, 33}});
    experts.forward(two);
    experts.backward(two, true);
    const auto expected = experts.wgrad<std::int64_t>(one);
    EXPECT_EQ(experts.wgrad<std::int64_t>(two), expected);
    EXPECT_EQ(experts.wgrad<std::int64_t>(three), expected);
    const auto plain = experts.wgrad<float>(one);
    EXPECT_TRUE(same_bits(experts.wgrad<float>(three), plain));
    const std::vector<Segment> all = experts.segments;
    std::vector<std::int64_t> total(expected.size());
    for (const std::size_t i : {4, 1, 0, 3, 2}) {
      experts.segments = {all[i]};
      const auto part = experts.wgrad<std::int64_t>(two);
      for (std::size_t j = 0; j < total.size(); ++j) total[j] += part[j];
    }
    EXPECT_EQ(total, expected);
  }
}

/// In double every addition shows, in float the one rounding at the end.
template <class T>
void expect_bias_leaf_in_blocks() {
  Stream stream(2);
  Experts<T> experts({8, 300, Activation::gelu, true}, 2, {{0, 0, 3}, {1, 0, 150}}, 1);
  experts.forward(stream);
  experts.backward(stream, true);
  const auto sums = experts.template wgrad<Acc<T>>(stream);
  const std::int64_t first = std::ssize(experts.weights.values) + experts.bias_stride;
  const std::int64_t begin = experts.segments[1].padded_begin;
  const auto check = [&](const Matrix<T>& dy, std::int64_t at) {
    for (std::int64_t c = 0; c < dy.num_cols; ++c) {
      double total = 0;
      for (std::int64_t block = 0; block < 150; block += 64) {
        double sum = 0;
        for (std::int64_t t = block; t < std::min<std::int64_t>(150, block + 64); ++t) {
          sum += static_cast<double>(dy.at(begin + t, c));
        }
        total += sum;
      }
      ASSERT_EQ(sums[first + at + c], static_cast<Acc<T>>(total)) << c;
    }
  };
  check(experts.dgate_up, 0);
  check(experts.dy, 300);
}
TEST(FfnWgrad, BiasLeavesFollowTheirBlocks) {
  expect_bias_leaf_in_blocks<double>();
  expect_bias_leaf_in_blocks<float>();
}

TEST(FfnWgrad, ABadLeafNamesTensorAndMicroBatch) {
  Stream stream(2);
  Experts<float> experts({16, 16}, 2, {{0, 4, 3}, {1, 2, 3}, {1, 6, 3}});
  experts.forward(stream);
  experts.backward(stream, true);
  experts.dgate_up.at(experts.segments[2].padded_begin, 20) = INFINITY;  // an up column
  BadLeafFlag flag{kNoBadLeaf};
  experts.wgrad<std::int64_t>(stream, &flag);
  EXPECT_EQ(flag, bad_leaf_key(11 + 3, 6));
  experts.dgate_up.at(experts.segments[1].padded_begin, 20) = 1e9F;  // finite, over the limit
  flag = kNoBadLeaf;
  experts.wgrad<std::int64_t>(stream, &flag);
  EXPECT_EQ(flag, bad_leaf_key(11 + 3, 2));

  Experts<float> biased({16, 16, Activation::gelu, true}, 2, {{0, 4, 3}, {1, 2, 3}, {1, 6, 3}});
  biased.forward(stream);
  biased.backward(stream, true);
  std::fill(biased.x.values.begin(), biased.x.values.end(), 0.0F);  // the weight's leaf stays good
  biased.dgate_up.at(biased.segments[2].padded_begin, 3) = 1e9F;
  flag = kNoBadLeaf;
  biased.wgrad<std::int64_t>(stream, &flag);
  EXPECT_EQ(flag, bad_leaf_key(100 + 3, 6));
}

TEST(FfnPrimitives, NothingIsBuiltLate) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    if (dtype == DType::bf16 && !cpu::bf16_is_native()) continue;
    for (const FfnShape& shape : variants_of({32, 48})) {
      Stream stream(2);
      const std::int64_t most = shape.gated() && !shape.bias ? 290 : 70;
      build_primitives(stream, ffn_gemm_shapes(shape, dtype, most, true));
      dispatch_compute(dtype, [&]<class T>() {
        if constexpr (!std::is_same_v<T, double>) {
          for (std::int64_t rows = 1; rows <= most; ++rows) {
            Experts<T> experts(shape, 2, {{0, 0, rows}, {1, 0, most + 1 - rows}});
            experts.forward(stream);
            experts.backward(stream, true);
            experts.template wgrad<std::int64_t>(stream);
            experts.template wgrad<float>(stream);
          }
        }
      });
      EXPECT_EQ(late_primitives(stream), 0) << name_of(dtype);
    }
  }
}

}  // namespace
}  // namespace arcus
