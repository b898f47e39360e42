#include "tests/kernels/gate_support.hpp"

namespace arcus {
namespace {

using namespace test;  // NOLINT(google-build-using-namespace)

const std::vector<std::int64_t> kExperts = {1, 2, 3, 8, 64};

// ---- statistics and aux loss -----------------------------------------------------------------

void expect_statistics(const Scores<double>& r, std::int64_t topk, std::int64_t group) {
  Stream stream(1);
  const std::int64_t tokens = r.s.rows(), experts = r.s.cols();
  const Statistics out = statistics(stream, r, topk, group);
  const auto s = table(r.s);
  double entropy = 0, squares = 0, aux = 0;
  for (const auto& row : s) entropy += reference::entropy(row);
  for (std::int64_t t = 0; t < tokens; ++t) squares += r.lse.at(t, 0) * r.lse.at(t, 0);
  const auto counts = reference::unbiased_counts(s, experts, topk);
  for (std::int64_t e = 0; e < experts; ++e) {
    ASSERT_EQ(out.counts.at(0, e), static_cast<std::int64_t>(counts[static_cast<std::size_t>(e)]));
  }
  for (std::int64_t begin = 0; begin < tokens; begin += group) {
    const std::int64_t end = std::min(tokens, begin + group);
    const reference::Table part(s.begin() + begin, s.begin() + end);
    const auto f = reference::fractions(part, experts, topk);
    for (std::int64_t e = 0; e < experts; ++e) {
      EXPECT_NEAR(out.fraction.at(begin / group, e), f[static_cast<std::size_t>(e)], 1e-15);
    }
    aux += reference::aux(part, f) * static_cast<double>(end - begin) / static_cast<double>(tokens);
  }
  EXPECT_NEAR(out.aux, aux, 1e-12);
  EXPECT_NEAR(out.z_loss, tokens == 0 ? 0 : squares / static_cast<double>(tokens), 1e-12);
  EXPECT_NEAR(out.entropy, entropy, 1e-9);
}

TEST(GateStatistics, MatchTheFormulas) {
  Stream stream(1);
  for (const Score score : {Score::softmax, Score::sigmoid}) {
    for (const std::int64_t experts : kExperts) {
      for (const std::int64_t topk : {std::int64_t{1}, std::int64_t{2}, experts}) {
        if (topk > experts) continue;
        for (const std::int64_t group : {1, 3, 10, 2000}) {
          for (const std::int64_t tokens : {0, 1, 17}) {
            expect_statistics(scores<double>(stream, normals(tokens, experts, 1), score), topk,
                              group);
          }
        }
        // Two chunks of rows, ties everywhere.
        expect_statistics(scores<double>(stream, filled<double>(600, experts, 0.5), score), topk,
                          600);
      }
    }
  }
}

TEST(GateStatistics, BalanceGivesOneAndLogOfExperts) {
  Stream stream(1);
  Doubles z(4, 4);
  for (std::int64_t t = 0; t < 4; ++t) {
    for (std::int64_t e = 0; e < 4; ++e) z.at(t, e) = e == t ? 1e-9 : 0;
  }
  const Statistics out = statistics(stream, scores<double>(stream, z, Score::softmax), 1, 4);
  EXPECT_NEAR(out.aux, 1, 1e-8);
  EXPECT_NEAR(out.entropy, 4 * std::log(4.0), 1e-8);
}

TEST(GateStatistics, SameBitsOnAnyThreads) {
  Stream one(1);
  const auto r = scores<float>(one, as<float>(normals(1300, 70, 1)), Score::softmax);
  const Statistics expected = statistics(one, r, 6, 800);
  for (const int threads : {2, 3}) {
    Stream more(threads);
    const Statistics out = statistics(more, r, 6, 800);
    EXPECT_EQ(out.aux, expected.aux);
    EXPECT_EQ(out.entropy, expected.entropy);
    EXPECT_EQ(out.z_loss, expected.z_loss);
    EXPECT_TRUE(out.counts.same_bits(expected.counts));
    EXPECT_TRUE(out.fraction.same_bits(expected.fraction));
  }
}

TEST(AuxLoss, UnevenAndEmptyGroupsAndGivenFractions) {
  Stream stream(2);
  const std::int64_t experts = 5, tokens = 9;
  const std::vector<std::int64_t> offsets = {0, 0, 4, 4, 9, 9};
  const auto groups = std::ssize(offsets) - 1;
  for (const bool given : {false, true}) {
    Doubles z = normals(tokens, experts, 1);
    Doubles fraction(groups, experts);
    for (std::size_t i = 0; given && i < fraction.data().size(); ++i) {
      fraction.data()[i] = 0.1 + 0.01 * static_cast<double>(i);
    }
    Doubles scratch(1, 2 * experts);
    const auto run = [&](const Matrix<double>& s) {
      double aux = -1;
      aux_loss(stream, {.aux = &aux,
                        .fraction = fraction,
                        .given = given,
                        .scratch = scratch,
                        .s = s,
                        .group_offsets = offsets,
                        .topk = 2});
      return aux;
    };
    Doubles s = scores<double>(stream, z, Score::sigmoid).s;
    const double aux = run(s);
    double expected = 0;
    for (std::size_t g = 0; g + 1 < offsets.size(); ++g) {
      const auto rows = table(s);
      const reference::Table part(rows.begin() + offsets[g], rows.begin() + offsets[g + 1]);
      if (part.empty()) {
        if (!given) {
          EXPECT_EQ(fraction.at(static_cast<std::int64_t>(g), 0), 0);
        }
        continue;
      }
      const auto f = given ? table(fraction)[g] : reference::fractions(part, experts, 2);
      expected += reference::aux(part, f) * static_cast<double>(part.size()) / tokens;
    }
    EXPECT_NEAR(aux, expected, 1e-13);
    const Doubles other = normals(tokens, s.cols() + 1, 7);
    Doubles ds(tokens, experts);
    for (std::int64_t t = 0; t < tokens; ++t) {
      for (std::int64_t e = 0; e < experts; ++e) ds.at(t, e) = other.at(t, e);
    }
    const Doubles before = ds;
    aux_loss_backward(
        stream, {.ds = ds, .s = s, .fraction = fraction, .group_offsets = offsets, .coeff = 0.7});
    // The fraction is a constant: it is recomputed from the same choices while s moves a little.
    expect_gradient(
        s, ds, [&] { return 0.7 * run(s) + inner(s, before); }, "aux");
  }
}

TEST(AuxLoss, RefusesGroupsThatDoNotCoverTheTokens) {
  Stream stream(1);
  const Matrix<float> s = filled<float>(3, 2, 0.5F);
  Matrix<float> fraction(2, 2);
  Doubles scratch(1, 4);
  double aux = 0;
  for (const std::vector<std::int64_t>& offsets :
       {std::vector<std::int64_t>{0, 2}, {1, 3}, {}, {0, 1, 2, 3}, {0, 4, 3}}) {
    EXPECT_THROW(aux_loss(stream, {.aux = &aux,
                                   .fraction = fraction,
                                   .scratch = scratch,
                                   .s = s,
                                   .group_offsets = offsets,
                                   .topk = 1}),
                 Error);
  }
}

// ---- quantiles -------------------------------------------------------------------------------

TEST(Quantile, ScoresMatchTheFormula) {
  for (const std::int64_t tokens : {0, 1, 17, 90}) {
    for (const std::int64_t experts : {2, 3, 8, 64}) {
      for (const std::int64_t topk : {std::int64_t{1}, experts - 1}) {
        const Doubles s = normals(tokens, experts, 1);
        const Doubles bias = normals(1, experts, 2);
        const auto run = [&]<class A>(Stream& stream, const Matrix<A>& scores) {
          Matrix<float> u(tokens, experts, 2);
          quantile_scores(stream,
                          {.u = u, .s = scores, .expert_bias = as<float>(bias), .topk = topk});
          return u;
        };
        Stream one(1);
        const auto u = run(one, s);
        Doubles expected(tokens, experts);
        for (std::int64_t t = 0; t < tokens; ++t) {
          const auto row = reference::quantile_scores(table(s)[static_cast<std::size_t>(t)],
                                                      table(bias)[0], topk);
          for (std::int64_t e = 0; e < experts; ++e) {
            expected.at(t, e) = row[static_cast<std::size_t>(e)];
          }
        }
        expect_near(u, expected, 0x1p-23, "double");
        const auto f = run(one, as<float>(s, 1));
        expect_near(f, expected, 0x1p-21, "float");
        Stream three(3);
        EXPECT_TRUE(run(three, as<float>(s, 1)).same_bits(f));
      }
    }
  }
}

TEST(Quantile, ColumnsMatchASort) {
  for (const std::int64_t rows : {1, 2, 17, 400}) {
    for (const std::int64_t cols : {1, 3, 16, 17, 64}) {
      for (const std::uint64_t seed : {1, 3}) {  // 3: distinct values
        Matrix<float> u =
            seed == 1 ? tied_scores(rows, cols, seed) : as<float>(normals(rows, cols, seed), 1);
        for (const std::int64_t rank : {std::int64_t{1}, (rows + 1) / 2, rows}) {
          const auto run = [&](int threads) {
            Stream stream(threads);
            Matrix<float> q(1, cols);
            column_quantiles(stream, {.q = q, .u = u, .rank = rank});
            return q;
          };
          const auto q = run(1);
          for (std::int64_t c = 0; c < cols; ++c) {
            std::vector<float> column;
            for (std::int64_t t = 0; t < rows; ++t) column.push_back(u.at(t, c));
            std::sort(column.rbegin(), column.rend());
            ASSERT_EQ(q.at(0, c), column[static_cast<std::size_t>(rank - 1)]);
          }
          EXPECT_TRUE(run(2).same_bits(q) && run(3).same_bits(q));
        }
      }
    }
  }
}

TEST(Quantile, ColumnsTakeInfinitiesAndRefuseRanksOutside) {
  Stream stream(1);
  Matrix<float> u = filled<float>(4, 1, -0.0F);
  u.at(1, 0) = -std::numeric_limits<float>::infinity();
  u.at(2, 0) = std::numeric_limits<float>::infinity();
  u.at(3, 0) = std::numeric_limits<float>::quiet_NaN();
  Matrix<float> q(1, 1);
  const auto at = [&](std::int64_t rank) {
    column_quantiles(stream, {.q = q, .u = u, .rank = rank});
    return q.at(0, 0);
  };
  EXPECT_EQ(at(1), std::numeric_limits<float>::infinity());
  EXPECT_EQ(at(2), 0.0F);
  EXPECT_FALSE(std::signbit(at(2)));
  EXPECT_EQ(at(3), -std::numeric_limits<float>::infinity());
  EXPECT_EQ(at(4), -std::numeric_limits<float>::infinity());
  EXPECT_THROW(at(0), Error);
  EXPECT_THROW(at(5), Error);
}

}  // namespace
}  // namespace arcus
