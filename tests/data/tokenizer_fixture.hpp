#pragma once

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "checkpoints/interop/tokenizer_json.hpp"
#include "src/data/json_tokenizer.hpp"
#include "src/data/utf8.hpp"
#include "tests/data/data_testing.hpp"

namespace arcus::testing {

/// Texts in many scripts, with what tokenizers get wrong: blanks of all kinds, line ends, digits,
/// emoji with joiners, combining marks, long words.
inline const std::vector<std::string>& stress_texts() {
  static const std::vector<std::string> texts{
      "",
      " ",
      "   a  b   c ",
      "\n",
      "\r\n\r\nx\r\n",
      "a \n b\n\n\nc",
      "\t\t x \t\n",
      "don't I'LL we'Ve 'tis",
      "1234567890 12 3.14159",
      "\xEF\xBC\x91\xEF\xBC\x92 \xD9\xA3\xD9\xA4 \xE2\x91\xA1\xE2\x85\xAB",
      "中文字符，混合 English 與數字123。\n第二行",
      "Привет, мир! Ёлка — это 42.",
      "مرحبا بالعالم",
      "\xF0\x9F\x91\xA8\xE2\x80\x8D\xF0\x9F\x91\xA9\xE2\x80\x8D\xF0\x9F\x91\xA7 \xF0\x9F\x91\x8D",
      "a\xC2\xA0"
      "b\xE2\x80\xAF"
      "c\xE3\x80\x80"
      "d\xE2\x80\x8B"
      "e\xEF\xBB\xBF"
      "f\xE1\xA0\x8Eg",
      "e\xCC\x81 \xC3\xA9 o\xCC\xA3\xCC\x82 \xEF\xAC\x81 \xE2\x84\xAB",
      "</s><unk><s><|endoftext|><0x41>[PAD256]",
      std::string(3000, 'x'),
      "abababab " + std::string(500, ' ') + "z",
      "foo(bar[0])->baz(); /* c */ // d\n\tif (x != 0) {\n\t\treturn;\n\t}\n",
      "trailing blanks   \nnext   \n   ",
      "हिन्दी में पाठ, ไทยไม่มีช่องว่าง, 日本語のテキスト。, 한국어 텍스트"};
  return texts;
}

inline std::string training_text() {
  std::string text = plain_text(3, 20000);
  for (int i = 0; i < 40; ++i) {
    for (const std::string& one : stress_texts()) {
      if (one.size() < 1000) text += one + "\n";
    }
  }
  return text;
}

/// Merges learned from the words of `text`, counted in the plainest way: the commonest pair of
/// neighbours, of equally common ones the first.
inline std::vector<std::pair<std::string, std::string>> learn_merges(
    const std::vector<std::vector<std::string>>& words, int count) {
  std::map<std::vector<std::string>, int> counted;
  for (const auto& word : words) ++counted[word];
  std::vector<std::pair<std::vector<std::string>, int>> state(counted.begin(), counted.end());
  std::vector<std::pair<std::string, std::string>> merges;
  for (int i = 0; i < count; ++i) {
    std::map<std::pair<std::string, std::string>, int> pairs;
    for (const auto& [symbols, times] : state) {
      for (std::size_t s = 1; s < symbols.size(); ++s) pairs[{symbols[s - 1], symbols[s]}] += times;
    }
    if (pairs.empty()) break;
    const auto best =
        std::max_element(pairs.begin(), pairs.end(), [](const auto& a, const auto& b) {
          return a.second < b.second;
        })->first;
    merges.push_back(best);
    for (auto& [symbols, times] : state) {
      for (std::size_t s = 1; s < symbols.size(); ++s) {
        if (symbols[s - 1] != best.first || symbols[s] != best.second) continue;
        symbols[s - 1] += symbols[s];
        symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(s));
      }
    }
  }
  return merges;
}

/// What joins the lowest-ranked neighbours, the leftmost first, by looking at all of them each
/// time.
inline std::vector<std::string> merge_slowly(
    std::vector<std::string> symbols,
    const std::vector<std::pair<std::string, std::string>>& merges) {
  std::map<std::pair<std::string, std::string>, std::size_t> ranks;
  for (std::size_t rank = 0; rank < merges.size(); ++rank) ranks[merges[rank]] = rank;
  for (;;) {
    std::size_t best = merges.size();
    std::size_t where = 0;
    for (std::size_t s = 1; s < symbols.size(); ++s) {
      const auto found = ranks.find({symbols[s - 1], symbols[s]});
      if (found != ranks.end() && found->second < best) {
        best = found->second;
        where = s;
      }
    }
    if (best == merges.size()) return symbols;
    symbols[where - 1] += symbols[where];
    symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(where));
  }
}

inline std::vector<std::string> characters_of(std::string_view text) {
  std::vector<std::string> characters;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = next_code_point(text, at);
    characters.emplace_back(text.substr(at, end - at));
    at = end;
  }
  return characters;
}

/// A byte-level vocabulary of a known pre-tokenizer, learned from training_text().
inline JsonVocabulary byte_level_vocabulary(std::string_view pre, int merges = 300) {
  JsonVocabulary vocabulary;
  for (const KnownPreTokenizer& known : known_pre_tokenizers()) {
    if (known.name != pre) continue;
    vocabulary.patterns = known.patterns;
    vocabulary.ignore_merges = known.ignore_merges;
  }
  for (int byte = 0; byte < 256; ++byte) {
    const char c = static_cast<char>(byte);
    vocabulary.tokens.push_back(spell_bytes({&c, 1}));
  }
  JsonVocabulary untrained = vocabulary;
  untrained.tokens.emplace_back("<|endoftext|>");
  const nlohmann::json json = nlohmann::json::parse(tokenizer_json_text(untrained));
  std::vector<std::vector<std::string>> words;
  const std::string text = training_text();
  PreTokenizer("test", json.at("pre_tokenizer"))
      .for_each_word(text, PreTokenizer::Place::first, [&](std::string_view word) {
        words.push_back(characters_of(spell_bytes(word)));
      });
  vocabulary.merges = learn_merges(words, merges);
  for (const auto& [left, right] : vocabulary.merges) {
    const std::string token = left + right;
    if (std::find(vocabulary.tokens.begin(), vocabulary.tokens.end(), token) ==
        vocabulary.tokens.end()) {
      vocabulary.tokens.push_back(token);
    }
  }
  const auto id = static_cast<std::int32_t>(vocabulary.tokens.size());
  vocabulary.tokens.emplace_back("<|endoftext|>");
  vocabulary.added.push_back({id, "<|endoftext|>", /*special=*/true});
  vocabulary.tokens.emplace_back("<tool>");
  vocabulary.added.push_back({id + 1, "<tool>"});
  return vocabulary;
}

/// One with byte fallback, in the way of Llama 2: blanks are U+2581, the text is one word.
inline JsonVocabulary byte_fallback_vocabulary(bool dummy_prefix, int merges = 300) {
  JsonVocabulary vocabulary{.byte_level = false, .dummy_prefix = dummy_prefix, .unk = "<unk>"};
  vocabulary.tokens = {"<unk>", "<s>", "</s>"};
  for (int byte = 0; byte < 256; ++byte) {
    vocabulary.tokens.push_back(fmt::format("<0x{:02X}>", byte));
  }
  std::vector<std::vector<std::string>> words(1);
  for (const std::string& character : characters_of(training_text())) {
    std::string symbol = character;
    if (symbol == " ") symbol = "\xE2\x96\x81";
    const bool starts = symbol != character && !words.back().empty();
    if (starts || character == "\n" || words.back().size() > 12) words.emplace_back();
    words.back().push_back(symbol);
  }
  const auto add = [&](const std::string& token) {
    if (std::find(vocabulary.tokens.begin(), vocabulary.tokens.end(), token) ==
        vocabulary.tokens.end()) {
      vocabulary.tokens.push_back(token);
    }
  };
  vocabulary.merges = learn_merges(words, merges);
  for (const auto& [left, right] : vocabulary.merges) {
    for (const std::string& token : {left, right, left + right}) {
      add(token);
    }
  }
  for (const char* letter : {"a", "b", "c", "\xE2\x96\x81", "1", "2", "中"}) add(letter);
  for (std::int32_t id = 0; id < 3; ++id) {
    vocabulary.added.push_back({id, vocabulary.tokens[id], /*special=*/true});
  }
  return vocabulary;
}

inline JsonTokenizer json_tokenizer(const JsonVocabulary& vocabulary) {
  return JsonTokenizer({{"tokenizer.json", tokenizer_json_text(vocabulary)}});
}

inline std::vector<std::int32_t> encode(const Tokenizer& tokenizer, std::string_view text) {
  std::vector<std::int32_t> ids;
  tokenizer.encode(text, ids);
  return ids;
}

}  // namespace arcus::testing
