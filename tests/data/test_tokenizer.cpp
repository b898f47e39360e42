#include <gtest/gtest.h>

#include "src/data/tokenizer.hpp"
#include "src/data/utf8.hpp"
#include "tests/data/data_testing.hpp"

namespace arcus {
namespace {

using testing::expect_failure;
using testing::plain_text;
using testing::random_text;

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) lines.push_back(line + '\n');
  return lines;
}

const std::string& spm_model() {
  static const std::string model = [] {
    std::string text = plain_text(1, 100000);
    for (int i = 0; i < 200; ++i)
      text += "\xE4\xB8\xAD\xE6\x96\x87\xE5\xAD\x97\n\xD0\x9F\xD1\x80 \n";
    return train_spm(lines_of(text), {400});
  }();
  return model;
}

const Tokenizer& tokenizer(const std::string& kind) {
  static const auto bytes = load_tokenizer("bytes", "");
  static const auto spm = load_tokenizer("spm", spm_model());
  return kind == "bytes" ? *bytes : *spm;
}

std::vector<std::int32_t> encode(const Tokenizer& t, std::string_view text) {
  std::vector<std::int32_t> ids;
  t.encode(text, ids);
  return ids;
}

class RoundTrip : public ::testing::TestWithParam<const char*> {
 protected:
  void check(const std::string& text) const {
    const Tokenizer& t = tokenizer(GetParam());
    const auto ids = encode(t, text);
    ASSERT_EQ(t.decode(ids), text);
    std::int64_t bytes = 0;
    for (const std::int32_t id : ids) {
      ASSERT_NE(id, t.eos_id());
      ASSERT_TRUE(id >= 0 && id < t.vocab_size());
      bytes += t.token_bytes(id);
    }
    ASSERT_EQ(bytes, static_cast<std::int64_t>(text.size()));
  }
};

TEST_P(RoundTrip, HoldsForThousandsOfRandomTexts) {
  std::mt19937_64 random(7);
  for (int i = 0; i < 4000; ++i) check(random_text(random, random() % 40));
}

TEST_P(RoundTrip, HoldsForChosenTexts) {
  for (const char* text :
       {"", " ", "  a  ", "\n", "\r\n\r\n", "\t\t x \t", "\xE2\x96\x81", " \xE2\x96\x81 ",
        "a\xE2\x96\x81 b", "</s><unk><0x0A>", "\xE2\x81\x87"}) {
    check(text);
  }
}

TEST_P(RoundTrip, HoldsForLinesOfAMegabyte) {
  std::mt19937_64 random(8);
  std::string line = random_text(random, 400000);
  std::erase(line, '\n');
  ASSERT_GT(line.size(), std::size_t{1} << 20);
  check(line);
  check(std::string(1 << 20, ' '));
  check(std::string(1 << 20, 'x') + "\n" + std::string(70000, '\t'));
  std::string blanks;
  for (int i = 0; i < 350000; ++i) blanks += "\xE2\x96\x81";
  check(blanks);
}

TEST_P(RoundTrip, SurvivesSerialization) {
  const Tokenizer& t = tokenizer(GetParam());
  const auto again = load_tokenizer(t.kind(), t.serialized());
  const std::string text = plain_text(5, 2000);
  EXPECT_EQ(encode(*again, text), encode(t, text));
  EXPECT_EQ(again->hash(), t.hash());
}

TEST_P(RoundTrip, GivesEndOfDocumentNoText) {
  const Tokenizer& t = tokenizer(GetParam());
  EXPECT_EQ(t.token_bytes(t.eos_id()), 0);
  EXPECT_EQ(t.decode({t.eos_id(), t.eos_id()}), "");
}

/// The law that lets `prepare` encode a text part by part.
TEST_P(RoundTrip, PartsGiveTheIdsOfTheWhole) {
  const Tokenizer& t = tokenizer(GetParam());
  std::mt19937_64 random(9);
  std::string text = plain_text(6, 150000);
  for (int i = 0; i < 3; ++i) {
    std::string line = random_text(random, 60000);
    std::erase(line, '\n');
    text += line + "\n" + plain_text(7, 3000);
  }
  for (const std::size_t target : {kMaxEncodePiece, kMaxEncodePiece + 17, 3 * kMaxEncodePiece}) {
    std::vector<std::int32_t> ids;
    int parts = 0;
    for (std::string_view rest = text; !rest.empty(); ++parts) {
      const std::size_t cut = encode_cut(rest, target);
      ASSERT_TRUE(cut > 0 && cut <= std::max(target, rest.size()));
      t.encode(rest.substr(0, cut), ids);
      rest.remove_prefix(cut);
    }
    EXPECT_GT(parts, 2);
    EXPECT_EQ(ids, encode(t, text));
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, RoundTrip, ::testing::Values("bytes", "spm"));

TEST(ByteTokenizer, RefusesNulWithItsOffset) {
  expect_failure(ExitCode::data, {"NUL", "offset 2"},
                 [] { encode(tokenizer("bytes"), std::string_view("ab\0c", 4)); });
}

TEST(SpmTokenizer, KeepsNulAndBytesThatAreNoUtf8) {
  const Tokenizer& t = tokenizer("spm");
  std::mt19937_64 random(10);
  for (int i = 0; i < 500; ++i) {
    std::string text;
    for (std::size_t n = random() % 50; n > 0; --n) text.push_back(static_cast<char>(random()));
    ASSERT_EQ(t.decode(encode(t, text)), text);
  }
}

TEST(SpmTokenizer, LearnsPiecesAndSplitsDigits) {
  const Tokenizer& t = tokenizer("spm");
  EXPECT_EQ(t.vocab_size(), 400);
  const std::string text = plain_text(11, 20000);
  EXPECT_LT(encode(t, text).size(), text.size() * 3 / 5);
  for (std::int32_t id = 0; id < t.vocab_size(); ++id) {
    const std::string piece = t.decode({id});
    if (piece.find_first_of("0123456789") != std::string::npos) {
      EXPECT_LE(piece.size(), 2U) << piece;  // at most a blank and a digit
    }
    const std::size_t line_end = piece.find('\n');
    EXPECT_TRUE(line_end == std::string::npos || line_end + 1 == piece.size()) << piece;
  }
}

TEST(SpmTokenizer, ManyCharactersLeaveRoomForLongerPieces) {
  std::string text = plain_text(14, 30000);
  for (char32_t c = 0x4E00; c < 0x5E00; ++c) testing::append_utf8(c, text);
  const auto t = load_tokenizer("spm", train_spm(lines_of(text), {600}));
  std::int64_t words = 0;
  for (std::int32_t id = 0; id < t->vocab_size(); ++id) {
    const std::string piece = t->decode({id});
    words += piece.size() > 1 && static_cast<unsigned char>(piece[0]) < 0x80 ? 1 : 0;
  }
  EXPECT_GT(words, 60);
  EXPECT_EQ(t->decode(encode(*t, text)), text);
}

TEST(SpmTokenizer, TrainsTheSameModelTwice) {
  const auto lines = lines_of(plain_text(12, 20000));
  EXPECT_EQ(train_spm(lines, {300}), train_spm(lines, {300}));
}

TEST(SpmTokenizer, NamesImpossibleVocabularies) {
  const auto lines = lines_of("a b c\n");
  expect_failure(ExitCode::data, {"5000"}, [&] { train_spm(lines, {5000}); });
  expect_failure(ExitCode::usage, {"258"}, [&] { train_spm(lines, {258}); });
  expect_failure(ExitCode::data, {"100"}, [&] { train_spm({}, {1000}); });
}

TEST(SpmTokenizer, RefusesDamagedModels) {
  expect_failure(ExitCode::data, {"SentencePiece"}, [] { load_tokenizer("spm", "no model"); });
  expect_failure(ExitCode::data, {"unknown tokenizer", "bytes, spm"},
                 [] { load_tokenizer("words", ""); });
}

TEST(Utf8, FindsTheFirstInvalidByte) {
  const auto invalid = [](std::string_view text) { return find_invalid_utf8(text); };
  constexpr auto kValid = std::string_view::npos;
  EXPECT_EQ(invalid(""), kValid);
  EXPECT_EQ(invalid("plain ascii text"), kValid);
  EXPECT_EQ(invalid("\xF4\x8F\xBF\xBF\xED\x9F\xBF\xEE\x80\x80"), kValid);
  EXPECT_EQ(invalid("abcdefgh\x80"), 8U);
  EXPECT_EQ(invalid("a\xC0\x80"), 1U);         // overlong
  EXPECT_EQ(invalid("a\xE0\x9F\xBF"), 1U);     // overlong
  EXPECT_EQ(invalid("\xF0\x8F\xBF\xBF"), 0U);  // overlong
  EXPECT_EQ(invalid("ab\xED\xA0\x80"), 2U);    // surrogate
  EXPECT_EQ(invalid("\xF4\x90\x80\x80"), 0U);  // above U+10FFFF
  EXPECT_EQ(invalid("\xF5\x80\x80\x80"), 0U);
  EXPECT_EQ(invalid("xyz\xE4\xB8"), 3U);  // cut short
  std::mt19937_64 random(13);
  for (int i = 0; i < 500; ++i) EXPECT_EQ(invalid(random_text(random, 30)), kValid);
}

TEST(Utf8, BoundariesDoNotSplitCodePoints) {
  const std::string text = "a\xF0\x9F\x91\xA8z";
  const std::vector<std::size_t> expected{0, 1, 1, 1, 1, 5, 6, 6};
  for (std::size_t i = 0; i < expected.size(); ++i) EXPECT_EQ(utf8_boundary(text, i), expected[i]);
}

}  // namespace
}  // namespace arcus
