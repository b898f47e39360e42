#include "checkpoints/interop/tokenizer_files.hpp"

#include <gtest/gtest.h>

#include "checkpoints/interop/gguf_tokenizer.hpp"
#include "src/data/json_tokenizer.hpp"
#include "src/data/sentencepiece_tokenizer.hpp"
#include "src/data/utf8.hpp"
#include "tests/data/spm_fixture.hpp"

namespace arcus {
namespace {

using nlohmann::json;
using testing::byte_fallback_vocabulary;
using testing::byte_level_vocabulary;
using testing::encode;
using testing::expect_failure;
using testing::random_text;
using testing::stress_texts;
using testing::train_foreign_spm;
using Keys = std::map<std::string, GgufValue>;

/// Texts that a vocabulary with U+2581 for blanks can tell apart.
std::vector<std::string> texts(bool byte_level) {
  std::vector<std::string> all = stress_texts();
  std::mt19937_64 random(1);
  for (int i = 0; i < 300; ++i) all.push_back(random_text(random, random() % 40));
  all.push_back(testing::plain_text(2, 5000));
  if (!byte_level) {
    std::erase_if(all, [](const std::string& text) {
      return text.find("\xE2\x96\x81") != std::string::npos;
    });
  }
  return all;
}

void expect_equal_ids(const Tokenizer& a, const Tokenizer& b, bool byte_level) {
  for (const std::string& text : texts(byte_level)) {
    ASSERT_EQ(encode(a, text), encode(b, text)) << text;
  }
}

/// Read back without the word that says it was Arcus's.
std::unique_ptr<Tokenizer> read_as_a_stranger(TokenizerFiles files) {
  json config = json::parse(files.at("tokenizer_config.json"));
  config.erase("arcus_kind");
  files["tokenizer_config.json"] = config.dump();
  files.erase("tokenizer.model");
  return tokenizer_from_hf(files);
}

Keys keys_of(const Tokenizer& tokenizer, std::int64_t vocab_size) {
  const auto list = gguf_tokenizer_keys(tokenizer, vocab_size);
  return {list.begin(), list.end()};
}

template <class T>
const T& get(const Keys& keys, const std::string& name) {
  return std::get<T>(keys.at("tokenizer.ggml." + name));
}

const Tokenizer& own_spm() {
  static const auto tokenizer = [] {
    std::vector<std::string> lines;
    std::istringstream stream(testing::training_text());
    for (std::string line; std::getline(stream, line);) lines.push_back(line + '\n');
    return load_tokenizer("spm", train_spm(lines, {800}));
  }();
  return *tokenizer;
}

TEST(TokenizerFiles, BytesAreReadBackWithTheSameIds) {
  const auto bytes = load_tokenizer("bytes", "");
  const TokenizerFiles files = hf_tokenizer_files(*bytes, 320);
  EXPECT_EQ(tokenizer_from_hf(files)->kind(), "bytes");
  const auto read = read_as_a_stranger(files);
  EXPECT_EQ(read->kind(), "tokenizer_json");
  EXPECT_EQ(read->vocab_size(), 320);
  EXPECT_EQ(read->eos_id(), 0);
  expect_equal_ids(*bytes, *read, true);

  const Keys keys = keys_of(*bytes, 320);
  EXPECT_EQ(get<std::string>(keys, "model"), "gpt2");
  EXPECT_EQ(get<std::string>(keys, "pre"), "gpt-2");
  const auto& tokens = get<std::vector<std::string>>(keys, "tokens");
  const auto& types = get<std::vector<std::int32_t>>(keys, "token_type");
  EXPECT_EQ(tokens.size(), 320U);
  EXPECT_EQ(tokens[0], "<|endoftext|>");
  EXPECT_EQ(tokens[' '], "Ġ");
  EXPECT_EQ(tokens['a'], "a");
  EXPECT_EQ(tokens[319], "[PAD319]");
  EXPECT_EQ(std::count(types.begin(), types.end(), 1), 255);
  EXPECT_EQ(types[0], 3);
  EXPECT_EQ(types[256], 5);
  EXPECT_TRUE(get<std::vector<std::string>>(keys, "merges").empty());
  EXPECT_EQ(get<std::uint32_t>(keys, "eos_token_id"), 0U);
  EXPECT_FALSE(get<bool>(keys, "add_bos_token"));
  expect_equal_ids(*bytes, *tokenizer_from_gguf_keys(keys), true);
}

TEST(TokenizerFiles, OwnSentencePieceIsReadBackWithTheSameIds) {
  const TokenizerFiles files = hf_tokenizer_files(own_spm(), 900);
  EXPECT_EQ(files.at("tokenizer.model"), own_spm().serialized());
  const auto same = tokenizer_from_hf(files);
  EXPECT_EQ(same->kind(), "spm");
  EXPECT_EQ(same->serialized(), own_spm().serialized());
  const json config = json::parse(files.at("tokenizer_config.json"));
  EXPECT_EQ(config.at("add_bos_token"), false);
  EXPECT_TRUE(config.at("bos_token").is_null());
  EXPECT_EQ(config.at("tokenizer_class"), "PreTrainedTokenizerFast");
  EXPECT_EQ(config.at("clean_up_tokenization_spaces"), false);

  const auto read = read_as_a_stranger(files);
  EXPECT_EQ(read->vocab_size(), 900);
  EXPECT_EQ(read->eos_id(), own_spm().eos_id());
  expect_equal_ids(own_spm(), *read, false);

  const Keys keys = keys_of(own_spm(), 900);
  EXPECT_EQ(get<std::string>(keys, "model"), "llama");
  EXPECT_FALSE(get<bool>(keys, "add_space_prefix"));
  EXPECT_FALSE(get<bool>(keys, "add_bos_token"));
  EXPECT_EQ(get<std::vector<float>>(keys, "scores").size(), 900U);
  EXPECT_EQ(get<std::vector<std::int32_t>>(keys, "token_type")[2], 6);
  const auto from_gguf = tokenizer_from_gguf_keys(keys);
  EXPECT_EQ(from_gguf->kind(), "sentencepiece");
  EXPECT_EQ(from_gguf->eos_id(), own_spm().eos_id());
  expect_equal_ids(own_spm(), *from_gguf, false);
}

/// Several ways to split a piece share a score in SentencePiece and have ranks of their own in
/// tokenizer.json. Texts made of pieces, their halves and runs of one character try to tell.
TEST(TokenizerFiles, MergesChooseAsScoresDo) {
  const auto read = read_as_a_stranger(hf_tokenizer_files(own_spm(), 800));
  std::vector<std::string> parts;
  for (std::int32_t id = 2; id < 800; ++id) {
    const std::string piece = own_spm().token_text(id);
    for (std::size_t at = 0; at < piece.size(); at = next_code_point(piece, at)) {
      if (find_invalid_utf8(piece) == std::string::npos) parts.push_back(piece.substr(at));
    }
  }
  std::mt19937_64 random(5);
  for (int i = 0; i < 20000; ++i) {
    std::string text;
    for (std::size_t n = random() % 12; n > 0; --n) {
      const std::string& part = parts[random() % parts.size()];
      for (std::size_t times = random() % 8 == 0 ? random() % 9 : 1; times > 0; --times)
        text += part;
    }
    ASSERT_EQ(encode(own_spm(), text), encode(*read, text)) << text;
  }
}

TEST(TokenizerFiles, ByteLevelVocabulariesTravelThroughGguf) {
  for (const KnownPreTokenizer& known : known_pre_tokenizers()) {
    const auto original = testing::json_tokenizer(byte_level_vocabulary(known.name, 150));
    const std::int64_t vocab_size = original.vocab_size() + 10;
    const Keys keys = keys_of(original, vocab_size);
    EXPECT_EQ(get<std::string>(keys, "pre"), known.name);
    const auto read = tokenizer_from_gguf_keys(keys);
    EXPECT_EQ(read->vocab_size(), vocab_size);
    EXPECT_EQ(read->eos_id(), original.eos_id());
    expect_equal_ids(original, *read, true);
    // Again: what was read says the same.
    EXPECT_TRUE(keys_of(*read, vocab_size) == keys) << known.name;
    for (const std::string_view alias : known.aliases) {
      Keys other = keys;
      other["tokenizer.ggml.pre"] = std::string(alias);
      EXPECT_EQ(tokenizer_from_gguf_keys(other)->serialized(), read->serialized());
    }
  }
}

TEST(TokenizerFiles, ForeignSentencePieceTravelsThroughGguf) {
  const TokenizerFiles files{{"tokenizer.model", train_foreign_spm()}};
  const auto original = tokenizer_from_hf(files);
  EXPECT_EQ(hf_tokenizer_files(*original, 720), files);  // what it had
  const Keys keys = keys_of(*original, 720);
  EXPECT_TRUE(get<bool>(keys, "add_space_prefix"));
  const auto read = tokenizer_from_gguf_keys(keys);
  expect_equal_ids(*original, *read, true);
  // The tokenizer.json made for it gives the same ids again.
  TokenizerFiles made = hf_tokenizer_files(*read, 720);
  const auto from_json = read_as_a_stranger(made);
  EXPECT_EQ(from_json->kind(), "tokenizer_json");
  expect_equal_ids(*original, *from_json, false);
  // And with scores from the model, and from the merges alone.
  made.erase("tokenizer_config.json");
  for (const bool with_model : {true, false}) {
    if (!with_model) made.erase("tokenizer.model");
    const JsonTokenizer tokenizer(made);
    const Keys again = keys_of(tokenizer, 720);
    EXPECT_EQ(get<std::string>(again, "model"), "llama");
    EXPECT_EQ(with_model, again.at("tokenizer.ggml.scores") == keys.at("tokenizer.ggml.scores"));
    expect_equal_ids(*original, *tokenizer_from_gguf_keys(again), true);
  }
}

TEST(TokenizerFiles, WhatGgufCannotSayIsRefusedWithARemedy) {
  const auto refuse = [](const std::string& word, const Tokenizer& tokenizer) {
    expect_failure(ExitCode::data, {word, "--to hf"},
                   [&] { gguf_tokenizer_keys(tokenizer, tokenizer.vocab_size()); });
  };
  const auto foreign = [](const std::unordered_map<std::string, std::string>& changes) {
    return tokenizer_from_hf({{"tokenizer.model", train_foreign_spm(changes)}});
  };
  refuse("BPE", *foreign({{"model_type", "unigram"}, {"vocab_size", "440"}}));
  refuse("rewrites text", *foreign({{"normalization_rule_name", "nmt_nfkc"}}));
  refuse("rewrites text", *foreign({{"remove_extra_whitespaces", "true"}}));
  const auto changed = [](const std::function<void(json&)>& change) {
    json root = json::parse(tokenizer_json_text(byte_level_vocabulary("gpt-2", 20)));
    change(root);
    return JsonTokenizer({{"tokenizer.json", root.dump()}});
  };
  refuse("no GGUF pre type", changed([](json& j) {
           j["pre_tokenizer"] = json::parse(R"({"type": "Sequence", "pretokenizers": [
               {"type": "Split", "pattern": {"Regex": "a|."}, "behavior": "Isolated"},
               {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}]})");
         }));
  refuse("no GGUF pre type",
         changed([](json& j) { j["pre_tokenizer"]["add_prefix_space"] = true; }));
  refuse("no GGUF pre type", changed([](json& j) { j["model"]["ignore_merges"] = true; }));
  refuse("normalizer", changed([](json& j) {
           j["normalizer"] = {{"type", "Prepend"}, {"prepend", "x"}};
         }));
  JsonVocabulary plain = byte_fallback_vocabulary(true);
  refuse("cannot be told by scores", testing::json_tokenizer(plain));
  const auto bytes = load_tokenizer("bytes", "");
  expect_failure(ExitCode::data, {"256", "255"}, [&] { gguf_tokenizer_keys(*bytes, 255); });
  expect_failure(ExitCode::data, {"256", "255"}, [&] { hf_tokenizer_files(*bytes, 255); });
}

TEST(TokenizerFiles, ImportedFilesAreKeptVerbatim) {
  TokenizerFiles files{{"tokenizer.json", tokenizer_json_text(byte_level_vocabulary("qwen2", 50))},
                       {"tokenizer_config.json", R"({"eos_token": "<|endoftext|>", "x": [1,  2]})"},
                       {"chat_template.jinja", "{{ messages }}"}};
  TokenizerFiles with_others = files;
  with_others["model.safetensors"] = "no part of it";
  const auto tokenizer = tokenizer_from_hf(with_others);
  EXPECT_EQ(hf_tokenizer_files(*tokenizer, 5000), files);
  const Keys keys = keys_of(*tokenizer, 5000);
  EXPECT_EQ(std::get<std::string>(keys.at("tokenizer.chat_template")), "{{ messages }}");
  EXPECT_EQ(tokenizer_from_hf({{"config.json", "{}"}}), nullptr);
}

TEST(TokenizerFiles, VocabAndMergesOfKnownClassesAreRead) {
  const JsonVocabulary vocabulary = byte_level_vocabulary("gpt-2", 100);
  json vocab = json::object();
  for (std::size_t id = 0; id + 2 < vocabulary.tokens.size(); ++id)
    vocab[vocabulary.tokens[id]] = id;
  std::string merges = "#version: 0.2\n";
  for (const auto& [left, right] : vocabulary.merges) merges += left + " " + right + "\n";
  const std::string eos = std::to_string(vocab.size());
  TokenizerFiles files{{"vocab.json", vocab.dump()},
                       {"merges.txt", merges},
                       {"tokenizer_config.json",
                        R"({"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": {")" + eos +
                            R"(": {"content": "<|endoftext|>", "special": true}}})"}};
  const auto read = tokenizer_from_hf(files);
  JsonVocabulary expected = vocabulary;
  expected.tokens.pop_back();
  expected.added.pop_back();
  expect_equal_ids(testing::json_tokenizer(expected), *read, true);
  files["tokenizer_config.json"] = "{}";
  expect_failure(ExitCode::data, {"tokenizer_class", "AutoTokenizer"},
                 [&] { tokenizer_from_hf(files); });
}

TEST(TokenizerFiles, HostileGgufVocabulariesAreErrors) {
  const auto tokenizer = testing::json_tokenizer(byte_level_vocabulary("gpt-2", 30));
  const Keys good = keys_of(tokenizer, tokenizer.vocab_size());
  const Keys pieces = keys_of(own_spm(), 800);
  const auto refuse = [](Keys keys, const std::string& word, const char* key,
                         std::optional<GgufValue> value) {
    const std::string name = std::string("tokenizer.ggml.") + key;
    value ? void(keys[name] = *value) : void(keys.erase(name));
    expect_failure(ExitCode::data, {word}, [&] { tokenizer_from_gguf_keys(keys); });
  };
  using Texts = std::vector<std::string>;
  refuse(good, "tokens", "tokens", {});
  refuse(good, "tokens", "tokens", Texts{});
  refuse(good, "tokens", "tokens", Texts{"a", "a"});
  refuse(good, "tokens", "tokens", Texts{"a", ""});
  refuse(good, "tokens", "tokens", Texts{"a", "\xff"});
  refuse(good, "tokens", "tokens", std::uint32_t{7});
  refuse(good, "merges", "merges", {});
  refuse(good, "merges", "merges", Texts{"ab"});
  refuse(good, "merge 0", "merges", Texts{"nowhere b"});
  refuse(good, "token_type", "token_type", std::vector<std::int32_t>{1, 2});
  refuse(good, "eos_token_id", "eos_token_id", std::uint32_t{1u << 30});
  refuse(good, "eos_token_id", "eos_token_id", std::int32_t{-1});
  refuse(good, "eos_token_id", "eos_token_id", std::string("x"));
  refuse(good, "add_bos_token", "add_bos_token", std::uint32_t{1});
  refuse(good, "\"klingon\" (tokenizer.ggml.pre) is not supported", "pre", std::string("klingon"));
  refuse(good, "\"rwkv\"", "model", std::string("rwkv"));
  refuse(pieces, "scores", "scores", {});
  refuse(pieces, "scores", "scores", std::vector<float>{1});
  refuse(pieces, "token_type", "token_type", std::vector<std::int32_t>(800, 9));
  refuse(pieces, "SentencePiece", "token_type", std::vector<std::int32_t>(800, 1));
  EXPECT_EQ(tokenizer_from_gguf_keys({}), nullptr);
  EXPECT_EQ(tokenizer_from_gguf_keys({{"tokenizer.ggml.model", std::string("none")}}), nullptr);
}

}  // namespace
}  // namespace arcus
