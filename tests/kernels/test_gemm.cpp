#include "kernels/gemm.hpp"

#include <gtest/gtest.h>

#include <cmath>

#include "kernels/cpu/gemm_cache.hpp"
#include "kernels/peak.hpp"
#include "tests/kernels/gemm_support.hpp"

namespace arcus {
namespace {

using testing::Matrix;
using testing::same_bits;
using testing::unit_roundoff;

template <class T>
class Gemm : public ::testing::Test {
 protected:
  void SetUp() override {
    if (std::is_same_v<T, bf16> && !cpu::bf16_is_native()) GTEST_SKIP() << "no native bf16";
  }
};
using ComputeTypes = ::testing::Types<float, bf16, double>;
TYPED_TEST_SUITE(Gemm, ComputeTypes);

/// |error| of a sum of k products of numbers in [-1, 1]: any order of f32 (f64) sums stays inside.
template <class T, class Result>
double tolerance(std::int64_t k, double magnitude) {
  return 2 * (static_cast<double>(k) + 2) * unit_roundoff<Acc<T>>() * magnitude +
         2 * unit_roundoff<Result>() * magnitude + 1e-30;
}

struct Shape {
  std::int64_t rows, out, in;
};
const std::vector<Shape> kShapes = {{0, 16, 16},   {1, 16, 32},    {1, 1, 1},      {3, 17, 5},
                                    {255, 33, 65}, {256, 64, 64},  {257, 48, 100}, {600, 130, 31},
                                    {64, 256, 7},  {130, 600, 257}};

template <class T, class Result>
void check_forward(const Shape& s, std::int64_t x_pad, std::int64_t y_pad, bool with_bias,
                   bool accumulate, bool few_rows = false) {
  Stream stream(2);
  Matrix<T> x(s.rows, s.in, s.in + x_pad), w(s.out, s.in);
  Matrix<Acc<T>> bias(1, s.out);
  Matrix<Result> y(s.rows, s.out, s.out + y_pad);
  x.randomize(1), w.randomize(2), bias.randomize(3), y.randomize(4);
  const Matrix<Result> before = y;
  linear_forward(stream, {.y = y.view(),
                          .x = x.view(),
                          .weight = w.view(),
                          .bias = with_bias ? bias.view() : TensorView(),
                          .accumulate = accumulate,
                          .few_rows = few_rows});
  for (std::int64_t i = 0; i < s.rows; ++i) {
    for (std::int64_t j = 0; j < s.out; ++j) {
      double expected = with_bias ? static_cast<double>(bias.at(0, j)) : 0;
      double magnitude = std::abs(expected);
      if (accumulate) {
        expected += static_cast<double>(before.at(i, j));
        magnitude += 1;
      }
      for (std::int64_t k = 0; k < s.in; ++k) {
        const double product = static_cast<double>(x.at(i, k)) * static_cast<double>(w.at(j, k));
        expected += product;
        magnitude += std::abs(product);
      }
      ASSERT_NEAR(static_cast<double>(y.at(i, j)), expected,
                  (tolerance<T, Result>(s.in, magnitude)))
          << s.rows << " x " << s.out << " x " << s.in << " at " << i << ", " << j;
    }
    for (std::int64_t j = s.out; j < s.out + y_pad; ++j) {
      ASSERT_EQ(y.at(i, j), before.at(i, j)) << "padding column touched";
    }
  }
}

TYPED_TEST(Gemm, ForwardAgreesWithDouble) {
  for (const Shape& shape : kShapes) {
    check_forward<TypeParam, TypeParam>(shape, 0, 0, false, false);
    check_forward<TypeParam, Acc<TypeParam>>(shape, 0, 0, true, false);
  }
  check_forward<TypeParam, TypeParam>({70, 40, 24}, 8, 16, true, false);
  check_forward<TypeParam, Acc<TypeParam>>({300, 40, 24}, 0, 16, false, true);
  check_forward<TypeParam, Acc<TypeParam>>({70, 40, 24}, 0, 0, true, true);
}

TYPED_TEST(Gemm, FewRowsAgreeWithDouble) {
  for (const Shape& shape : kShapes) {
    check_forward<TypeParam, TypeParam>(shape, 0, 0, false, false, true);
    check_forward<TypeParam, Acc<TypeParam>>(shape, 8, 16, true, false, true);
  }
}

// A text that is decoded alone has the bits it has among others, on any number of threads.
TYPED_TEST(Gemm, OfFewRowsEachHasItsOwnBits) {
  using T = TypeParam;
  const std::int64_t rows = 23, out = 70, in = 100;
  Stream one(1), three(3);
  Matrix<T> x(rows, in), w(out, in), whole(rows, out), part(rows, out);
  x.randomize(1), w.randomize(2);
  linear_forward(three, {.y = whole.view(), .x = x.view(), .weight = w.view(), .few_rows = true});
  for (const auto& [begin, count] :
       std::vector<std::pair<std::int64_t, std::int64_t>>{{0, 1}, {3, 2}, {1, 4}, {5, 17}}) {
    linear_forward(one, {.y = part.rows(0, count),
                         .x = x.rows(begin, count),
                         .weight = w.view(),
                         .few_rows = true});
    EXPECT_TRUE(same_bits(part.row(0), whole.row(begin), count * out)) << begin << " + " << count;
  }
}

TYPED_TEST(Gemm, DgradAgreesWithDouble) {
  using T = TypeParam;
  for (const Shape& s : kShapes) {
    Stream stream(2);
    Matrix<T> dy(s.rows, s.out), w(s.out, s.in), dx(s.rows, s.in);
    dy.randomize(1), w.randomize(2);
    linear_dgrad(stream, {.dx = dx.view(), .dy = dy.view(), .weight = w.view()});
    for (std::int64_t i = 0; i < s.rows; ++i) {
      for (std::int64_t j = 0; j < s.in; ++j) {
        double expected = 0;
        double magnitude = 0;
        for (std::int64_t k = 0; k < s.out; ++k) {
          const double product = static_cast<double>(dy.at(i, k)) * static_cast<double>(w.at(k, j));
          expected += product;
          magnitude += std::abs(product);
        }
        ASSERT_NEAR(static_cast<double>(dx.at(i, j)), expected,
                    (tolerance<T, T>(s.out, magnitude)));
      }
    }
  }
}

/// Two leaves into a sum of type S; `sum` is what they add up to.
template <class T, class S>
std::vector<double> sum_of_leaves(const Shape& s, int threads, Matrix<T>& dy, Matrix<T>& x,
                                  bool* flagged = nullptr) {
  Stream stream(threads);
  std::vector<S> sum(static_cast<std::size_t>(s.out * s.in), S(0));
  BadLeafFlag flag{kNoBadLeaf};
  for (const std::int64_t micro_batch : {0, 1}) {
    linear_wgrad(stream, {.dweight = {.sum = sum.data(),
                                      .dtype = dtype_of<S>(),
                                      .limit = leaf_limit(2),
                                      .flag = &flag},
                          .dy = dy.view(),
                          .x = x.view(),
                          .micro_batch = micro_batch});
  }
  if (flagged != nullptr) *flagged = flag != kNoBadLeaf;
  std::vector<double> result;
  for (const S value : sum) {
    result.push_back(static_cast<double>(value) * (std::is_same_v<S, std::int64_t> ? 0x1p-50 : 1));
  }
  return result;
}

template <class T>
Matrix<T> with_slack(std::int64_t rows, std::int64_t cols, std::uint32_t seed) {
  Matrix<T> matrix(rows, cols, 0, kWgradRowPadding);
  matrix.randomize(seed, 0.5);
  return matrix;
}

template <class T, class S>
void check_wgrad(const Shape& s) {
  auto dy = with_slack<T>(s.rows, s.out, 1);
  auto x = with_slack<T>(s.rows, s.in, 2);
  const std::vector<double> sum = sum_of_leaves<T, S>(s, 2, dy, x);
  for (std::int64_t i = 0; i < s.out; ++i) {
    for (std::int64_t j = 0; j < s.in; ++j) {
      double expected = 0;
      double magnitude = 0;
      for (std::int64_t k = 0; k < s.rows; ++k) {
        const double product = static_cast<double>(dy.at(k, i)) * static_cast<double>(x.at(k, j));
        expected += 2 * product;
        magnitude += 2 * std::abs(product);
      }
      ASSERT_NEAR(sum[static_cast<std::size_t>(i * s.in + j)], expected,
                  (tolerance<T, Acc<T>>(s.rows + 2, magnitude)) + 0x1p-50)
          << s.rows << " rows, dW " << s.out << " x " << s.in;
    }
  }
}

TYPED_TEST(Gemm, WgradAgreesWithDouble) {
  for (const Shape& shape : kShapes) {
    check_wgrad<TypeParam, Acc<TypeParam>>(shape);
    if constexpr (!std::is_same_v<TypeParam, double>) check_wgrad<TypeParam, std::int64_t>(shape);
  }
}

TYPED_TEST(Gemm, WgradIgnoresWhatStandsBehindTheRows) {
  const Shape s{45, 40, 24};
  auto dy = with_slack<TypeParam>(s.rows, s.out, 1);
  auto x = with_slack<TypeParam>(s.rows, s.in, 2);
  const auto before = sum_of_leaves<TypeParam, Acc<TypeParam>>(s, 1, dy, x);
  for (std::int64_t i = s.rows; i < s.rows + kWgradRowPadding; ++i) {
    for (std::int64_t j = 0; j < s.in; ++j) {
      x.at(i, j) = static_cast<TypeParam>(static_cast<Acc<TypeParam>>(-3e4F));
    }
    for (std::int64_t j = 0; j < s.out; ++j) dy.at(i, j) = TypeParam(NAN);
  }
  const auto after = sum_of_leaves<TypeParam, Acc<TypeParam>>(s, 1, dy, x);
  EXPECT_TRUE(same_bits(before, after));
}

TYPED_TEST(Gemm, RowsOfASliceHaveTheBitsOfTheWhole) {
  using T = TypeParam;
  const std::int64_t total = 530;
  for (const auto& [out, in] : std::vector<std::pair<std::int64_t, std::int64_t>>{
           {64, 64}, {33, 100}, {1024, 512}, {512, 1024}, {256, 2048}, {200, 1500}}) {
    if (std::is_same_v<T, double> && out * in > 10000) continue;
    Stream stream(2);
    Matrix<T> x(total, in), w(out, in), whole(total, out), part(total, out), dx(total, in),
        dx_part(total, in);
    x.randomize(1), w.randomize(2);
    linear_forward(stream, {.y = whole.view(), .x = x.view(), .weight = w.view()});
    linear_dgrad(stream, {.dx = dx.view(), .dy = whole.view(), .weight = w.view()});
    for (const auto& [begin, count] : std::vector<std::pair<std::int64_t, std::int64_t>>{
             {0, 1}, {7, 2}, {100, 31}, {5, 255}, {256, 256}, {271, 257}, {529, 1}}) {
      linear_forward(stream,
                     {.y = part.rows(0, count), .x = x.rows(begin, count), .weight = w.view()});
      EXPECT_TRUE(same_bits(part.row(0), whole.row(begin), count * out))
          << out << " x " << in << ", rows " << begin << " + " << count;
      linear_dgrad(
          stream,
          {.dx = dx_part.rows(0, count), .dy = whole.rows(begin, count), .weight = w.view()});
      EXPECT_TRUE(same_bits(dx_part.row(0), dx.row(begin), count * in));
    }
  }
}

TYPED_TEST(Gemm, PaddedStridesHaveTheBitsOfDenseRows) {
  using T = TypeParam;
  const std::int64_t rows = 300, out = 96, in = 512;
  Stream stream(1);
  Matrix<T> dense(rows, in), padded(rows, in, in + 24), w(out, in), y(rows, out),
      y_padded(rows, out, out + 8);
  dense.randomize(1), w.randomize(2);
  for (std::int64_t i = 0; i < rows; ++i) std::copy_n(dense.row(i), in, padded.row(i));
  linear_forward(stream, {.y = y.view(), .x = dense.view(), .weight = w.view()});
  linear_forward(stream, {.y = y_padded.view(), .x = padded.view(), .weight = w.view()});
  for (std::int64_t i = 0; i < rows; ++i) {
    ASSERT_TRUE(same_bits(y.row(i), y_padded.row(i), out)) << "row " << i;
  }
}

TYPED_TEST(Gemm, ThreadsDoNotChangeBits) {
  using T = TypeParam;
  const Shape s{700, 200, 80};
  auto dy = with_slack<T>(s.rows, s.out, 1);
  auto x = with_slack<T>(s.rows, s.in, 2);
  Matrix<T> w(s.out, s.in), first(s.rows, s.out), other(s.rows, s.out);
  w.randomize(3);
  const auto first_sum = sum_of_leaves<T, Acc<T>>(s, 1, dy, x);
  Stream one(1);
  linear_forward(one, {.y = first.view(), .x = x.view(), .weight = w.view()});
  for (const int threads : {2, 3}) {
    Stream stream(threads);
    linear_forward(stream, {.y = other.view(), .x = x.view(), .weight = w.view()});
    EXPECT_TRUE(same_bits(first.values, other.values)) << threads << " threads";
    EXPECT_TRUE(same_bits(first_sum, (sum_of_leaves<T, Acc<T>>(s, threads, dy, x))));
  }
}

TYPED_TEST(Gemm, BiasGradAddsBlocksOf64Rows) {
  using T = TypeParam;
  using A = Acc<T>;
  for (const std::int64_t rows : {0, 1, 63, 64, 65, 300}) {
    Stream stream(2);
    const std::int64_t cols = 300;
    Matrix<T> dy(rows, cols, cols + 3);
    dy.randomize(5);
    std::vector<A> sum(static_cast<std::size_t>(cols), A(0));
    bias_grad(stream, {.dbias = {.sum = sum.data(), .dtype = dtype_of<A>()}, .dy = dy.view()});
    for (std::int64_t j = 0; j < cols; ++j) {
      double total = 0;
      for (std::int64_t block = 0; block < rows; block += 64) {
        double part = 0;
        for (std::int64_t i = block; i < std::min(rows, block + 64); ++i) {
          part += static_cast<double>(dy.at(i, j));
        }
        total += part;
      }
      ASSERT_EQ(sum[static_cast<std::size_t>(j)], static_cast<A>(total));
    }
  }
}

TEST(GemmCache, MoreZeroRowsInKDoNotChangeBits) {
  Stream stream(1);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    if (dtype == DType::bf16 && !cpu::bf16_is_native()) continue;
    const std::int64_t m = 96, n = 64;
    const std::int64_t rows = 45;
    std::vector<std::vector<float>> results;
    for (const std::int64_t k : {64, 96, 256, 512}) {
      Matrix<float> a32(m, k), b32(k, n);
      a32.randomize(1), b32.randomize(2);
      Matrix<bf16> a16(m, k), b16(k, n);
      std::mt19937 generator(7);
      std::uniform_real_distribution<float> uniform(-1, 1);
      for (std::int64_t p = 0; p < k; ++p) {
        for (std::int64_t i = 0; i < m; ++i) a32.at(i, p) = p < rows ? uniform(generator) : 0.0F;
        for (std::int64_t j = 0; j < n; ++j) b32.at(p, j) = p < rows ? uniform(generator) : 9.0F;
      }
      std::transform(a32.values.begin(), a32.values.end(), a16.values.begin(),
                     [](float v) { return bf16(v); });
      std::transform(b32.values.begin(), b32.values.end(), b16.values.begin(),
                     [](float v) { return bf16(v); });
      const cpu::GemmKey key{
          .ab_dtype = dtype, .m = m, .n = n, .k = k, .lda = k, .ldb = n, .ldc = n};
      std::vector<float> c(static_cast<std::size_t>(m * n));
      const bool wide = dtype == DType::f32;
      cpu::run_gemm(stream.cpu(), 0, key, wide ? a32.view().data : a16.view().data,
                    wide ? b32.view().data : b16.view().data, c.data());
      results.push_back(c);
    }
    for (const auto& result : results) EXPECT_TRUE(same_bits(result, results.front()));
  }
}

class GemmCacheOfTiles : public ::testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(RowBitsMayDiffer, GemmCacheOfTiles, ::testing::Bool());

TEST_P(GemmCacheOfTiles, NothingIsBuiltLate) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    if (dtype == DType::bf16 && !cpu::bf16_is_native()) continue;
    const std::int64_t out = 48, in = 80, most = 600;
    Stream stream(2);
    if (GetParam()) let_row_bits_differ(stream);
    std::vector<GemmShape> shapes;
    for (const GemmKind kind : {GemmKind::forward, GemmKind::dgrad, GemmKind::wgrad}) {
      shapes.push_back({.kind = kind,
                        .dtype = dtype,
                        .result_dtype = dtype,
                        .out = out,
                        .in = in,
                        .x_stride = in,
                        .y_stride = out,
                        .min_rows = 1,
                        .max_rows = most});
    }
    const PrimitiveReport report = build_primitives(stream, shapes);
    EXPECT_GT(report.primitives, cpu::needs_fixed_rows(dtype) ? 20 : 512);
    EXPECT_GT(report.seconds, 0);
    dispatch_compute(dtype, [&]<class T>() {
      if constexpr (!std::is_same_v<T, double>) {
        auto x = with_slack<T>(most, in, 1);
        auto dy = with_slack<T>(most, out, 2);
        Matrix<T> w(out, in), y(most, out), dx(most, in);
        w.randomize(3);
        std::vector<std::int64_t> sum(static_cast<std::size_t>(out * in));
        std::vector<float> plain(static_cast<std::size_t>(out * in));
        for (std::int64_t rows = 1; rows <= most; ++rows) {
          linear_forward(stream, {.y = y.rows(0, rows), .x = x.rows(0, rows), .weight = w.view()});
          linear_dgrad(stream,
                       {.dx = dx.rows(0, rows), .dy = dy.rows(0, rows), .weight = w.view()});
          linear_wgrad(stream, {.dweight = {.sum = sum.data(), .limit = 1},
                                .dy = dy.rows(0, rows),
                                .x = x.rows(0, rows)});
          linear_wgrad(stream, {.dweight = {.sum = plain.data(), .dtype = DType::f32},
                                .dy = dy.rows(0, rows),
                                .x = x.rows(0, rows)});
        }
      }
    });
    EXPECT_EQ(late_primitives(stream), 0);
    EXPECT_EQ(build_primitives(stream, shapes).primitives, 0) << "built twice";
  }
}

TEST(GemmCache, TailsThatMayDifferGiveTheSameProducts) {
  if (!cpu::bf16_is_native()) GTEST_SKIP() << "no native bf16";
  const std::int64_t out = 1024, in = 512, most = 300;
  Stream fixed(2), differing(2);
  let_row_bits_differ(differing);
  Matrix<bf16> x(most, in), w(out, in);
  x.randomize(1), w.randomize(2);
  for (const std::int64_t rows : {1, 31, 32, 33, 64, 100, 127, 128, 129, 300}) {
    Matrix<float> expected(rows, out), y(rows, out);
    linear_forward(fixed, {.y = expected.view(), .x = x.rows(0, rows), .weight = w.view()});
    linear_forward(differing, {.y = y.view(), .x = x.rows(0, rows), .weight = w.view()});
    // f32 sums of 512 products of up to 1, in another order.
    for (std::size_t i = 0; i < y.values.size(); ++i) {
      ASSERT_NEAR(y.values[i], expected.values[i], 512 * 23 * 0x1p-24) << rows << " rows";
    }
  }
}

TEST(GemmCache, ALatePrimitiveIsCountedAndRight) {
  Stream stream(3);
  Matrix<float> x(400, 8), w(8, 8), y(400, 8);
  x.randomize(1), w.randomize(2);
  linear_forward(stream, {.y = y.view(), .x = x.view(), .weight = w.view()});
  // 128 rows and a tail of 16, or one fixed height.
  EXPECT_EQ(late_primitives(stream), cpu::needs_fixed_rows(DType::f32) ? 1 : 2);
  double expected = 0;
  for (std::int64_t k = 0; k < 8; ++k) expected += static_cast<double>(x.at(399, k)) * w.at(5, k);
  EXPECT_NEAR(y.at(399, 5), expected, 1e-5);
}

TEST(GemmCache, Bf16NeedsAProcessorThatHasIt) {
  if (cpu::bf16_is_native()) GTEST_SKIP() << "this one has";
  Stream stream(1);
  Matrix<bf16> x(2, 2), w(2, 2), y(2, 2);
  try {
    linear_forward(stream, {.y = y.view(), .x = x.view(), .weight = w.view()});
    FAIL() << "bf16 was accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::usage);
    EXPECT_NE(std::string(error.what()).find("train.dtype"), std::string::npos);
  }
}

TEST(Peak, IsMeasured) {
  Stream stream(2);
  EXPECT_GT(measure_gemm_peak(stream, DType::f32), 0);
  EXPECT_GT(measure_triad(stream), 0);
}

// What was polled may be gone once it was waited for.
TEST(Stream, LooksNoMoreAtWhatWasWaitedFor) {
  struct Counted final : Pending {
    bool test() override { return ++looks > 0 && complete; }
    void wait() override { complete = true; }
    bool complete = false;
    int looks = 0;
  } pending;
  Stream stream(1);
  stream.poll_between_tasks(Event(&pending));
  stream.poll();
  EXPECT_EQ(pending.looks, 1);
  stream.wait(Event(&pending));
  const int looks = pending.looks;
  stream.poll();
  EXPECT_EQ(pending.looks, looks);
}

TEST(Stream, NeedsAThread) { EXPECT_THROW(Stream(0), Error); }

}  // namespace
}  // namespace arcus
