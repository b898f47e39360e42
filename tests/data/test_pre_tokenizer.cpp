#include <gtest/gtest.h>

#include <array>
#include <nlohmann/json.hpp>

#include "src/data/normalizer.hpp"
#include "src/data/pre_tokenizer.hpp"
#include "src/data/regex.hpp"
#include "tests/data/data_testing.hpp"

namespace arcus {
namespace {

using nlohmann::json;
using testing::expect_failure;
using Place = PreTokenizer::Place;

// Texts, and the words that the Python package `tokenizers` 0.23 splits them into.
const std::array<const char*, 4> kTexts{
    "I'LL pay 12345 €, it's\r\n\n  中文。x_y\tÀé  ",
    "a\302\240b\343\200\200c\341\240\216d\302\205e e\314\201ह\340\244\277न\340\245\215 'ſ x'S12.5",
    "  if (x != 0) {\n\t\treturn 1000;  // no\n}\n\n",
    "१२३ 👨\342\200\215👩 ①½ fooBAR_Baz/qux\n/ ...\n",
};
struct SplitCase {
  const char* pre;
  std::array<const char*, 4> words;
};
const SplitCase kKnown[] = {
    {"gpt-2",
     {"I|'|LL| pay| 12345| €,| it|'s|\r\n\n | 中文|。|x|_|y|\t|Àé|  ",
      "a|\302\240|b|\343\200\200|c|\341\240\216|d|\302\205|e| "
      "e|\314\201|ह|\340\244\277|न|\340\245\215| '|ſ| x|'|S|12|.|5",
      " | if| (|x| !=| 0|)| {|\n\t|\t|return| 1000|;| | //| no|\n|}|\n\n",
      "१२३| 👨\342\200\215👩| ①½| fooBAR|_|Baz|/|qux|\n|/| ...|\n"}},
    {"qwen2",
     {"I|'LL| pay| |1|2|3|4|5| €,| it|'s|\r\n\n| | 中文|。x|_y|\tÀé|  ",
      "a|\302\240b|\343\200\200c|\341\240\216d|\302\205e| e|\314\201ह|\340\244\277न|\340\245\215| "
      "'|ſ| x|'S|1|2|.|5",
      " | if| (|x| !=| |0|)| {\n|\t|\treturn| |1|0|0|0|;| | //| no|\n|}\n\n",
      "१|२|३| 👨\342\200\215👩| |①|½| fooBAR|_Baz|/qux|\n|/| ...\n"}},
    {"llama-bpe",
     {"I|'LL| pay| |123|45| €,| it|'s|\r\n\n| | 中文|。x|_y|\tÀé|  ",
      "a|\302\240b|\343\200\200c|\341\240\216d|\302\205e| e|\314\201ह|\340\244\277न|\340\245\215| "
      "'|ſ| x|'S|12|.|5",
      " | if| (|x| !=| |0|)| {\n|\t|\treturn| |100|0|;| | //| no|\n|}\n\n",
      "१२३| 👨\342\200\215👩| |①½| fooBAR|_Baz|/qux|\n|/| ...\n"}},
    {"gpt-4o",
     {"I'LL| pay| |123|45| €,| it's|\r\n\n| | 中文|。x|_y|\tÀé|  ",
      "a|\302\240b|\343\200\200c|\341\240\216d|\302\205e| e\314\201ह\340\244\277न\340\245\215| "
      "'|ſ| x'S|12|.|5",
      " | if| (|x| !=| |0|)| {\n|\t|\treturn| |100|0|;| | //| no|\n|}\n\n",
      "१२३| 👨\342\200\215👩| |①½| foo|BAR|_Baz|/qux|\n|/| ...\n"}},
    {"bailingmoe2",
     {"I|'LL| pay| |1|2|3|4|5| €,| it|'s|\r\n\n| | 中文|。x|_y|\tÀé|  ",
      "a|\302\240b|\343\200\200c|\341\240\216d|\302\205e| e|\314\201ह|\340\244\277न|\340\245\215| "
      "'|ſ| x|'S|1|2|.|5",
      " | if| (|x| !=| |0|)| {\n|\t|\treturn| |1|0|0|0|;| | //| no|\n|}\n\n",
      "१|२|३| 👨\342\200\215👩| |①|½| fooBAR|_Baz|/qux|\n|/| ...\n"}},
    {"deepseek-v3",
     {"I|'LL| pay| |123|45| €,| it|'s|\r\n\n|  |中文|。|x|_y|\tÀé|  ",
      "a|\302\240b|\343\200\200c|\341\240\216d|\302\205e| e\314\201ह\340\244\277न\340\245\215| "
      "'|ſ| x|'S|12|.|5",
      " | if| (|x| !=| |0|)| {\n|\t|\treturn| |100|0|;| | //| no|\n|}\n\n",
      "१२३| 👨|\342\200\215|👩| |①½| fooBAR|_Baz|/qux|\n|/| ...\n"}},
    {"deepseek-coder",
     {"I|'|LL| pay| |1|2|3|4|5| |€|,| it|'|s|\r|\n|\n| | |中文|。|x|_|y|\tÀé|  ",
      "a|\302\240b|\343\200\200|c|\341\240\216|d|\302\205e| "
      "e|\314\201|ह|\340\244\277|न|\340\245\215| '|ſ| x|'|S|1|2|.|5",
      " | if| (|x| !|= |0|)| {|\n|\t|\treturn| |1|0|0|0|;| | //| no|\n|}|\n|\n",
      "१|२|३| 👨|\342\200\215|👩 |①|½| fooBAR|_|Baz|/|qux|\n|/| ...|\n"}},
    {"smollm",
     {"I|'|LL| pay| |1|2|3|4|5| €,| it|'s|\r\n\n | 中文|。|x|_|y|\t|Àé|  ",
      "a|\302\240|b|\343\200\200|c|\341\240\216|d|\302\205|e| "
      "e|\314\201|ह|\340\244\277|न|\340\245\215| '|ſ| x|'|S|1|2|.|5",
      " | if| (|x| !=| |0|)| {|\n\t|\t|return| |1|0|0|0|;| | //| no|\n|}|\n\n",
      "१|२|३| 👨\342\200\215👩| |①|½| fooBAR|_|Baz|/|qux|\n|/| ...|\n"}},
};
const SplitCase kOthers[] = {
    {R"J({"type":"Split","pattern":{"Regex":" ?[^(\\s|[.,!?…。，、।۔،])]+"},"behavior":"Isolated","invert":false})J",
     {"I'LL| pay| 12345| €|,| it's|\r\n\n | 中文|。|x_y|\t|Àé|  ",
      "a|\302\240|b|\343\200\200|c\341\240\216d|\302\205|e| e\314\201ह\340\244\277न\340\245\215| "
      "'ſ| x'S12|.|5",
      " | if| (|x| !|=| 0|)| {|\n\t\t|return| 1000;| | //| no|\n|}|\n\n",
      "१२३| 👨\342\200\215👩| ①½| fooBAR_Baz/qux|\n|/| ...\n"}},
    {R"J({"type":"Sequence","pretokenizers":[{"type":"Split","pattern":{"Regex":"\\d{1,3}(?=(?:\\d{3})*\\b)"},"behavior":"Isolated","invert":false},{"type":"ByteLevel","add_prefix_space":false,"use_regex":true}]})J",
     {"I|'|LL| pay| |12|345| €,| it|'s|\r\n\n | 中文|。|x|_|y|\t|Àé|  ",
      "a|\302\240|b|\343\200\200|c|\341\240\216|d|\302\205|e| "
      "e|\314\201|ह|\340\244\277|न|\340\245\215| '|ſ| x|'|S|12|.|5",
      " | if| (|x| !=| |0|)| {|\n\t|\t|return| |1|000|;| | //| no|\n|}|\n\n",
      "१२३| 👨\342\200\215👩| ①½| fooBAR|_|Baz|/|qux|\n|/| ...|\n"}},
    {R"J({"type":"Split","pattern":{"Regex":"\\b\\w+\\b|\\W"},"behavior":"Isolated","invert":false})J",
     {"I|'|LL| |pay| |12345| |€|,| |it|'|s|\r|\n|\n| | |中文|。|x_y|\t|Àé| | ",
      "a|\302\240|b|\343\200\200|c|\341\240\216|d|\302\205|e| "
      "|e\314\201ह\340\244\277न\340\245\215| |'|ſ| |x|'|S12|.|5",
      " | |if| |(|x| |!|=| |0|)| |{|\n|\t|\t|return| |1000|;| | |/|/| |no|\n|}|\n|\n",
      "१२३| |👨|\342\200\215|👩| |①|½| |fooBAR_Baz|/|qux|\n|/| |.|.|.|\n"}},
    {R"J({"type":"Split","pattern":{"Regex":"\\s"},"behavior":"MergedWithPrevious","invert":false})J",
     {"I'LL |pay |12345 |€, |it's\r|\n|\n| | |中文。x_y\t|Àé | ",
      "a\302\240|b\343\200\200|c\341\240\216d\302\205|e |e\314\201ह\340\244\277न\340\245\215 |'ſ "
      "|x'S12.5",
      " | |if |(x |!= |0) |{\n|\t|\t|return |1000; | |// |no\n|}\n|\n",
      "१२३ |👨\342\200\215👩 |①½ |fooBAR_Baz/qux\n|/ |...\n"}},
    {R"J({"type":"Split","pattern":{"Regex":"\\s"},"behavior":"MergedWithNext","invert":false})J",
     {"I'LL| pay| 12345| €,| it's|\r|\n|\n| | 中文。x_y|\tÀé| | ",
      "a|\302\240b|\343\200\200c\341\240\216d|\302\205e| e\314\201ह\340\244\277न\340\245\215| 'ſ| "
      "x'S12.5",
      " | if| (x| !=| 0)| {|\n|\t|\treturn| 1000;| | //| no|\n}|\n|\n",
      "१२३| 👨\342\200\215👩| ①½| fooBAR_Baz/qux|\n/| ...|\n"}},
    {R"J({"type":"Sequence","pretokenizers":[{"type":"Split","pattern":{"Regex":"\\s"},"behavior":"Contiguous","invert":false},{"type":"Split","pattern":{"Regex":"[a-z]+"},"behavior":"Removed","invert":false}]})J",
     {"I'LL| | |12345| |€,| |'|\r\n\n  |中文。|_|\t|Àé|  ",
      "\302\240|\343\200\200|\341\240\216|\302\205| |\314\201ह\340\244\277न\340\245\215| |'ſ| "
      "|'S12.5",
      "  | |(| |!=| |0)| |{|\n\t\t| |1000;|  |//| |\n|}|\n\n",
      "१२३| |👨\342\200\215👩| |①½| |BAR_B|/|\n|/| |...|\n"}},
    {R"J({"type":"Split","pattern":{"String":" "},"behavior":"MergedWithNext","invert":false})J",
     {"I'LL| pay| 12345| €,| it's\r\n\n| | 中文。x_y\tÀé| | ",
      "a\302\240b\343\200\200c\341\240\216d\302\205e| e\314\201ह\340\244\277न\340\245\215| 'ſ| "
      "x'S12.5",
      " | if| (x| !=| 0)| {\n\t\treturn| 1000;| | //| no\n}\n\n",
      "१२३| 👨\342\200\215👩| ①½| fooBAR_Baz/qux\n/| ...\n"}},
    {R"J({"type":"ByteLevel","add_prefix_space":true,"use_regex":true})J",
     {" I|'|LL| pay| 12345| €,| it|'s|\r\n\n | 中文|。|x|_|y|\t|Àé|  ",
      " a|\302\240|b|\343\200\200|c|\341\240\216|d|\302\205|e| "
      "e|\314\201|ह|\340\244\277|न|\340\245\215| '|ſ| x|'|S|12|.|5",
      " | if| (|x| !=| 0|)| {|\n\t|\t|return| 1000|;| | //| no|\n|}|\n\n",
      " १२३| 👨\342\200\215👩| ①½| fooBAR|_|Baz|/|qux|\n|/| ...|\n"}},
    {R"J({"type":"Sequence","pretokenizers":[{"type":"Punctuation","behavior":"Contiguous"},{"type":"ByteLevel","add_prefix_space":false,"use_regex":true}]})J",
     {"I|'|LL| pay| 12345| €|,| it|'|s|\r\n\n | 中文|。|x|_|y|\t|Àé|  ",
      "a|\302\240|b|\343\200\200|c|\341\240\216|d|\302\205|e| "
      "e|\314\201|ह|\340\244\277|न|\340\245\215| |'|ſ| x|'|S|12|.|5",
      " | if| |(|x| |!=| 0|)| |{|\n\t|\t|return| 1000|;|  |//| no|\n|}|\n\n",
      "१२३| 👨\342\200\215👩| ①½| fooBAR|_|Baz|/|qux|\n|/| |...|\n"}},
};

std::string split(const PreTokenizer& pre, std::string_view text, Place place = Place::first) {
  std::string words;
  bool first = true;
  pre.for_each_word(text, place, [&](std::string_view word) {
    if (!first) words += '|';
    words += word;
    first = false;
  });
  return words;
}

TEST(PreTokenizer, KnownOnesSplitAsTheirPythonOriginals) {
  for (const SplitCase& one : kKnown) {
    json steps = json::array();
    for (const KnownPreTokenizer& known : known_pre_tokenizers()) {
      if (known.name != one.pre) continue;
      for (const std::string_view pattern : known.patterns) {
        steps.push_back({{"type", "Split"},
                         {"pattern", {{"Regex", std::string(pattern)}}},
                         {"behavior", "Isolated"},
                         {"invert", false}});
      }
    }
    ASSERT_FALSE(steps.empty()) << one.pre;
    const PreTokenizer pre("test", {{"type", "Sequence"}, {"pretokenizers", steps}});
    for (std::size_t i = 0; i < kTexts.size(); ++i) {
      EXPECT_EQ(split(pre, kTexts[i]), one.words[i]) << one.pre;
    }
  }
}

TEST(PreTokenizer, OtherStepsSplitAsTheirPythonOriginals) {
  for (const SplitCase& one : kOthers) {
    const PreTokenizer pre("test", json::parse(one.pre));
    for (std::size_t i = 0; i < kTexts.size(); ++i) {
      EXPECT_EQ(split(pre, kTexts[i]), one.words[i]) << one.pre;
    }
  }
}

TEST(PreTokenizer, MetaspacePutsABlankInFrontAsItsSchemeSays) {
  const auto words = [](const char* scheme, bool splits, const char* text, Place place) {
    const PreTokenizer pre("test", {{"type", "Metaspace"},
                                    {"replacement", "▁"},
                                    {"prepend_scheme", scheme},
                                    {"split", splits}});
    return split(pre, text, place);
  };
  EXPECT_EQ(words("always", true, "a  b c", Place::later), "▁a|▁|▁b|▁c");
  EXPECT_EQ(words("always", true, " a", Place::later), "▁a");
  EXPECT_EQ(words("first", true, "a b", Place::first), "▁a|▁b");
  EXPECT_EQ(words("first", true, "a b", Place::later), "a|▁b");
  EXPECT_EQ(words("always", true, "a b", Place::continued), "a|▁b");
  EXPECT_EQ(words("never", false, "a b", Place::first), "a▁b");
}

TEST(PreTokenizer, NamesWhatItDoesNotDo) {
  const auto refuse = [](const char* text, const std::vector<std::string>& words) {
    expect_failure(ExitCode::data, words, [&] { PreTokenizer("file.json", json::parse(text)); });
  };
  refuse(R"({"type": "BertPreTokenizer"})", {"file.json", "pre_tokenizer", "BertPreTokenizer"});
  refuse(R"({"type": "Whitespace"})", {"Whitespace"});
  refuse(R"({"type": 3})", {"type"});
  refuse(R"([1, 2])", {"type"});
  refuse(R"({"type": "Sequence"})", {"pretokenizers"});
  refuse(R"({"type": "Split", "pattern": "x"})", {"pattern"});
  refuse(R"({"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Sideways"})", {"Sideways"});
  refuse(R"({"type": "Split", "pattern": {"Regex": "(a"}})", {"(a", "parenthes"});
  refuse(R"({"type": "Metaspace", "replacement": "__"})", {"replacement"});
  refuse(R"({"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}, {"type": "Digits"}]})",
         {"after ByteLevel"});
}

std::string matches(const std::string& pattern, std::string_view text) {
  std::string found;
  Regex(pattern).for_each_match(text, [&](std::size_t begin, std::size_t end) {
    found += fmt::format("<{}>", text.substr(begin, end - begin));
  });
  return found;
}

TEST(Regex, MeansWhatOnigurumaMeans) {
  EXPECT_EQ(matches(R"(\s+)", "a \t\xC2\xA0\xE1\xA0\x8E"), "< \t\xC2\xA0>");  // U+180E is no space
  EXPECT_EQ(matches(R"(\w+)", "a_\xCC\x81-b"), "<a_\xCC\x81><b>");            // marks are word
  EXPECT_EQ(matches(R"(\d+)", "1\xD9\xA3x"), "<1\xD9\xA3>");
  EXPECT_EQ(matches("(?i:'S)", "'s'S'\xC5\xBF"), "<'s><'S><'\xC5\xBF>");  // long s
  EXPECT_EQ(matches(R"([^(\s|[.,])]+)", "ab (c.d"), "<ab><c><d>");        // a class in a class
  EXPECT_EQ(matches(R"(\p{Han}+|\p{^L})", "中文a1"), "<中文><1>");
  EXPECT_EQ(matches("a{,2}b|x{y", "aabx{y"), "<aab><x{y>");
  EXPECT_EQ(matches("(?=b)|c", "abc"), "<><c>");
  EXPECT_EQ(matches("x*", "axxb"), "<><xx><>");
  EXPECT_EQ(matches(R"(\u4E2d\x{6587}\x41)", "中文A"), "<中文A>");
  EXPECT_EQ(matches("^.$", "a\nbc\nd"), "<a><d>");
  EXPECT_EQ(matches(escape_regex("a.*[b]\n中"), "a.*[b]\n中"), "<a.*[b]\n中>");
}

TEST(Regex, RefusesWhatWouldMeanSomethingElse) {
  for (const char* pattern :
       {R"(\h)",  R"(\R)",   R"((a)\1)", "[[:alpha:]]", "[a&&b]",  "[a[^b]]",   "(?<n>a)", "(?m:a)",
        "a(?i)b", "a{1,2}+", "a{2}?",    R"([\W])",     R"(\xE9)", "(*ACCEPT)", "(?R)",    "[]",
        "[a",     "\\",      R"(\p{L)",  R"(\p{9})",    "(?#x)",   R"(\Q)"}) {
    expect_failure(ExitCode::data, {"regular expression"}, [&] { (void)Regex(pattern); });
  }
}

TEST(Regex, PatternsThatBacktrackWithoutEndAreAnError) {
  const std::string text = std::string(60, 'a') + "!";
  expect_failure(ExitCode::data, {"(a+)+$", "match limit"},
                 [&] { Regex("(a+)+$").for_each_match(text, [](auto, auto) {}); });
  // Long matches are none: a megabyte of one word.
  const std::string word(1 << 20, 'a');
  EXPECT_EQ(matches(R"(\p{L}+)", word).size(), word.size() + 2);
  EXPECT_EQ(matches("(?:a|b)+", word.substr(0, 5000)).size(), 5002U);
}

TEST(Normalizer, ComposesPrependsAndReplaces) {
  const Normalizer nfc("test", {{"type", "NFC"}});
  EXPECT_EQ(nfc.apply("e\xCC\x81 \xE2\x84\xAB \xE1\x84\x80\xE1\x85\xA1\xE1\x86\xA8 a", false),
            "\xC3\xA9 \xC3\x85 \xEA\xB0\x81 a");
  EXPECT_EQ(nfc.apply(std::string_view("a\0b", 3), false), std::string_view("a\0b", 3));
  const Normalizer llama("test", json::parse(R"({"type": "Sequence", "normalizers": [
      {"type": "Prepend", "prepend": "▁"},
      {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]})"));
  EXPECT_EQ(llama.apply("a  b", false), "▁a▁▁b");
  EXPECT_EQ(llama.apply("a  b", true), "a▁▁b");
  EXPECT_EQ(llama.apply("", false), "");
  EXPECT_TRUE(llama.is_local());
  for (const char* type : {"Lowercase", "NFKC", "BertNormalizer", "Precompiled", "StripAccents"}) {
    expect_failure(ExitCode::data, {"file.json", "normalizer", type, "not supported"}, [&] {
      Normalizer("file.json", {{"type", type}});
    });
  }
  expect_failure(ExitCode::data, {"Replace"}, [] {
    Normalizer("test",
               json::parse(R"({"type": "Replace", "pattern": {"Regex": "a"}, "content": ""})"));
  });
}

}  // namespace
}  // namespace arcus
