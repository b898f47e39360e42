#include "kernels/gate_input.hpp"
#include "tests/kernels/gate_support.hpp"

/// The losses on the coefficient of variation: importance and load.
namespace arcus {
namespace {

using namespace test;  // NOLINT(google-build-using-namespace)

const std::vector<std::int64_t> kExperts = {1, 2, 3, 8, 64};

struct Variation {
  double cv2 = -1;
  Doubles derivative;
};

// ---- importance ------------------------------------------------------------------------------

template <class A>
Variation importance(Stream& stream, const Matrix<A>& s, const Ints& topk_idx, bool renormalize) {
  Variation r{.derivative = Doubles(1, s.cols())};
  importance_loss(stream, {.cv2 = &r.cv2,
                           .derivative = r.derivative,
                           .s = s,
                           .topk_idx = topk_idx,
                           .renormalize = renormalize});
  return r;
}
template <class A>
Matrix<A> importance_backward(Stream& stream, Matrix<A> ds, const Variation& r, const Matrix<A>& s,
                              const Ints& topk_idx, bool renormalize) {
  importance_loss_backward(stream, {.ds = ds,
                                    .derivative = r.derivative,
                                    .s = s,
                                    .topk_idx = topk_idx,
                                    .renormalize = renormalize,
                                    .coeff = 0.6});
  return ds;
}
/// Some choices of every other token are none.
Ints choices_with_gaps(Stream& stream, const Doubles& s, std::int64_t topk) {
  const Matrix<float> none;
  Ints topk_idx = select(stream, s, none, {.topk = topk});
  for (std::int64_t t = 0; t < s.rows(); t += 2) topk_idx.at(t, topk - 1) = -1;
  return topk_idx;
}

TEST(ImportanceLoss, MatchesTheFormulaAndDifferences) {
  Stream stream(1);
  for (const bool renormalize : {false, true}) {
    for (const std::int64_t experts : kExperts) {
      for (const std::int64_t topk : {std::int64_t{1}, std::int64_t{2}, experts}) {
        for (const std::int64_t tokens : {0, 1, 17}) {
          if (topk > experts) continue;
          Doubles s = scores<double>(stream, normals(tokens, experts, 1), Score::sigmoid).s;
          const Ints topk_idx = choices_with_gaps(stream, s, topk);
          const Variation r = importance(stream, s, topk_idx, renormalize);
          const auto sums =
              reference::importance(table(s), choices(topk_idx), experts, renormalize);
          ASSERT_NEAR(r.cv2, reference::cv2(sums), 1e-11);
          const Doubles before = normals(tokens, experts, 2);
          const Doubles ds = importance_backward(stream, before, r, s, topk_idx, renormalize);
          const auto loss = [&] {
            return 0.6 * importance(stream, s, topk_idx, renormalize).cv2 + inner(s, before);
          };
          expect_gradient(s, ds, loss, "importance");
          const Matrix<float> s_float = as<float>(widened(s), 1);
          Stream three(3);
          const Matrix<float> one_thread =
              importance_backward(stream, as<float>(before), r, s_float, topk_idx, renormalize);
          EXPECT_TRUE(
              importance_backward(three, as<float>(before), r, s_float, topk_idx, renormalize)
                  .same_bits(one_thread));
          EXPECT_NEAR(importance(three, s_float, topk_idx, renormalize).cv2, r.cv2, 1e-5);
        }
      }
    }
  }
}

TEST(ImportanceLoss, IsZeroWhereNothingIsChosen) {
  Stream stream(1);
  const Variation r =
      importance(stream, filled<float>(3, 2, 0.5F), filled<std::int32_t>(3, 2, -1), false);
  EXPECT_EQ(r.cv2, 0);
  EXPECT_EQ(r.derivative.at(0, 1), 0);
}

// ---- load ------------------------------------------------------------------------------------

const TokenDraws kDraws{.key = 13, .step = 6, .first_token = 401};
constexpr double kAmount = 0.8;

template <class A>
Matrix<A> noisy(Stream& stream, const Matrix<A>& z, const Matrix<A>& n) {
  Matrix<A> z_noisy = z;
  gate_noise(stream, {.z = z_noisy, .n = n, .amount = kAmount, .draws = kDraws});
  return z_noisy;
}
template <class A>
Variation load(Stream& stream, const Matrix<A>& z, const Matrix<A>& n, std::int64_t topk) {
  Variation r{.derivative = Doubles(1, z.cols())};
  load_loss(stream, {.cv2 = &r.cv2,
                     .derivative = r.derivative,
                     .z_clean = z,
                     .z_noisy = noisy(stream, z, n),
                     .n = n,
                     .amount = kAmount,
                     .topk = topk});
  return r;
}
template <class A>
struct LoadGradients {
  Matrix<A> dz, dn;
};
template <class A>
LoadGradients<A> load_backward(Stream& stream, LoadGradients<A> g, const Variation& r,
                               const Matrix<A>& z, const Matrix<A>& n, std::int64_t topk) {
  load_loss_backward(stream, {.dz = g.dz,
                              .dn = g.dn,
                              .derivative = r.derivative,
                              .z_clean = z,
                              .z_noisy = noisy(stream, z, n),
                              .n = n,
                              .amount = kAmount,
                              .topk = topk,
                              .coeff = 0.3,
                              .draws = kDraws});
  return g;
}

TEST(LoadLoss, MatchesTheFormulaAndDifferences) {
  Stream stream(1);
  for (const std::int64_t experts : {2, 3, 8, 64}) {
    for (const std::int64_t topk : {std::int64_t{1}, std::int64_t{2}, experts - 1}) {
      for (const std::int64_t tokens : {0, 1, 17}) {
        if (topk >= experts || (experts == 64 && tokens == 17 && topk == 2)) continue;
        Doubles z = normals(tokens, experts, 1), n = normals(tokens, experts, 2);
        const Variation r = load(stream, z, n, topk);
        const auto sums =
            reference::load(table(z), table(noisy(stream, z, n)), table(n), kAmount, topk, experts);
        ASSERT_NEAR(r.cv2, reference::cv2(sums), 1e-11);
        const Doubles dz = normals(tokens, experts, 3), dn = normals(tokens, experts, 4);
        const auto g = load_backward<double>(stream, {dz, dn}, r, z, n, topk);
        if (experts == 64 && tokens == 17) continue;  // 64 * 17 differences of 64 * 17 terms
        const auto loss = [&] {
          return 0.3 * load(stream, z, n, topk).cv2 + inner(z, dz) + inner(n, dn);
        };
        expect_gradient(z, g.dz, loss, "dz");
        expect_gradient(n, g.dn, loss, "dn");
      }
    }
  }
}

TEST(LoadLoss, FloatMatchesDoubleOnAnyThreads) {
  Stream one(1);
  const std::int64_t tokens = 600, experts = 24, topk = 3;  // two chunks of rows
  const Doubles z = normals(tokens, experts, 1), n = normals(tokens, experts, 2);
  const Doubles zero = filled<double>(tokens, experts, 0);
  const Variation exact = load(one, z, n, topk);
  const auto exact_g = load_backward<double>(one, {zero, zero}, exact, z, n, topk);
  const auto zf = as<float>(z), nf = as<float>(n), zero_f = as<float>(zero);
  const Variation r = load(one, zf, nf, topk);
  EXPECT_NEAR(r.cv2, exact.cv2, 1e-5);
  const auto g = load_backward<float>(one, {zero_f, zero_f}, exact, zf, nf, topk);
  expect_near(g.dz, exact_g.dz, 1e-5, "dz");
  expect_near(g.dn, exact_g.dn, 1e-5, "dn");
  for (const int threads : {2, 3}) {
    Stream more(threads);
    const Variation again = load(more, zf, nf, topk);
    EXPECT_EQ(again.cv2, r.cv2);
    EXPECT_TRUE(again.derivative.same_bits(r.derivative));
    const auto h = load_backward<float>(more, {zero_f, zero_f}, exact, zf, nf, topk);
    EXPECT_TRUE(h.dz.same_bits(g.dz) && h.dn.same_bits(g.dn));
  }
}

TEST(LoadLoss, RefusesAllExpertsAndNoNoise) {
  Stream stream(1);
  const Matrix<float> z = filled<float>(2, 3, 0.5F);
  Doubles derivative(1, 3);
  double cv2 = 0;
  LoadLoss args{.cv2 = &cv2,
                .derivative = derivative,
                .z_clean = z,
                .z_noisy = z,
                .n = z,
                .amount = 1,
                .topk = 3};
  EXPECT_THROW(load_loss(stream, args), Error);
  args.topk = 1;
  args.amount = 0;
  EXPECT_THROW(load_loss(stream, args), Error);
}

}  // namespace
}  // namespace arcus
