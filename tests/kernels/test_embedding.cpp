#include "kernels/embedding.hpp"

#include "tests/kernels/op_test.hpp"

namespace arcus {
namespace {

using namespace test;  // NOLINT(google-build-using-namespace)

struct Case {
  std::int64_t tokens, vocab, cols;
};
const std::vector<Case> kCases = {{0, 5, 4}, {1, 1, 1}, {40, 7, 5}, {9, 500, 33}, {300, 60, 515}};

/// Skewed: half of the tokens share id 0.
Ints ids_of(const Case& c) {
  Ints ids(1, c.tokens);
  for (std::int64_t t = 0; t < c.tokens; ++t) {
    const auto at = static_cast<std::uint64_t>(t);
    ids.at(0, t) = draw(1, at, 2) == 0 ? 0 : static_cast<std::int32_t>(draw(2, at, c.vocab));
  }
  return ids;
}

template <class T, class Sum>
Matrix<Sum> backward(Stream& stream, const Matrix<T>& dout, const Ints& ids, std::int64_t vocab,
                     Matrix<Sum> dtable) {
  Ints scratch(1, vocab + 1 + dout.rows());
  embedding_backward(
      stream,
      {.dtable = {.sum = dtable.data().data(), .dtype = dtype_of<Sum>(), .limit = leaf_limit(1)},
       .dout = dout,
       .ids = ids,
       .vocab_size = vocab,
       .scratch = scratch});
  return dtable;
}

template <class T>
void expect_rows_of_the_table() {
  Stream stream(2);
  for (const Case& c : kCases) {
    const Matrix<T> table = as<T>(normals(c.vocab, c.cols, 3), 2);
    const Ints ids = ids_of(c);
    Matrix<T> out(c.tokens, c.cols, 1);
    embedding_forward(stream, {.out = out, .table = table, .ids = ids});
    for (std::int64_t t = 0; t < c.tokens; ++t) {
      for (std::int64_t i = 0; i < c.cols; ++i) {
        ASSERT_EQ(to_double(out.at(t, i)), to_double(table.at(ids.at(0, t), i)));
      }
    }
    EXPECT_TRUE(out.padding_untouched());
  }
}
TEST(Embedding, ForwardTakesRows) {
  expect_rows_of_the_table<double>();
  expect_rows_of_the_table<float>();
  expect_rows_of_the_table<bf16>();
}

template <class T>
void expect_positions_added_once_rounded() {
  Stream one(1);
  Stream three(3);
  for (const Case& c : kCases) {
    const Matrix<T> table = as<T>(normals(c.vocab, c.cols, 3));
    const Matrix<T> places = as<T>(normals(c.tokens + 1, c.cols, 4), 1);
    const Ints ids = ids_of(c);
    Ints position(1, c.tokens);
    for (std::int64_t t = 0; t < c.tokens; ++t) {
      position.at(0, t) =
          static_cast<std::int32_t>(draw(5, static_cast<std::uint64_t>(t), c.tokens + 1));
    }
    Matrix<T> out(c.tokens, c.cols, 2);
    Matrix<T> again(c.tokens, c.cols, 2);
    EmbeddingForward args{
        .out = out, .table = table, .ids = ids, .position_table = places, .position = position};
    embedding_forward(one, args);
    args.out = again;
    embedding_forward(three, args);
    EXPECT_TRUE(again.same_bits(out));
    for (std::int64_t t = 0; t < c.tokens; ++t) {
      for (std::int64_t i = 0; i < c.cols; ++i) {
        const Acc<T> sum = static_cast<Acc<T>>(table.at(ids.at(0, t), i)) +
                           static_cast<Acc<T>>(places.at(position.at(0, t), i));
        ASSERT_EQ(to_double(out.at(t, i)), to_double(static_cast<T>(sum)));
      }
    }
    EXPECT_TRUE(out.padding_untouched());
  }
}
TEST(Embedding, ForwardAddsPositions) {
  expect_positions_added_once_rounded<double>();
  expect_positions_added_once_rounded<float>();
  expect_positions_added_once_rounded<bf16>();
}

/// Tokens of a row added in token order, in the accumulate type.
template <class T>
void expect_leaf_in_token_order() {
  using A = Acc<T>;
  Stream one(1);
  Stream three(3);
  for (const Case& c : kCases) {
    const Matrix<T> dout = as<T>(normals(c.tokens, c.cols, 4), 3);
    const Ints ids = ids_of(c);
    Matrix<A> leaf = filled<A>(c.vocab, c.cols, A(0));
    for (std::int64_t t = 0; t < c.tokens; ++t) {
      for (std::int64_t i = 0; i < c.cols; ++i) {
        leaf.at(ids.at(0, t), i) += static_cast<A>(dout.at(t, i));
      }
    }
    // Sums that hold something already: the leaf is added as a whole.
    const Matrix<A> before = as<A>(normals(c.vocab, c.cols, 5));
    Matrix<A> expected = before;
    for (std::int64_t v = 0; v < c.vocab; ++v) {
      for (std::int64_t i = 0; i < c.cols; ++i) expected.at(v, i) += leaf.at(v, i);
    }
    EXPECT_TRUE(backward(one, dout, ids, c.vocab, before).same_bits(expected));
    EXPECT_TRUE(backward(three, dout, ids, c.vocab, before).same_bits(expected));
  }
}
TEST(Embedding, BackwardAddsTokensInOrder) {
  expect_leaf_in_token_order<double>();
  expect_leaf_in_token_order<float>();
  expect_leaf_in_token_order<bf16>();
}

TEST(Embedding, BackwardQuantisesOneLeafARow) {
  Stream stream(2);
  const Case c{50, 9, 6};
  const Matrix<float> dout = as<float>(normals(c.tokens, c.cols, 4));
  const Ints ids = ids_of(c);
  const auto leaf = backward(stream, dout, ids, c.vocab, filled<float>(c.vocab, c.cols, 0));
  const auto sum = backward(stream, dout, ids, c.vocab, filled<std::int64_t>(c.vocab, c.cols, 3));
  for (std::int64_t v = 0; v < c.vocab; ++v) {
    for (std::int64_t i = 0; i < c.cols; ++i) {
      EXPECT_EQ(sum.at(v, i), 3 + std::llrint(std::ldexp(to_double(leaf.at(v, i)), 50)));
    }
  }
}

TEST(Embedding, BackwardLeavesOtherRowsAlone) {
  Stream stream(2);
  // Adding even a zero would turn -0 into +0.
  const auto dtable = backward(stream, filled<float>(3, 4, 1), filled<std::int32_t>(1, 3, 2), 5,
                               filled<float>(5, 4, -0.0F));
  for (const std::int64_t v : {0, 1, 3, 4}) EXPECT_TRUE(std::signbit(dtable.at(v, 0)));
  EXPECT_EQ(dtable.at(2, 0), 3.0F);
}

TEST(Embedding, GradientMatchesDifferences) {
  Stream stream(1);
  const Case c{13, 6, 3};
  Doubles table = normals(c.vocab, c.cols, 1);
  const Doubles dout = normals(c.tokens, c.cols, 2);
  const Ints ids = ids_of(c);
  const auto loss = [&] {
    Doubles out(c.tokens, c.cols);
    embedding_forward(stream, {.out = out, .table = table, .ids = ids});
    return inner(out, dout);
  };
  const auto dtable = backward(stream, dout, ids, c.vocab, filled<double>(c.vocab, c.cols, 0));
  expect_gradient(table, dtable, loss, "dtable");
}

TEST(Embedding, RefusesIdsOutsideTheVocabulary) {
  Stream stream(1);
  for (const std::int32_t id : {-1, 5}) {
    const Ints ids = filled<std::int32_t>(1, 1, id);
    Matrix<float> out(1, 2);
    const Matrix<float> table = filled<float>(5, 2, 0);
    EXPECT_THROW(embedding_forward(stream, {.out = out, .table = table, .ids = ids}), Error);
    EXPECT_THROW(backward(stream, out, ids, 5, filled<float>(5, 2, 0)), Error);
    const Ints first = filled<std::int32_t>(1, 1, 0);
    EXPECT_THROW(
        embedding_forward(
            stream,
            {.out = out, .table = table, .ids = first, .position_table = table, .position = ids}),
        Error);
  }
}

}  // namespace
}  // namespace arcus
