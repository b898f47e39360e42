#include "kernels/gate_input.hpp"

#include "tests/kernels/gate_support.hpp"

namespace arcus {
namespace {

using namespace test;  // NOLINT(google-build-using-namespace)

const TokenDraws kDraws{.key = 31, .step = std::int64_t{9} << 32, .first_token = 1003};
std::uint64_t step_of(const TokenDraws& draws) { return static_cast<std::uint64_t>(draws.step); }
std::uint64_t number(const TokenDraws& draws, std::int64_t t, std::int64_t i, std::int64_t cols) {
  return static_cast<std::uint64_t>((draws.first_token + t) * cols + i);
}

// ---- jitter ----------------------------------------------------------------------------------

template <class T>
Matrix<Acc<T>> jittered(Stream& stream, const Matrix<T>& x, double amount) {
  Matrix<Acc<T>> y(x.rows(), x.cols(), 3);
  jitter(stream, {.y = y, .x = x, .amount = amount, .draws = kDraws});
  return y;
}

template <class T>
void expect_jitter() {
  for (const std::int64_t tokens : {0, 1, 17}) {
    for (const std::int64_t hidden : {1, 7, 64, 1100}) {
      const Doubles x = normals(tokens, hidden, 1);
      Doubles expected(tokens, hidden);
      for (std::int64_t t = 0; t < tokens; ++t) {
        for (std::int64_t h = 0; h < hidden; ++h) {
          const double u =
              reference::uniform(kDraws.key, step_of(kDraws), number(kDraws, t, h, hidden));
          expected.at(t, h) = x.at(t, h) * (1 - 0.3 + 2 * 0.3 * u);
        }
      }
      Stream one(1);
      const auto y = jittered(one, as<T>(x, 1), 0.3);
      expect_near(y, expected, 8 * unit_roundoff<Acc<T>>(), "jitter");
      for (const int threads : {2, 3}) {
        Stream more(threads);
        EXPECT_TRUE(jittered(more, as<T>(x), 0.3).same_bits(y));
      }
    }
  }
}
TEST(Jitter, MultipliesByTheAddressedNumber) {
  expect_jitter<double>();
  expect_jitter<float>();
  expect_jitter<bf16>();
}

TEST(Jitter, MayWorkInPlaceAndIsItsOwnGradient) {
  Stream stream(1);
  Doubles x = normals(3, 9, 1);
  const Doubles dy = normals(3, 9, 2);
  Doubles dx = dy;
  jitter(stream, {.y = dx, .x = dx, .amount = 0.2, .draws = kDraws});
  expect_gradient(
      x, dx, [&] { return inner(widened(jittered(stream, x, 0.2)), dy); }, "jitter");
}

// ---- noise -----------------------------------------------------------------------------------

template <class A>
Matrix<A> noisy(Stream& stream, Matrix<A> z, const Matrix<A>& n, double amount) {
  gate_noise(stream, {.z = z, .n = n, .amount = amount, .draws = kDraws});
  return z;
}

TEST(GateNoise, FollowsTheFormula) {
  for (const std::int64_t tokens : {0, 1, 17, 90}) {
    for (const std::int64_t experts : {1, 2, 3, 8, 64}) {
      const Doubles z = normals(tokens, experts, 1);
      const Doubles n = normals(tokens, experts, 2, 4);
      Doubles expected = z;
      for (std::int64_t t = 0; t < tokens; ++t) {
        for (std::int64_t e = 0; e < experts; ++e) {
          const double eps =
              reference::normal(kDraws.key, step_of(kDraws), number(kDraws, t, e, experts));
          expected.at(t, e) += 0.7 * eps * reference::softplus(n.at(t, e));
        }
      }
      Stream one(1);
      // eps comes rounded to f32.
      expect_near(noisy(one, z, n, 0.7), expected, 0x1p-23, "double");
      const Matrix<float> z_noisy = noisy(one, as<float>(z, 2), as<float>(n), 0.7);
      expect_near(z_noisy, expected, 0x1p-21, "float");
      for (const int threads : {2, 3}) {
        Stream more(threads);
        EXPECT_TRUE(noisy(more, as<float>(z, 2), as<float>(n), 0.7).same_bits(z_noisy));
      }
    }
  }
}

TEST(GateNoise, HasMeanZeroAndTheVarianceOfItsWidth) {
  Stream stream(1);
  const std::int64_t tokens = 5000, experts = 7;
  const Doubles n = filled<double>(tokens, experts, 0.4);
  const Doubles noise = noisy(stream, filled<double>(tokens, experts, 0), n, 0.5);
  const double width = 0.5 * std::log1p(std::exp(0.4));
  double sum = 0, squares = 0;
  for (const double x : noise.data()) {
    sum += x / width;
    squares += x * x / (width * width);
  }
  // Standard errors 1 / sqrt(count) and sqrt(2 / count); five of them.
  const auto count = static_cast<double>(tokens * experts);
  EXPECT_NEAR(sum / count, 0, 5 / std::sqrt(count));
  EXPECT_NEAR(squares / count, 1, 5 * std::sqrt(2 / count));
}

TEST(GateNoise, GradientMatchesDifferencesAndIsAdded) {
  Stream stream(1);
  Doubles n = normals(4, 7, 1, 2);
  const Doubles z = normals(4, 7, 2), dz = normals(4, 7, 3), other = normals(4, 7, 4);
  Doubles dn = other;
  gate_noise_backward(stream, {.dn = dn, .dz = dz, .n = n, .amount = 0.7, .draws = kDraws});
  const auto loss = [&] { return inner(noisy(stream, z, n, 0.7), dz) + inner(n, other); };
  expect_gradient(n, dn, loss, "dn");
  Matrix<float> f = as<float>(other, 2);
  gate_noise_backward(
      stream, {.dn = f, .dz = as<float>(dz), .n = as<float>(n), .amount = 0.7, .draws = kDraws});
  expect_near(f, dn, 0x1p-21, "float");
}

TEST(GateNoise, TinyAndHugeWidthsStayFinite) {
  Stream stream(1);
  Matrix<float> n = filled<float>(1, 2, -200);
  n.at(0, 1) = 200;
  const Matrix<float> z = noisy(stream, filled<float>(1, 2, 1), n, 1);
  EXPECT_EQ(z.at(0, 0), 1.0F);
  EXPECT_TRUE(std::isfinite(z.at(0, 1)));
}

// ---- cosine ----------------------------------------------------------------------------------

template <class T>
struct Normalized {
  Matrix<Acc<T>> y, inv_norm;
};
template <class T>
Normalized<T> normalized(Stream& stream, const Matrix<T>& x) {
  Normalized<T> r{Matrix<Acc<T>>(x.rows(), x.cols(), 1), Matrix<Acc<T>>(x.rows(), 1)};
  normalize_rows(stream, {.y = r.y, .inv_norm = r.inv_norm, .x = x});
  EXPECT_TRUE(r.y.padding_untouched());
  return r;
}

/// z = a <x^, W^> + bias and what its backward needs.
struct Cosine {
  Cosine(Stream& stream, const Doubles& x, const Doubles& w, double theta, const Doubles* bias)
      : x_hat(normalized(stream, x)),
        w_hat(normalized(stream, w)),
        temperature(filled<double>(1, 1, theta)),
        z(x.rows(), w.rows(), 2),
        c(x.rows(), w.rows(), 1) {
    gate_logits(stream, {.z = z, .x = x_hat.y, .weight = w_hat.y});
    cosine_logits(stream, {.z = z,
                           .cosine = c,
                           .temperature = temperature,
                           .bias = bias == nullptr ? ConstTensorView() : bias->view()});
  }
  Normalized<double> x_hat, w_hat;
  Doubles temperature, z, c;
};

TEST(CosineLogits, FollowTheFormula) {
  Stream stream(2);
  const Doubles bias = normals(1, 5, 3);
  for (const std::int64_t tokens : {0, 1, 17, 70}) {
    for (const double theta : {1.0, -2.0, 9.0}) {
      Doubles x = normals(tokens, 12, 1);
      for (std::int64_t h = 0; h < 12 && tokens > 1; ++h) x.at(1, h) = 0;
      const Doubles w = normals(5, 12, 2);
      const Cosine r(stream, x, w, theta, &bias);
      for (std::int64_t t = 0; t < tokens; ++t) {
        for (std::int64_t e = 0; e < 5; ++e) {
          const double expected = reference::cosine_logit(
              table(x)[static_cast<std::size_t>(t)], table(w)[static_cast<std::size_t>(e)], theta);
          EXPECT_NEAR(r.z.at(t, e), expected + bias.at(0, e), 1e-12);
        }
      }
      EXPECT_TRUE(r.z.padding_untouched() && r.c.padding_untouched());
    }
  }
}

template <class A>
struct CosineGradients {
  Matrix<A> e, e_scaled, dtemperature, dweight;
};
template <class A>
CosineGradients<A> cosine_backward(Stream& stream, const Matrix<A>& dz, const Cosine& r) {
  CosineGradients<A> g{dz, Matrix<A>(dz.rows(), dz.cols(), 1), filled<A>(1, 1, A(0)),
                       filled<A>(r.w_hat.y.rows(), r.w_hat.y.cols(), A(0))};
  Doubles scratch(1, dz.cols());
  cosine_logits_backward(
      stream, {.dz = g.e,
               .e_scaled = g.e_scaled,
               .dtemperature = {.sum = g.dtemperature.data().data(), .dtype = dtype_of<A>()},
               .dweight = {.sum = g.dweight.data().data(), .dtype = dtype_of<A>()},
               .cosine = as<A>(widened(r.c)),
               .temperature = as<A>(r.temperature),
               .w_hat = as<A>(widened(r.w_hat.y), 2),
               .w_inv_norm = as<A>(widened(r.w_hat.inv_norm)),
               .scratch = scratch});
  return g;
}

TEST(CosineLogits, GradientsMatchDifferences) {
  Stream stream(1);
  const std::int64_t tokens = 70, hidden = 6, experts = 3;  // two blocks of rows
  for (const double theta : {0.5, 5.0}) {                   // 5 > ln 100: cut off
    Doubles x = normals(tokens, hidden, 1), w = normals(experts, hidden, 2);
    Doubles temperature = filled<double>(1, 1, theta);
    const Doubles dz = normals(tokens, experts, 3);
    const auto loss = [&] {
      return inner(Cosine(stream, x, w, temperature.at(0, 0), nullptr).z, dz);
    };
    const Cosine r(stream, x, w, theta, nullptr);
    const auto g = cosine_backward<double>(stream, dz, r);
    expect_gradient(temperature, g.dtemperature, loss, "temperature");
    // The first piece of W's leaf is the weight gradient of (e / |W_i|, x^).
    Doubles dw = g.dweight, dx_hat(tokens, hidden), dx(tokens, hidden);
    for (std::int64_t t = 0; t < tokens; ++t) {
      for (std::int64_t h = 0; h < hidden; ++h) {
        dx_hat.at(t, h) = 0;
        for (std::int64_t e = 0; e < experts; ++e) {
          dw.at(e, h) += g.e_scaled.at(t, e) * r.x_hat.y.at(t, h);
          dx_hat.at(t, h) += g.e.at(t, e) * r.w_hat.y.at(e, h);
        }
      }
    }
    expect_gradient(w, dw, loss, "W");
    normalize_rows_backward(stream,
                            {.dx = dx, .dy = dx_hat, .y = r.x_hat.y, .inv_norm = r.x_hat.inv_norm});
    expect_gradient(x, dx, loss, "x");
    normalize_rows_backward(
        stream, {.dx = dx_hat, .dy = dx_hat, .y = r.x_hat.y, .inv_norm = r.x_hat.inv_norm});
    EXPECT_TRUE(dx_hat.same_bits(dx));
  }
}

TEST(CosineLogits, FloatMatchesDoubleOnAnyThreads) {
  for (const auto& [tokens, experts] :
       std::vector<std::pair<std::int64_t, std::int64_t>>{{0, 3}, {1, 1}, {200, 130}}) {
    Stream one(1);
    const Doubles x = normals(tokens, 600, 1), w = normals(experts, 600, 2);
    const Doubles dz = normals(tokens, experts, 3);
    const Cosine r(one, x, w, 1, nullptr);
    const auto exact = cosine_backward<double>(one, dz, r);
    const auto g = cosine_backward<float>(one, as<float>(dz), r);
    expect_near(g.e, widened(exact.e), 0x1p-21, "e");
    expect_near(g.e_scaled, widened(exact.e_scaled), 0x1p-21, "e / |W|");
    // Sums of products that f32 rounds apart, each within 4 units: relative to the largest product
    // times the root of their number, some 1e-6.
    expect_near(g.dweight, exact.dweight, 1e-5, "dW");
    expect_near(g.dtemperature, exact.dtemperature, 1e-5, "temperature");
    const auto y = normalized(one, as<bf16>(x));
    expect_near(y.y, widened(r.x_hat.y), 0x1p-21, "x^");
    for (const int threads : {2, 3}) {
      Stream more(threads);
      const auto h = cosine_backward<float>(more, as<float>(dz), r);
      EXPECT_TRUE(h.e.same_bits(g.e) && h.dweight.same_bits(g.dweight) &&
                  h.dtemperature.same_bits(g.dtemperature));
      EXPECT_TRUE(normalized(more, as<bf16>(x)).y.same_bits(y.y));
    }
  }
}

}  // namespace
}  // namespace arcus
