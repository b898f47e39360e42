#include "kernels/loss.hpp"

#include "tests/kernels/op_test.hpp"

namespace arcus {
namespace {

using namespace test;  // NOLINT(google-build-using-namespace)

template <class T>
struct Result {
  Matrix<Acc<T>> loss;
  Matrix<T> dlogits;
};
template <class T>
Result<T> run(Stream& stream, const Matrix<Acc<T>>& logits, const Ints& targets, double scale) {
  Result<T> out{Matrix<Acc<T>>(1, logits.rows()), Matrix<T>(logits.rows(), logits.cols(), 2)};
  cross_entropy(stream, {.token_loss = out.loss,
                         .dlogits = out.dlogits,
                         .logits = logits,
                         .targets = targets,
                         .scale = scale});
  return out;
}

Ints targets_of(std::int64_t rows, std::int64_t vocab) {
  Ints targets(1, rows);
  for (std::int64_t t = 0; t < rows; ++t) {
    targets.at(0, t) =
        t % 5 == 4 ? -1 : static_cast<std::int32_t>(draw(9, static_cast<std::uint64_t>(t), vocab));
  }
  return targets;
}

const std::vector<std::pair<std::int64_t, std::int64_t>> kSizes = {{0, 5},   {1, 1},   {7, 3},
                                                                   {20, 31}, {40, 32}, {13, 257}};

TEST(CrossEntropy, DoubleMatchesTheFormula) {
  Stream stream(2);
  for (const auto& [rows, vocab] : kSizes) {
    const Doubles logits = normals(rows, vocab, 1, 3);
    const Ints targets = targets_of(rows, vocab);
    const auto out = run<double>(stream, logits, targets, 0.25);
    for (std::int64_t t = 0; t < rows; ++t) {
      const std::int32_t target = targets.at(0, t);
      double sum = 0;
      for (std::int64_t i = 0; i < vocab; ++i) sum += std::exp(logits.at(t, i));
      const double loss = target < 0 ? 0 : std::log(sum) - logits.at(t, target);
      EXPECT_NEAR(out.loss.at(0, t), loss, 1e-13);
      for (std::int64_t i = 0; i < vocab; ++i) {
        const double p = std::exp(logits.at(t, i)) / sum;
        const double expected = target < 0 ? 0 : (p - (i == target ? 1 : 0)) * 0.25;
        EXPECT_NEAR(out.dlogits.at(t, i), expected, 1e-15);
      }
    }
  }
}

template <class T>
void expect_type_near_double() {
  Stream stream(2);
  for (const auto& [rows, vocab] : kSizes) {
    const Doubles logits = normals(rows, vocab, 1, 3);
    const Ints targets = targets_of(rows, vocab);
    const auto exact = run<double>(stream, logits, targets, 0.5);
    const auto out = run<T>(stream, as<Acc<T>>(logits), targets, 0.5);
    expect_near(out.loss, exact.loss, 8 * unit_roundoff<float>(), "token_loss");
    expect_near(out.dlogits, widened(exact.dlogits), 8 * unit_roundoff<T>(), "dlogits");
  }
}
TEST(CrossEntropy, FloatMatchesDouble) { expect_type_near_double<float>(); }
TEST(CrossEntropy, Bf16MatchesDouble) { expect_type_near_double<bf16>(); }

TEST(CrossEntropy, GradientMatchesDifferences) {
  Stream stream(1);
  Doubles logits = normals(9, 13, 1, 2);
  const Ints targets = targets_of(9, 13);
  const auto out = run<double>(stream, logits, targets, 1.0 / 7);
  const auto loss = [&] {
    const auto r = run<double>(stream, logits, targets, 1.0 / 7);
    double sum = 0;
    for (const double value : r.loss.data()) sum += value;
    return sum / 7;
  };
  expect_gradient(logits, widened(out.dlogits), loss, "dlogits");
}

TEST(CrossEntropy, LargeLogitsDoNotOverflow) {
  Stream stream(1);
  Matrix<float> logits = filled<float>(1, 40, -3e38F);
  logits.at(0, 7) = 3e38F;
  Ints target = filled<std::int32_t>(1, 1, 7);
  const auto out = run<float>(stream, logits, target, 1);
  EXPECT_EQ(out.loss.at(0, 0), 0.0F);
  for (std::int64_t i = 0; i < 40; ++i) EXPECT_EQ(out.dlogits.at(0, i), 0.0F);
}

TEST(CrossEntropy, NonFiniteLogitsShow) {
  Stream stream(1);
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Matrix<float> logits = filled<float>(1, 33, 0.5F);
    logits.at(0, 32) = bad;
    const auto out = run<float>(stream, logits, filled<std::int32_t>(1, 1, 0), 1);
    EXPECT_FALSE(std::isfinite(out.loss.at(0, 0)));
  }
}

TEST(CrossEntropy, RefusesATargetOutsideTheVocabulary) {
  Stream stream(2);
  EXPECT_THROW(run<float>(stream, filled<float>(1, 4, 0), filled<std::int32_t>(1, 1, 4), 1), Error);
}

TEST(CrossEntropy, BitsDependNeitherOnThreadsNorOnOtherRows) {
  Stream one(1);
  Stream three(3);
  const Matrix<float> logits = as<float>(normals(150, 300, 3));
  const Ints targets = targets_of(150, 300);
  const auto a = run<bf16>(one, logits, targets, 0.125);
  const auto b = run<bf16>(three, logits, targets, 0.125);
  EXPECT_TRUE(a.loss.same_bits(b.loss));
  EXPECT_TRUE(a.dlogits.same_bits(b.dlogits));
  Ints part(1, 3);
  for (std::int64_t t = 0; t < 3; ++t) part.at(0, t) = targets.at(0, 50 + t);
  const auto alone = run<bf16>(one, rows_of(logits, 50, 3), part, 0.125);
  for (std::int64_t t = 0; t < 3; ++t) EXPECT_EQ(alone.loss.at(0, t), a.loss.at(0, 50 + t));
}

}  // namespace
}  // namespace arcus
