#include "kernels/norm.hpp"

#include "tests/kernels/op_test.hpp"

namespace arcus {
namespace {

using namespace test;  // NOLINT(google-build-using-namespace)

struct Case {
  std::int64_t rows, cols, group;
};
const std::vector<Case> kCases = {{0, 8, 8},    {1, 5, 5},     {3, 7, 7},      {5, 24, 8},
                                  {70, 64, 64}, {130, 48, 16}, {64, 100, 100}, {33, 96, 32}};

template <class T>
struct Forward {
  Matrix<T> y;
  Matrix<Acc<T>> inv_rms;
};
template <class T>
Forward<T> forward(Stream& stream, const Matrix<T>& x, const Matrix<Acc<T>>& gain,
                   std::int64_t padding = 0) {
  Forward<T> out{Matrix<T>(x.rows(), x.cols(), padding),
                 Matrix<Acc<T>>(x.rows(), x.cols() / gain.cols())};
  rmsnorm_forward(stream, {.y = out.y, .inv_rms = out.inv_rms, .x = x, .gain = gain, .eps = 1e-5});
  return out;
}

template <class T>
struct Backward {
  Matrix<T> dx;
  Matrix<Acc<T>> dgain;
};
/// dgain as plain sums, which a single leaf enters unchanged.
template <class T>
Backward<T> backward(Stream& stream, const Matrix<T>& dy, const Matrix<T>* residual,
                     const Matrix<T>& x, const Matrix<Acc<T>>& inv_rms,
                     const Matrix<Acc<T>>& gain) {
  using A = Acc<T>;
  Backward<T> out{Matrix<T>(x.rows(), x.cols(), 3), filled<A>(1, gain.cols(), A(0))};
  rmsnorm_backward(stream, {.dx = out.dx,
                            .dgain = {.sum = out.dgain.data().data(), .dtype = dtype_of<A>()},
                            .dy = dy,
                            .residual = residual == nullptr ? ConstTensorView() : residual->view(),
                            .x = x,
                            .inv_rms = inv_rms,
                            .gain = gain});
  return out;
}

/// The formula, term by term.
Doubles reference(const Doubles& x, const Doubles& gain, double eps) {
  Doubles y(x.rows(), x.cols());
  const std::int64_t n = gain.cols();
  for (std::int64_t t = 0; t < x.rows(); ++t) {
    for (std::int64_t first = 0; first < x.cols(); first += n) {
      double squares = 0;
      for (std::int64_t i = 0; i < n; ++i) squares += std::pow(x.at(t, first + i), 2);
      for (std::int64_t i = 0; i < n; ++i) {
        y.at(t, first + i) =
            x.at(t, first + i) / std::sqrt(squares / static_cast<double>(n) + eps) * gain.at(0, i);
      }
    }
  }
  return y;
}

TEST(RmsNorm, DoubleMatchesTheFormula) {
  Stream stream(2);
  for (const Case& c : kCases) {
    const Doubles x = normals(c.rows, c.cols, 1);
    const Doubles gain = normals(1, c.group, 2);
    expect_near(forward<double>(stream, x, gain).y, reference(x, gain, 1e-5), 1e-14, "y");
  }
}

template <class T>
void expect_type_near_double() {
  using A = Acc<T>;
  Stream stream(2);
  for (const Case& c : kCases) {
    const Doubles x = normals(c.rows, c.cols, 1);
    const Doubles gain = normals(1, c.group, 2);
    const Doubles dy = normals(c.rows, c.cols, 3);
    const Doubles residual = normals(c.rows, c.cols, 4);
    const auto exact = forward<double>(stream, x, gain);
    const auto exact_back = backward<double>(stream, dy, &residual, x, exact.inv_rms, gain);
    const auto y = forward<T>(stream, as<T>(x, 5), as<A>(gain), 2);
    const Matrix<T> residual_t = as<T>(residual, 1);
    const auto back =
        backward<T>(stream, as<T>(dy, 2), &residual_t, as<T>(x), y.inv_rms, as<A>(gain));
    const double u = unit_roundoff<T>();
    expect_near(y.y, exact.y, 4 * u, "y");
    expect_near(back.dx, widened(exact_back.dx), 8 * u, "dx");
    // The leaf is summed in f64 from products of inputs: only inv_rms and the last rounding show.
    expect_near(back.dgain, exact_back.dgain, 8 * unit_roundoff<A>(), "dgain");
  }
}
TEST(RmsNorm, FloatMatchesDouble) { expect_type_near_double<float>(); }
TEST(RmsNorm, Bf16MatchesDouble) { expect_type_near_double<bf16>(); }

TEST(RmsNorm, GradientsMatchDifferences) {
  Stream stream(1);
  for (const auto& [rows, cols, group] : std::vector<Case>{{3, 7, 7}, {4, 12, 4}, {66, 6, 3}}) {
    for (const bool with_residual : {false, true}) {
      Doubles x = normals(rows, cols, 5);
      Doubles gain = normals(1, group, 6);
      const Doubles dy = normals(rows, cols, 7);
      const Doubles residual = normals(rows, cols, 8);
      const auto y = forward<double>(stream, x, gain);
      const auto back =
          backward<double>(stream, dy, with_residual ? &residual : nullptr, x, y.inv_rms, gain);
      const auto loss = [&] {
        // A residual is the gradient of a branch that passes x unchanged.
        return inner(forward<double>(stream, x, gain).y, dy) +
               (with_residual ? inner(x, residual) : 0);
      };
      expect_gradient(x, widened(back.dx), loss, "dx");
      if (!with_residual) expect_gradient(gain, back.dgain, loss, "dgain");
    }
  }
}

TEST(RmsNorm, BackwardMayOverwriteDyAndForwardX) {
  Stream stream(2);
  const Matrix<float> x = as<float>(normals(70, 32, 1));
  const Matrix<float> gain = as<float>(normals(1, 16, 2));
  const Matrix<float> dy = as<float>(normals(70, 32, 3));
  const auto y = forward<float>(stream, x, gain);
  Matrix<float> in_place = x;
  Matrix<float> inv_rms(70, 2);
  rmsnorm_forward(stream,
                  {.y = in_place, .inv_rms = inv_rms, .x = in_place, .gain = gain, .eps = 1e-5});
  EXPECT_TRUE(in_place.same_bits(y.y));
  Matrix<float> expected(70, 32);
  Matrix<float> dgain = filled<float>(1, 16, 0);
  Matrix<float> dgain_in_place = dgain;
  rmsnorm_backward(stream, {.dx = expected,
                            .dgain = {.sum = dgain.data().data(), .dtype = DType::f32},
                            .dy = dy,
                            .x = x,
                            .inv_rms = inv_rms,
                            .gain = gain});
  Matrix<float> dx = dy;
  rmsnorm_backward(stream, {.dx = dx,
                            .dgain = {.sum = dgain_in_place.data().data(), .dtype = DType::f32},
                            .dy = dx,
                            .x = x,
                            .inv_rms = inv_rms,
                            .gain = gain});
  EXPECT_TRUE(dx.same_bits(expected));
  EXPECT_TRUE(dgain_in_place.same_bits(dgain));
}

TEST(RmsNorm, BitsDependNeitherOnThreadsNorOnOtherRows) {
  Stream one(1);
  Stream three(3);
  const Matrix<bf16> x = as<bf16>(normals(200, 72, 1));
  const Matrix<bf16> dy = as<bf16>(normals(200, 72, 2));
  const Matrix<float> gain = as<float>(normals(1, 24, 3));
  const auto a = forward<bf16>(one, x, gain);
  const auto b = forward<bf16>(three, x, gain);
  EXPECT_TRUE(a.y.same_bits(b.y));
  const auto back_a = backward<bf16>(one, dy, nullptr, x, a.inv_rms, gain);
  const auto back_b = backward<bf16>(three, dy, nullptr, x, a.inv_rms, gain);
  EXPECT_TRUE(back_a.dx.same_bits(back_b.dx));
  EXPECT_TRUE(back_a.dgain.same_bits(back_b.dgain));
  const auto part = forward<bf16>(one, rows_of(x, 37, 5), gain);
  EXPECT_TRUE(part.y.same_bits(rows_of(a.y, 37, 5)));
}

/// In double every addition shows, in float the one rounding at the end.
template <class T>
void expect_leaf_in_blocks() {
  Stream stream(2);
  const std::int64_t rows = 150;
  const Matrix<T> x = as<T>(normals(rows, 20, 1));
  const Matrix<T> dy = as<T>(normals(rows, 20, 2));
  const Matrix<T> gain = as<T>(normals(1, 5, 3));
  const auto y = forward<T>(stream, x, gain);
  const auto back = backward<T>(stream, dy, nullptr, x, y.inv_rms, gain);
  for (std::int64_t c = 0; c < 5; ++c) {
    double total = 0;
    for (std::int64_t first = 0; first < rows; first += 64) {
      double block = 0;
      for (std::int64_t t = first; t < std::min(rows, first + 64); ++t) {
        for (std::int64_t h = 0; h < 4; ++h) {
          block += to_double(dy.at(t, h * 5 + c)) * to_double(x.at(t, h * 5 + c)) *
                   to_double(y.inv_rms.at(t, h));
        }
      }
      total += block;
    }
    EXPECT_EQ(back.dgain.at(0, c), static_cast<T>(total));
  }
}
TEST(RmsNorm, GainLeafFollowsItsBlocks) {
  expect_leaf_in_blocks<double>();
  expect_leaf_in_blocks<float>();
}

TEST(RmsNorm, WideGainIsCutIntoChunks) {
  Stream stream(2);
  const std::int64_t cols = 4100;
  const Doubles x = normals(3, cols, 1);
  const Doubles gain = normals(1, cols, 2);
  const auto y = forward<double>(stream, x, gain);
  const auto back = backward<double>(stream, x, nullptr, x, y.inv_rms, gain);
  for (const std::int64_t c : {std::int64_t{0}, std::int64_t{4095}, std::int64_t{4096}, cols - 1}) {
    double sum = 0;
    for (std::int64_t t = 0; t < 3; ++t) sum += x.at(t, c) * x.at(t, c) * y.inv_rms.at(t, 0);
    EXPECT_DOUBLE_EQ(back.dgain.at(0, c), sum);
  }
}

const std::vector<std::pair<std::int64_t, std::int64_t>> kWhole = {
    {0, 8}, {1, 1}, {1, 5}, {3, 7}, {70, 64}, {130, 48}, {64, 100}, {33, 300}};

template <class T>
struct LayerForward {
  Matrix<T> y;
  Matrix<Acc<T>> stats;  ///< mean and deviation side by side, as layers keep them
};
template <class T>
LayerForward<T> layer_forward(Stream& stream, const Matrix<T>& x, const Matrix<Acc<T>>& gain,
                              const Matrix<Acc<T>>& bias, std::int64_t padding = 0) {
  LayerForward<T> out{Matrix<T>(x.rows(), x.cols(), padding), Matrix<Acc<T>>(x.rows(), 2)};
  layernorm_forward(stream, {.y = out.y,
                             .mean = out.stats.view().col_range(0, 1),
                             .inv_std = out.stats.view().col_range(1, 1),
                             .x = x,
                             .gain = gain,
                             .bias = bias,
                             .eps = 1e-5});
  return out;
}

template <class T>
struct LayerBackward {
  Matrix<T> dx;
  Matrix<Acc<T>> dgain, dbias;
};
template <class T>
LayerBackward<T> layer_backward(Stream& stream, const Matrix<T>& dy, const Matrix<T>* residual,
                                const Matrix<T>& x, const Matrix<Acc<T>>& stats,
                                const Matrix<Acc<T>>& gain) {
  using A = Acc<T>;
  LayerBackward<T> out{Matrix<T>(x.rows(), x.cols(), 3), filled<A>(1, gain.cols(), A(0)),
                       filled<A>(1, gain.cols(), A(0))};
  layernorm_backward(stream,
                     {.dx = out.dx,
                      .dgain = {.sum = out.dgain.data().data(), .dtype = dtype_of<A>()},
                      .dbias = {.sum = out.dbias.data().data(), .dtype = dtype_of<A>()},
                      .dy = dy,
                      .residual = residual == nullptr ? ConstTensorView() : residual->view(),
                      .x = x,
                      .mean = stats.view().col_range(0, 1),
                      .inv_std = stats.view().col_range(1, 1),
                      .gain = gain});
  return out;
}

Doubles layer_reference(const Doubles& x, const Doubles& gain, const Doubles& bias, double eps) {
  Doubles y(x.rows(), x.cols());
  const auto n = static_cast<double>(x.cols());
  for (std::int64_t t = 0; t < x.rows(); ++t) {
    double mean = 0;
    double variance = 0;
    for (std::int64_t i = 0; i < x.cols(); ++i) mean += x.at(t, i) / n;
    for (std::int64_t i = 0; i < x.cols(); ++i) variance += std::pow(x.at(t, i) - mean, 2) / n;
    for (std::int64_t i = 0; i < x.cols(); ++i) {
      y.at(t, i) = (x.at(t, i) - mean) / std::sqrt(variance + eps) * gain.at(0, i) + bias.at(0, i);
    }
  }
  return y;
}

TEST(LayerNorm, DoubleMatchesTheFormula) {
  Stream stream(2);
  for (const auto& [rows, cols] : kWhole) {
    Doubles x = normals(rows, cols, 1);
    // Far from zero: the mean must not be squared away.
    for (std::int64_t t = 0; t < rows; ++t) {
      for (std::int64_t i = 0; i < cols; ++i) x.at(t, i) += 100;
    }
    const Doubles gain = normals(1, cols, 2);
    const Doubles bias = normals(1, cols, 3);
    expect_near(layer_forward<double>(stream, x, gain, bias, 2).y,
                layer_reference(x, gain, bias, 1e-5), 1e-12, "y");
  }
}

template <class T>
void expect_layer_near_double() {
  using A = Acc<T>;
  Stream stream(2);
  for (const auto& [rows, cols] : kWhole) {
    // A row of one element has no deviation: eps alone decides, and errors are divided by its root.
    if (cols == 1) continue;
    const Doubles x = normals(rows, cols, 1);
    const Doubles gain = normals(1, cols, 2);
    const Doubles bias = normals(1, cols, 3);
    const Doubles dy = normals(rows, cols, 4);
    const Doubles residual = normals(rows, cols, 5);
    const auto exact = layer_forward<double>(stream, x, gain, bias);
    const auto exact_back = layer_backward<double>(stream, dy, &residual, x, exact.stats, gain);
    const auto y = layer_forward<T>(stream, as<T>(x, 5), as<A>(gain), as<A>(bias), 2);
    const Matrix<T> residual_t = as<T>(residual, 1);
    const auto back =
        layer_backward<T>(stream, as<T>(dy, 2), &residual_t, as<T>(x), y.stats, as<A>(gain));
    const double u = unit_roundoff<T>();
    expect_near(y.y, exact.y, 6 * u, "y");
    expect_near(back.dx, widened(exact_back.dx), 10 * u, "dx");
    // Summed in f64 from inputs: only the statistics and the last rounding show.
    expect_near(back.dgain, exact_back.dgain, 8 * unit_roundoff<A>(), "dgain");
    expect_near(back.dbias, exact_back.dbias, unit_roundoff<A>(), "dbias");
  }
}
TEST(LayerNorm, FloatMatchesDouble) { expect_layer_near_double<float>(); }
TEST(LayerNorm, Bf16MatchesDouble) { expect_layer_near_double<bf16>(); }

TEST(LayerNorm, GradientsMatchDifferences) {
  Stream stream(1);
  for (const auto& [rows, cols] : {std::pair<std::int64_t, std::int64_t>{3, 7}, {66, 5}}) {
    for (const bool with_residual : {false, true}) {
      Doubles x = normals(rows, cols, 5);
      Doubles gain = normals(1, cols, 6);
      Doubles bias = normals(1, cols, 7);
      const Doubles dy = normals(rows, cols, 8);
      const Doubles residual = normals(rows, cols, 9);
      const auto y = layer_forward<double>(stream, x, gain, bias);
      const auto back =
          layer_backward<double>(stream, dy, with_residual ? &residual : nullptr, x, y.stats, gain);
      const auto loss = [&] {
        return inner(layer_forward<double>(stream, x, gain, bias).y, dy) +
               (with_residual ? inner(x, residual) : 0);
      };
      expect_gradient(x, widened(back.dx), loss, "dx");
      if (with_residual) continue;
      expect_gradient(gain, back.dgain, loss, "dgain");
      expect_gradient(bias, back.dbias, loss, "dbias");
    }
  }
}

TEST(LayerNorm, BackwardMayOverwriteDyAndForwardX) {
  Stream stream(2);
  const Matrix<float> x = as<float>(normals(70, 32, 1));
  const Matrix<float> gain = as<float>(normals(1, 32, 2));
  const Matrix<float> bias = as<float>(normals(1, 32, 3));
  const Matrix<float> dy = as<float>(normals(70, 32, 4));
  const auto y = layer_forward<float>(stream, x, gain, bias);
  Matrix<float> in_place = x;
  Matrix<float> stats(70, 2);
  layernorm_forward(stream, {.y = in_place,
                             .mean = stats.view().col_range(0, 1),
                             .inv_std = stats.view().col_range(1, 1),
                             .x = in_place,
                             .gain = gain,
                             .bias = bias});
  EXPECT_TRUE(in_place.same_bits(y.y));
  const auto expected = layer_backward<float>(stream, dy, nullptr, x, stats, gain);
  Matrix<float> dx = dy;
  Matrix<float> dgain = filled<float>(1, 32, 0);
  layernorm_backward(stream, {.dx = dx,
                              .dgain = {.sum = dgain.data().data(), .dtype = DType::f32},
                              .dy = dx,
                              .x = x,
                              .mean = stats.view().col_range(0, 1),
                              .inv_std = stats.view().col_range(1, 1),
                              .gain = gain});
  for (std::int64_t t = 0; t < 70; ++t) {
    for (std::int64_t i = 0; i < 32; ++i) ASSERT_EQ(dx.at(t, i), expected.dx.at(t, i));
  }
  EXPECT_TRUE(dgain.same_bits(expected.dgain));
}

TEST(LayerNorm, BitsDependNeitherOnThreadsNorOnOtherRows) {
  Stream one(1);
  Stream three(3);
  const Matrix<bf16> x = as<bf16>(normals(200, 72, 1));
  const Matrix<bf16> dy = as<bf16>(normals(200, 72, 2));
  const Matrix<float> gain = as<float>(normals(1, 72, 3));
  const Matrix<float> bias = as<float>(normals(1, 72, 4));
  const auto a = layer_forward<bf16>(one, x, gain, bias);
  const auto b = layer_forward<bf16>(three, x, gain, bias);
  EXPECT_TRUE(a.y.same_bits(b.y));
  EXPECT_TRUE(a.stats.same_bits(b.stats));
  const auto back_a = layer_backward<bf16>(one, dy, nullptr, x, a.stats, gain);
  const auto back_b = layer_backward<bf16>(three, dy, nullptr, x, a.stats, gain);
  EXPECT_TRUE(back_a.dx.same_bits(back_b.dx));
  EXPECT_TRUE(back_a.dgain.same_bits(back_b.dgain));
  EXPECT_TRUE(back_a.dbias.same_bits(back_b.dbias));
  const auto part = layer_forward<bf16>(one, rows_of(x, 37, 5), gain, bias);
  EXPECT_TRUE(part.y.same_bits(rows_of(a.y, 37, 5)));
  EXPECT_TRUE(part.stats.same_bits(rows_of(a.stats, 37, 5)));
}

TEST(LayerNorm, LeavesFollowTheirBlocks) {
  Stream stream(2);
  const std::int64_t rows = 150;
  const Doubles x = normals(rows, 5, 1);
  const Doubles dy = normals(rows, 5, 2);
  const Doubles gain = normals(1, 5, 3);
  const auto y = layer_forward<double>(stream, x, gain, gain);
  const auto back = layer_backward<double>(stream, dy, nullptr, x, y.stats, gain);
  for (std::int64_t c = 0; c < 5; ++c) {
    double gains = 0;
    double biases = 0;
    for (std::int64_t first = 0; first < rows; first += 64) {
      double gain_block = 0;
      double bias_block = 0;
      for (std::int64_t t = first; t < std::min(rows, first + 64); ++t) {
        gain_block += dy.at(t, c) * ((x.at(t, c) - y.stats.at(t, 0)) * y.stats.at(t, 1));
        bias_block += dy.at(t, c);
      }
      gains += gain_block;
      biases += bias_block;
    }
    EXPECT_EQ(back.dgain.at(0, c), gains);
    EXPECT_EQ(back.dbias.at(0, c), biases);
  }
}

}  // namespace
}  // namespace arcus
