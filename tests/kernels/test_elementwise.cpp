#include "kernels/elementwise.hpp"

#include "tests/kernels/op_test.hpp"

namespace arcus {
namespace {

using namespace test;  // NOLINT(google-build-using-namespace)

const std::vector<std::pair<std::int64_t, std::int64_t>> kSizes = {
    {0, 3}, {1, 1}, {5, 17}, {33, 64}, {1, 40000}, {20, 1030}};

// ---- add, cast, fill -------------------------------------------------------------------------

template <class T, class U, class V>
void expect_sum_rounded_once() {
  Stream stream(2);
  for (const auto& [rows, cols] : kSizes) {
    for (const std::int64_t padding : {0, 3}) {
      const Doubles a = normals(rows, cols, 1);
      const Doubles b = normals(rows, cols, 2);
      Matrix<T> y(rows, cols, padding);
      add(stream, {.y = y, .a = as<U>(a, padding), .b = as<V>(b, padding)});
      for (std::int64_t t = 0; t < rows; ++t) {
        for (std::int64_t i = 0; i < cols; ++i) {
          // Sums of two numbers of 8 bits are exact in f32 here up to its own rounding.
          const auto sum = from_double<Acc<T>>(a.at(t, i) + b.at(t, i));
          ASSERT_EQ(to_double(y.at(t, i)), to_double(from_double<T>(to_double(sum))));
        }
      }
      EXPECT_TRUE(y.padding_untouched());
    }
  }
}
TEST(Add, IsRoundedOnce) {
  expect_sum_rounded_once<double, double, double>();
  expect_sum_rounded_once<float, float, float>();
  expect_sum_rounded_once<bf16, bf16, bf16>();
  expect_sum_rounded_once<bf16, float, bf16>();
  expect_sum_rounded_once<bf16, bf16, float>();
}
TEST(Add, MayBeInPlace) {
  Stream stream(2);
  Matrix<float> y = filled<float>(3, 5, 2);
  add(stream, {.y = y, .a = y, .b = y});
  for (const float value : y.data()) EXPECT_EQ(value, 4.0F);
}
TEST(Add, RefusesOtherShapes) {
  Stream stream(1);
  Matrix<float> y(3, 5);
  EXPECT_THROW(add(stream, {.y = y, .a = y, .b = Matrix<float>(3, 4)}), Error);
}

template <class T, class U>
void expect_cast() {
  Stream stream(3);
  for (const auto& [rows, cols] : kSizes) {
    for (const std::int64_t padding : {0, 5}) {
      Matrix<U> x(rows, cols, 2);
      const Rng rng(7, "test", "cast");
      for (std::int64_t t = 0; t < rows; ++t) {
        for (std::int64_t i = 0; i < cols; ++i) {
          x.at(t, i) = from_double<U>(
              static_cast<double>(rng.normal(static_cast<std::uint64_t>(t * cols + i))));
        }
      }
      Matrix<T> y(rows, cols, padding);
      cast(stream, {.y = y, .x = x});
      for (std::int64_t t = 0; t < rows; ++t) {
        for (std::int64_t i = 0; i < cols; ++i) {
          ASSERT_EQ(to_double(y.at(t, i)), to_double(from_double<T>(to_double(x.at(t, i)))));
        }
      }
      EXPECT_TRUE(y.padding_untouched());
    }
  }
}
TEST(Cast, ConvertsBetweenAllTypes) {
  expect_cast<float, bf16>();
  expect_cast<bf16, float>();
  expect_cast<float, float>();
  expect_cast<bf16, bf16>();
  expect_cast<double, float>();
  expect_cast<float, double>();
}
TEST(Cast, RoundsToNearestEvenAndKeepsSpecials) {
  Stream stream(1);
  const std::vector<std::pair<std::uint32_t, std::uint16_t>> cases = {
      {0x3f808000, 0x3f80}, {0x3f818000, 0x3f82}, {0x3f808001, 0x3f81}, {0x80000000, 0x8000},
      {0x7f7fffff, 0x7f80}, {0x7f800000, 0x7f80}, {0x00008001, 0x0001}, {0xff800000, 0xff80}};
  const auto count = static_cast<std::int64_t>(cases.size());
  for (std::int64_t copies : {1, 9}) {
    Matrix<float> x(1, count * copies);
    for (std::int64_t i = 0; i < x.cols(); ++i) {
      x.at(0, i) = std::bit_cast<float>(cases[static_cast<std::size_t>(i % count)].first);
    }
    Matrix<bf16> y(1, x.cols());
    cast(stream, {.y = y, .x = x});
    for (std::int64_t i = 0; i < x.cols(); ++i) {
      EXPECT_EQ(y.at(0, i).bits, cases[static_cast<std::size_t>(i % count)].second) << i;
    }
  }
  Matrix<float> nan = filled<float>(1, 1, std::bit_cast<float>(0x7f800001U));
  Matrix<bf16> y(1, 1);
  cast(stream, {.y = y, .x = nan});
  EXPECT_TRUE(std::isnan(to_double(y.at(0, 0))));
}

TEST(FillZero, LeavesPaddingAlone) {
  Stream stream(2);
  for (const auto& [rows, cols] : kSizes) {
    for (const std::int64_t padding : {0, 3}) {
      Matrix<float> y(rows, cols, padding);
      fill_zero(stream, {.y = y});
      for (std::int64_t t = 0; t < rows; ++t) {
        for (std::int64_t i = 0; i < cols; ++i) ASSERT_EQ(y.at(t, i), 0.0F);
      }
      EXPECT_TRUE(y.padding_untouched());
    }
  }
}

template <class T>
void expect_filled_with_value() {
  Stream stream(2);
  for (const auto& [rows, cols] : kSizes) {
    for (const std::int64_t padding : {0, 3}) {
      for (const double value : {0.0, 1.0, -0.1}) {
        Matrix<T> y(rows, cols, padding);
        fill_value(stream, {.y = y, .value = value});
        const double expected = to_double(from_double<T>(value));
        for (std::int64_t t = 0; t < rows; ++t) {
          for (std::int64_t i = 0; i < cols; ++i) ASSERT_EQ(to_double(y.at(t, i)), expected);
        }
        EXPECT_TRUE(y.padding_untouched());
      }
    }
  }
}
TEST(FillValue, RoundsOnceAndLeavesPaddingAlone) {
  expect_filled_with_value<float>();
  expect_filled_with_value<double>();
  expect_filled_with_value<bf16>();
}

// ---- weighted sum ----------------------------------------------------------------------------

/// Rows of slots, a third of them dropped (null).
template <class T>
struct Slots {
  Slots(const Doubles& values, std::int64_t tokens, std::int64_t slots) : rows(as<T>(values, 2)) {
    for (std::int64_t i = 0; i < tokens * slots; ++i) {
      const bool dropped = draw(3, static_cast<std::uint64_t>(i), 3) == 0;
      pointers.push_back(dropped ? nullptr : &rows.at(i, 0));
    }
  }
  Matrix<T> rows;
  std::vector<const void*> pointers;
};

enum class Addends { none, compute, accumulate, both };
const std::vector<Addends> kAddends = {Addends::none, Addends::compute, Addends::accumulate,
                                       Addends::both};

template <class T>
Matrix<T> combine(Stream& stream, const Slots<T>& slots, const Matrix<Acc<T>>& weight,
                  const Matrix<T>& addend1, const Matrix<Acc<T>>& addend2, Addends addends,
                  bool weighted) {
  const bool first = addends == Addends::compute || addends == Addends::both;
  const bool second = addends == Addends::accumulate || addends == Addends::both;
  Matrix<T> out(weight.rows(), addend1.cols(), 3);
  weighted_sum(stream, {.out = out,
                        .slot_rows = slots.pointers.data(),
                        .weight = weighted ? weight.view() : ConstTensorView(),
                        .slots_per_token = weight.cols(),
                        .addend1 = first ? addend1.view() : ConstTensorView(),
                        .addend2 = second ? addend2.view() : ConstTensorView()});
  return out;
}

/// In choice-rank order, fused, then the addends; accumulate type, one rounding at the end.
template <class T>
void expect_weighted_sum() {
  using A = Acc<T>;
  Stream one(1);
  Stream three(3);
  for (const auto& [tokens, cols] : kSizes) {
    for (const std::int64_t num_slots : {1, 3}) {
      const Slots<T> slots(normals(tokens * num_slots, cols, 1), tokens, num_slots);
      const Matrix<A> weight = as<A>(normals(tokens, num_slots, 2));
      const Matrix<T> addend1 = as<T>(normals(tokens, cols, 3), 1);
      const Matrix<A> addend2 = as<A>(normals(tokens, cols, 4), 2);
      for (const Addends addends : kAddends) {
        for (const bool weighted : {true, false}) {
          const auto out = combine(one, slots, weight, addend1, addend2, addends, weighted);
          for (std::int64_t t = 0; t < tokens; ++t) {
            for (std::int64_t i = 0; i < cols; ++i) {
              A sum(0);
              for (std::int64_t j = 0; j < num_slots; ++j) {
                if (slots.pointers[static_cast<std::size_t>(t * num_slots + j)] == nullptr)
                  continue;
                sum = std::fma(weighted ? weight.at(t, j) : A(1),
                               static_cast<A>(slots.rows.at(t * num_slots + j, i)), sum);
              }
              if (addends == Addends::compute || addends == Addends::both) {
                sum += static_cast<A>(addend1.at(t, i));
              }
              if (addends == Addends::accumulate || addends == Addends::both) {
                sum += addend2.at(t, i);
              }
              ASSERT_EQ(to_double(out.at(t, i)), to_double(from_double<T>(to_double(sum))));
            }
          }
          EXPECT_TRUE(out.padding_untouched());
          EXPECT_TRUE(
              combine(three, slots, weight, addend1, addend2, addends, weighted).same_bits(out));
        }
      }
    }
  }
}
TEST(WeightedSum, AddsInChoiceOrder) {
  expect_weighted_sum<double>();
  expect_weighted_sum<float>();
  expect_weighted_sum<bf16>();
}

TEST(WeightedSum, GradientsMatchDifferences) {
  // The transpose is what ffn_backward computes from dout and the weight: dy = w dout, dw = <dout,
  // y>.
  Stream stream(1);
  const std::int64_t tokens = 4, num_slots = 3, cols = 5;
  Slots<double> slots(normals(tokens * num_slots, cols, 1), tokens, num_slots);
  Doubles weight = normals(tokens, num_slots, 2);
  const Doubles addend = normals(tokens, cols, 3);
  const Doubles dout = normals(tokens, cols, 4);
  Doubles dslots(tokens * num_slots, cols);
  Doubles dweight(tokens, num_slots);
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t j = 0; j < num_slots; ++j) {
      const std::int64_t slot = t * num_slots + j;
      const bool kept = slots.pointers[static_cast<std::size_t>(slot)] != nullptr;
      dweight.at(t, j) = 0;
      for (std::int64_t i = 0; i < cols; ++i) {
        dslots.at(slot, i) = kept ? weight.at(t, j) * dout.at(t, i) : 0;
        if (kept) dweight.at(t, j) += slots.rows.at(slot, i) * dout.at(t, i);
      }
    }
  }
  const auto loss = [&] {
    return inner(widened(combine(stream, slots, weight, addend, addend, Addends::both, true)),
                 dout);
  };
  expect_gradient(weight, dweight, loss, "dweight");
  expect_gradient(slots.rows, dslots, loss, "dslots");
}

// ---- rows scaled by a sigmoid ----------------------------------------------------------------

template <class T>
struct Scaled {
  Matrix<T> out, dx;
  Matrix<Acc<T>> dlogit;
};
template <class T>
Scaled<T> scale(Stream& stream, const Matrix<T>& x, const Matrix<Acc<T>>& logit,
                const Matrix<T>& dout) {
  Scaled<T> r{Matrix<T>(x.rows(), x.cols(), 2), Matrix<T>(x.rows(), x.cols(), 1),
              Matrix<Acc<T>>(x.rows(), 1)};
  scale_rows_sigmoid(stream, {.out = r.out, .x = x, .logit = logit});
  scale_rows_sigmoid_backward(
      stream, {.dx = r.dx, .dlogit = r.dlogit, .dout = dout, .x = x, .logit = logit});
  return r;
}

template <class T>
void expect_scaled_near_double() {
  Stream one(1);
  Stream three(3);
  for (const auto& [rows, cols] : kSizes) {
    const Doubles x = normals(rows, cols, 1);
    const Doubles logit = normals(rows, 1, 2, 4);
    const Doubles dout = normals(rows, cols, 3);
    const auto exact = scale<double>(one, x, logit, dout);
    const auto a = scale<T>(one, as<T>(x), as<Acc<T>>(logit), as<T>(dout));
    const auto b = scale<T>(three, as<T>(x), as<Acc<T>>(logit), as<T>(dout));
    const double u = unit_roundoff<T>();
    expect_near(a.out, widened(exact.out), 4 * u, "out");
    expect_near(a.dx, widened(exact.dx), 4 * u, "dx");
    // A dot product of `cols` terms of either sign.
    expect_near(a.dlogit, exact.dlogit, std::sqrt(static_cast<double>(cols)) * 0x1p-22, "dlogit");
    EXPECT_TRUE(a.out.same_bits(b.out) && a.dx.same_bits(b.dx) && a.dlogit.same_bits(b.dlogit));
  }
}
TEST(ScaleRowsSigmoid, FloatMatchesDouble) { expect_scaled_near_double<float>(); }
TEST(ScaleRowsSigmoid, Bf16MatchesDouble) { expect_scaled_near_double<bf16>(); }

TEST(ScaleRowsSigmoid, GradientsMatchDifferences) {
  Stream stream(1);
  Doubles x = normals(5, 7, 1);
  Doubles logit = normals(5, 1, 2, 2);
  const Doubles dout = normals(5, 7, 3);
  const auto r = scale<double>(stream, x, logit, dout);
  const auto loss = [&] { return inner(widened(scale<double>(stream, x, logit, dout).out), dout); };
  expect_gradient(x, widened(r.dx), loss, "dx");
  expect_gradient(logit, r.dlogit, loss, "dlogit");
  for (std::int64_t t = 0; t < 5; ++t) {
    EXPECT_NEAR(r.out.at(t, 0), x.at(t, 0) / (1 + std::exp(-logit.at(t, 0))), 1e-15);
  }
}

TEST(Elementwise, BitsDependNeitherOnPlaceNorOnLength) {
  Stream stream(1);
  const Matrix<float> x = as<float>(normals(1, 200, 1));
  const Matrix<float> logit = filled<float>(1, 1, 0.3F);
  Matrix<bf16> whole(1, 200);
  scale_rows_sigmoid(stream, {.out = whole, .x = as<bf16>(widened(x)), .logit = logit});
  const Matrix<bf16> x16 = as<bf16>(widened(x));
  for (std::int64_t begin = 0; begin < 40; ++begin) {
    for (const std::int64_t count : {1, 7, 16, 33, 100}) {
      Matrix<bf16> part(1, count);
      scale_rows_sigmoid(stream,
                         {.out = part, .x = x16.view().col_range(begin, count), .logit = logit});
      for (std::int64_t i = 0; i < count; ++i) {
        ASSERT_EQ(part.at(0, i).bits, whole.at(0, begin + i).bits);
      }
    }
  }
}

}  // namespace
}  // namespace arcus
