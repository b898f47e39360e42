#include <gtest/gtest.h>

#include <thread>

#include "src/data/dataset.hpp"
#include "src/data/utf8.hpp"
#include "tests/data/tokenizer_fixture.hpp"

namespace arcus {
namespace {

using nlohmann::json;
using testing::byte_fallback_vocabulary;
using testing::byte_level_vocabulary;
using testing::encode;
using testing::expect_failure;
using testing::json_tokenizer;
using testing::random_text;
using testing::stress_texts;

/// A tokenizer, and the vocabulary that it was made of.
struct Case {
  std::string name;
  JsonVocabulary vocabulary;
  JsonTokenizer tokenizer;
  Case(std::string n, JsonVocabulary v)
      : name(std::move(n)), vocabulary(std::move(v)), tokenizer(json_tokenizer(vocabulary)) {}
};

const std::vector<std::unique_ptr<Case>>& cases() {
  static const auto all = [] {
    std::vector<std::unique_ptr<Case>> list;
    for (const char* pre : {"gpt-2", "qwen2", "llama-bpe", "deepseek-v3"}) {
      list.push_back(std::make_unique<Case>(pre, byte_level_vocabulary(pre)));
    }
    list.push_back(std::make_unique<Case>("plain", byte_fallback_vocabulary(false)));
    list.push_back(std::make_unique<Case>("prefix", byte_fallback_vocabulary(true)));
    return list;
  }();
  return all;
}

/// The ids of a text in the slowest way: words as the pre-tokenizer splits them (which has tests of
/// its own), then the merges.
std::vector<std::int32_t> encode_slowly(const Case& one, const std::string& text) {
  const json root = json::parse(tokenizer_json_text(one.vocabulary));
  const PreTokenizer pre("test", root.at("pre_tokenizer"));
  const Normalizer normalizer("test", root.at("normalizer"));
  std::vector<std::int32_t> ids;
  const auto& tokens = one.vocabulary.tokens;
  const auto id_of = [&](const std::string& token) {
    const auto found = std::find(tokens.begin(), tokens.end(), token);
    return found == tokens.end() ? -1 : static_cast<std::int32_t>(found - tokens.begin());
  };
  pre.for_each_word(
      normalizer.apply(text, false), PreTokenizer::Place::first, [&](std::string_view word) {
        const bool bytes = one.vocabulary.byte_level;
        const std::string spelled = bytes ? spell_bytes(word) : std::string(word);
        if (one.vocabulary.ignore_merges && id_of(spelled) >= 0) {
          ids.push_back(id_of(spelled));
          return;
        }
        for (const std::string& symbol :
             testing::merge_slowly(testing::characters_of(spelled), one.vocabulary.merges)) {
          if (const std::int32_t id = id_of(symbol); id >= 0) {
            ids.push_back(id);
            continue;
          }
          for (const char c : symbol) {
            ids.push_back(id_of(fmt::format("<0x{:02X}>", static_cast<unsigned char>(c))));
          }
        }
      });
  return ids;
}

/// Texts that nothing but blanks is written in another way for, and short enough to do slowly.
std::vector<std::string> plain_texts() {
  std::vector<std::string> texts;
  for (const std::string& text : stress_texts()) {
    if (text.size() < 500 && text.find("<tool>") == std::string::npos) texts.push_back(text);
  }
  std::mt19937_64 random(1);
  for (int i = 0; i < 60; ++i) texts.push_back(random_text(random, random() % 30));
  texts.push_back(testing::plain_text(9, 400));
  return texts;
}

TEST(JsonTokenizer, GivesTheIdsOfTheSlowWay) {
  for (const auto& one : cases()) {
    for (const std::string& text : plain_texts()) {
      ASSERT_EQ(encode(one->tokenizer, text), encode_slowly(*one, text))
          << one->name << ": " << text;
    }
  }
}

/// What a tokenizer gives back: U+2581 is a blank to those that write blanks so.
std::string expected_back(const Case& one, const std::string& text) {
  return one.vocabulary.byte_level ? text : with_blanks(text);
}

void check_laws(const Case& one, const std::string& text) {
  const Tokenizer& t = one.tokenizer;
  const auto ids = encode(t, text);
  const std::string back = expected_back(one, text);
  ASSERT_EQ(t.decode(ids), back) << one.name;
  std::string joined;
  std::int64_t bytes = 0;
  for (const std::int32_t id : ids) {
    ASSERT_NE(id, t.eos_id());
    ASSERT_TRUE(id >= 0 && id < t.vocab_size());
    joined += t.token_text(id);
    bytes += t.token_bytes(id);
  }
  // The blank in front counts, but where a byte that is no UTF-8 comes first.
  const bool prefixed =
      one.vocabulary.dummy_prefix && !text.empty() && find_invalid_utf8(text) != 0;
  ASSERT_EQ(joined, (prefixed ? " " : "") + back) << one.name;
  ASSERT_EQ(bytes, static_cast<std::int64_t>(joined.size()));
}

TEST(JsonTokenizer, LosesNothing) {
  std::mt19937_64 random(2);
  for (const auto& one : cases()) {
    for (const std::string& text : stress_texts()) check_laws(*one, text);
    for (int i = 0; i < 300; ++i) check_laws(*one, random_text(random, random() % 40));
  }
}

TEST(JsonTokenizer, KeepsBytesThatAreNoUtf8) {
  std::mt19937_64 random(3);
  for (const auto& one : cases()) {
    for (int i = 0; i < 300; ++i) {
      std::string text;
      for (std::size_t n = random() % 40; n > 0; --n) text.push_back(static_cast<char>(random()));
      ASSERT_EQ(one->tokenizer.decode(encode(one->tokenizer, text)), expected_back(*one, text));
    }
  }
}

TEST(JsonTokenizer, LongWordsTakeNoLongerThanTheyShould) {
  for (const auto& one : cases()) {
    for (const std::string& text :
         {std::string(1 << 20, 'x'), std::string(1 << 20, ' '), std::string(300000, '1')}) {
      ASSERT_EQ(one->tokenizer.decode(encode(one->tokenizer, text)), text);
    }
  }
}

TEST(JsonTokenizer, PartsGiveTheIdsOfTheWhole) {
  std::mt19937_64 random(4);
  std::string text = testing::plain_text(6, 30000);
  for (int i = 0; i < 300; ++i) {
    text += random_text(random, 50) + stress_texts()[random() % stress_texts().size()];
    if (i % 3 == 0) text.push_back(static_cast<char>(random()));
  }
  for (const auto& one : cases()) {
    for (const std::size_t target : {100, 5000, 70000}) {
      std::vector<std::int32_t> ids;
      int parts = 0;
      for (std::string_view rest = text; !rest.empty(); ++parts) {
        const std::size_t cut = one->tokenizer.cut(rest, target);
        ASSERT_TRUE(cut > 0 && cut <= rest.size());
        const std::string_view part = rest.substr(0, cut);
        parts == 0 ? one->tokenizer.encode(part, ids) : one->tokenizer.encode_rest(part, ids);
        rest.remove_prefix(cut);
      }
      EXPECT_GT(parts, static_cast<int>(text.size() / target / 20)) << one->name;
      EXPECT_GT(parts, 1);
      EXPECT_EQ(ids, encode(one->tokenizer, text)) << one->name << " " << target;
    }
  }
}

TEST(JsonTokenizer, AnUnknownPatternIsNotCut) {
  json root = json::parse(tokenizer_json_text(byte_level_vocabulary("gpt-2", 20)));
  root["pre_tokenizer"] = json::parse(R"({"type": "Sequence", "pretokenizers": [
      {"type": "Split", "pattern": {"Regex": "\\w+ \\w+|."}, "behavior": "Isolated"},
      {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}]})");
  const JsonTokenizer tokenizer({{"tokenizer.json", root.dump()}});
  const std::string text = testing::plain_text(1, 3000);
  EXPECT_EQ(tokenizer.cut(text, 1000), text.size());
  EXPECT_EQ(tokenizer.decode(encode(tokenizer, text)), text);
}

TEST(JsonTokenizer, ThreadsGetTheSameIds) {
  const Case& one = *cases().front();
  std::vector<std::string> texts = stress_texts();
  std::vector<std::vector<std::vector<std::int32_t>>> ids(4);
  std::vector<std::thread> threads;
  for (auto& mine : ids) {
    threads.emplace_back([&] {
      for (int round = 0; round < 5; ++round) {
        mine.clear();
        for (const std::string& text : texts) mine.push_back(encode(one.tokenizer, text));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& mine : ids) EXPECT_EQ(mine, ids.front());
}

TEST(JsonTokenizer, SpecialTokensAreTextUnlessMarked) {
  const Case& one = *cases().front();
  const Tokenizer& t = one.tokenizer;
  const std::string text = "a<|endoftext|>b<tool>c";
  const auto plain = encode(t, text);
  EXPECT_EQ(std::count(plain.begin(), plain.end(), t.eos_id()), 0);
  EXPECT_EQ(std::count(plain.begin(), plain.end(), t.eos_id() + 1), 1);  // <tool> is not special
  std::vector<std::int32_t> marked;
  t.encode_marked(text, marked);
  EXPECT_EQ(std::count(marked.begin(), marked.end(), t.eos_id()), 1);
  EXPECT_EQ(t.decode(marked), "ab<tool>c");
  EXPECT_EQ(t.decode(plain), text);
}

TEST(JsonTokenizer, AddedTokensTakeBlanksAndStandAloneAsTheySay) {
  JsonVocabulary vocabulary = byte_level_vocabulary("gpt-2", 20);
  const auto add = [&](AddedToken token) {
    token.id = static_cast<std::int32_t>(vocabulary.tokens.size());
    vocabulary.tokens.push_back(token.content);
    vocabulary.added.push_back(token);
    return token.id;
  };
  const auto left = add({.content = "<l>", .lstrip = true});
  const auto right = add({.content = "<r>", .rstrip = true});
  const auto word = add({.content = "word", .single_word = true});
  const auto longer = add({.content = "<l>><"});
  const JsonTokenizer t = json_tokenizer(vocabulary);
  const auto x = encode(t, "x").front();
  using Ids = std::vector<std::int32_t>;
  EXPECT_EQ(encode(t, "x \t\n<l>x"), (Ids{x, left, x}));
  EXPECT_EQ(encode(t, "x<r> \xC2\xA0x"), (Ids{x, right, x}));
  EXPECT_EQ(encode(t, "<l>><x"), (Ids{longer, x}));
  EXPECT_EQ(encode(t, "<r>  <l>"), (Ids{right, left}));
  const auto has_word = [&](const char* text) {
    const Ids ids = encode(t, text);
    return std::count(ids.begin(), ids.end(), word) == 1;
  };
  EXPECT_TRUE(has_word("word") && has_word("a word, b") && has_word("(word)"));
  EXPECT_FALSE(has_word("words") || has_word("aword") || has_word("word_") ||
               has_word("\xC3\xA9word"));
}

TEST(JsonTokenizer, SurvivesSerializationByteForByte) {
  TokenizerFiles files{{"tokenizer.json", tokenizer_json_text(byte_level_vocabulary("qwen2", 50))},
                       {"tokenizer_config.json", R"({"eos_token": {"content": "<|endoftext|>"}})"},
                       {"chat_template.jinja", std::string("any\0\nbytes\xff", 11)}};
  const JsonTokenizer t(files);
  const auto again = load_tokenizer(t.kind(), t.serialized());
  EXPECT_EQ(again->serialized(), t.serialized());
  EXPECT_EQ(unpack_tokenizer_files(t.serialized()), files);
  EXPECT_EQ(again->hash(), t.hash());
  EXPECT_EQ(encode(*again, "a b c"), encode(t, "a b c"));
}

/// Documents longer than a part, and short ones; train and valid together are all of the text.
TEST(JsonTokenizer, PrepareWritesTheIdsOfWholeDocuments) {
  testing::TempDir dir;
  std::vector<std::string> documents;
  for (int i = 0; i < 6; ++i) documents.push_back(testing::plain_text(i, i == 0 ? 700000 : 3000));
  PrepareOptions options;
  for (std::size_t i = 0; i < documents.size(); ++i) {
    dir.write(fmt::format("text/{}.txt", i), documents[i]);
  }
  options.domains = {{.name = "a", .paths = {(dir / "text").string()}}};
  options.out = dir / "data";
  options.valid_fraction = 0.001;
  options.force = true;
  for (const auto& one : cases()) {
    options.tokenizer = "of a test";
    options.given = load_tokenizer(one->tokenizer.kind(), one->tokenizer.serialized());
    prepare(options);
    const TokenDataset data = TokenDataset::open(options.out, /*verify=*/true);
    EXPECT_EQ(data.tokenizer().serialized(), one->tokenizer.serialized());
    std::vector<std::string> found;
    for (const Split split : kSplits) {
      const TokenFile& file = data.file(0, split);
      for (std::int64_t d = 0; d < file.num_documents(); ++d) {
        const auto [begin, end] = file.document_range(d);
        std::vector<std::int32_t> ids(static_cast<std::size_t>(end - begin));
        file.read(begin, ids);
        ASSERT_EQ(ids.back(), one->tokenizer.eos_id());
        ids.pop_back();
        found.push_back(data.tokenizer().decode(ids));
        ASSERT_EQ(ids, encode(one->tokenizer, found.back())) << one->name;
      }
    }
    std::sort(found.begin(), found.end());
    std::vector<std::string> expected = documents;
    std::sort(expected.begin(), expected.end());
    EXPECT_EQ(found, expected);
  }
}

TEST(JsonTokenizer, BothWaysToWriteMergesAreRead) {
  json root = json::parse(tokenizer_json_text(byte_level_vocabulary("gpt-2", 100)));
  const JsonTokenizer pairs({{"tokenizer.json", root.dump()}});
  for (json& merge : root["model"]["merges"]) {
    merge = merge[0].get<std::string>() + " " + merge[1].get<std::string>();
  }
  const JsonTokenizer lines({{"tokenizer.json", root.dump()}});
  for (const std::string& text : stress_texts()) {
    EXPECT_EQ(encode(pairs, text), encode(lines, text));
  }
}

TEST(JsonTokenizer, TheEndOfATextIsNamedOrFound) {
  const std::string text = tokenizer_json_text(byte_level_vocabulary("gpt-2", 5));
  const auto eos = [&](const char* config) {
    const JsonTokenizer t({{"tokenizer.json", text}, {"tokenizer_config.json", config}});
    return t.files().empty() ? -1 : t.eos_id();
  };
  const std::int32_t usual = eos("{}");
  EXPECT_EQ(eos(R"({"eos_token": "<tool>"})"), usual + 1);
  EXPECT_EQ(eos(R"({"eos_token": null})"), usual);
  expect_failure(ExitCode::data, {"eos_token", "nowhere"},
                 [&] { eos(R"({"eos_token": "nowhere"})"); });
  expect_failure(ExitCode::data, {"tokenizer_config.json", "eos_token"},
                 [&] { eos(R"({"eos_token": 3})"); });
  json root = json::parse(text);
  for (json& token : root["added_tokens"]) {
    if (token["special"] == true) token["content"] = "<|stop|>";
  }
  expect_failure(ExitCode::data, {"no token ends a text", "eos_token"}, [&] {
    JsonTokenizer({{"tokenizer.json", root.dump()}});
  });
}

TEST(JsonTokenizer, ATextWithAByteThatHasNoTokenIsRefused) {
  JsonVocabulary vocabulary = byte_level_vocabulary("gpt-2", 0);
  vocabulary.tokens[0] = "<none>";
  const JsonTokenizer t = json_tokenizer(vocabulary);
  expect_failure(ExitCode::data, {"0x00"}, [&] { encode(t, std::string_view("a\0", 2)); });
}

/// A tokenizer.json, changed.
std::string with(const std::function<void(json&)>& change) {
  static const std::string text = tokenizer_json_text(byte_level_vocabulary("gpt-2", 30));
  json root = json::parse(text);
  change(root);
  return root.dump();
}

TEST(JsonTokenizer, NamesWhatIsWrongOrNotSupported) {
  const auto refuse = [](const std::vector<std::string>& words,
                         const std::function<void(json&)>& change) {
    expect_failure(ExitCode::data, words, [&] {
      JsonTokenizer({{"tokenizer.json", with(change)}});
    });
  };
  JsonTokenizer({{"tokenizer.json", with([](json&) {})}});
  refuse({"model type", "Unigram"}, [](json& j) { j["model"]["type"] = "Unigram"; });
  refuse({"tokenizer.json", "model"}, [](json& j) { j.erase("model"); });
  refuse({"vocab"}, [](json& j) { j["model"].erase("vocab"); });
  refuse({"vocab"}, [](json& j) { j["model"]["vocab"] = json::array({1}); });
  refuse({"merges"}, [](json& j) { j["model"]["merges"] = 4; });
  refuse({"merge 0"}, [](json& j) { j["model"]["merges"][0] = json::array({"a"}); });
  refuse({"merge 1"}, [](json& j) { j["model"]["merges"][1] = "a b c"; });
  refuse({"merge 2", "nowhere"}, [](json& j) { j["model"]["merges"][2] = {"nowhere", "b"}; });
  refuse({"merge 2"}, [](json& j) { j["model"]["merges"][2] = {"", "a"}; });
  refuse({"merge 2", "zq"}, [](json& j) { j["model"]["merges"][2] = {"zq", "zq"}; });
  refuse({"id 4000000000"}, [](json& j) { j["model"]["vocab"]["a"] = 4000000000; });
  refuse({"id -1"}, [](json& j) { j["model"]["vocab"]["a"] = -1; });
  refuse({"id 1.5"}, [](json& j) { j["model"]["vocab"]["a"] = 1.5; });
  refuse({"and another have id 7"}, [](json& j) { j["model"]["vocab"]["a"] = 7; });
  refuse({"added token", "vocabulary"}, [](json& j) { j["added_tokens"][0]["content"] = "a"; });
  refuse({"and another have id 7"}, [](json& j) { j["added_tokens"][1]["id"] = 7; });
  refuse({"listed twice"}, [](json& j) { j["added_tokens"].push_back(j["added_tokens"][0]); });
  refuse({"added_tokens"}, [](json& j) { j["added_tokens"] = "none"; });
  refuse({"special"}, [](json& j) { j["added_tokens"][0]["special"] = 1; });
  refuse({"dropout"}, [](json& j) { j["model"]["dropout"] = 0.1; });
  refuse({"end_of_word_suffix"}, [](json& j) { j["model"]["end_of_word_suffix"] = "</w>"; });
  refuse({"normalizer", "Lowercase"}, [](json& j) { j["normalizer"] = {{"type", "Lowercase"}}; });
  refuse({"decoder", "WordPiece"}, [](json& j) { j["decoder"] = {{"type", "WordPiece"}}; });
  refuse({"decoder makes more"}, [](json& j) {
    j["pre_tokenizer"] = nullptr;
    j["model"]["byte_fallback"] = true;
    for (int byte = 0; byte < 256; ++byte) {
      j["model"]["vocab"].emplace(fmt::format("<0x{:02X}>", byte), 400 + byte);
    }
    json twice = {{"type", "Replace"}, {"pattern", {{"String", "a"}}}, {"content", "aa"}};
    j["decoder"] = {{"type", "Sequence"}, {"decoders", std::vector<json>(64, twice)}};
  });
  refuse({"more than 8 steps"}, [](json& j) {
    json twice = {{"type", "Replace"}, {"pattern", {{"String", "a"}}}, {"content", "aa"}};
    j["normalizer"] = {{"type", "Sequence"}, {"normalizers", std::vector<json>(64, twice)}};
  });
  refuse({"text would be lost"}, [](json& j) { j["pre_tokenizer"] = nullptr; });
  refuse({"<0x00>"}, [](json& j) {
    j["pre_tokenizer"] = nullptr;
    j["model"]["byte_fallback"] = true;
  });
}

TEST(JsonTokenizer, HostileFilesAreErrors) {
  const auto refuse = [](const std::string& text) {
    expect_failure(ExitCode::data, {"tokenizer.json"}, [&] {
      JsonTokenizer({{"tokenizer.json", text}});
    });
  };
  refuse("");
  refuse("{");
  refuse("null");
  refuse("\xff\xfe");
  refuse(std::string(1 << 20, '['));
  refuse("{\"model\": " + std::string(100000, '[') + std::string(100000, ']') + "}");
  // Whatever is cut off or changed: an error or a tokenizer that works.
  const std::string whole = with([](json&) {});
  std::mt19937_64 random(8);
  for (int i = 0; i < 300; ++i) {
    std::string text = whole;
    if (i % 2 == 0) text.resize(random() % text.size());
    for (int n = 0; n < 3 && !text.empty(); ++n) {
      text[random() % text.size()] = static_cast<char>(random() % 128);
    }
    try {
      const JsonTokenizer t({{"tokenizer.json", text}});
      encode(t, "some text, 123");
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::data) << error.what();
    }
  }
}

TEST(TokenizerFiles, DamagedPacksAreErrors) {
  const std::string packed = pack_tokenizer_files({{"a", "12\n3"}, {"b", ""}});
  EXPECT_EQ(unpack_tokenizer_files(packed).at("a"), "12\n3");
  for (std::size_t size = 0; size < packed.size(); ++size) {
    if (packed.substr(0, size).ends_with("3\n") || packed.substr(0, size).ends_with(" 1\n")) {
      continue;  // whole, with fewer files
    }
    expect_failure(ExitCode::data, {"tokenizer"},
                   [&] { unpack_tokenizer_files(packed.substr(0, size)); });
  }
  expect_failure(ExitCode::data, {"cut short"},
                 [&] { unpack_tokenizer_files("arcus tokenizer files 1\na 99999999999\nx\n"); });
}

}  // namespace
}  // namespace arcus
