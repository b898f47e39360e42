#include "tests/kernels/gate_support.hpp"

namespace arcus {
namespace {

using namespace test;  // NOLINT(google-build-using-namespace)

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

}  // namespace
}  // namespace arcus
