#include <gtest/gtest.h>
#include <sentencepiece_processor.h>

#include "src/data/sentencepiece_tokenizer.hpp"
#include "src/data/utf8.hpp"
#include "tests/data/spm_fixture.hpp"

namespace arcus {
namespace {

using testing::encode;
using testing::expect_failure;
using testing::random_text;
using testing::stress_texts;
using testing::train_foreign_spm;

const std::string& llama_model() {
  static const std::string model = train_foreign_spm();
  return model;
}
const SentencePieceTokenizer& llama() {
  static const SentencePieceTokenizer tokenizer({{"tokenizer.model", llama_model()}});
  return tokenizer;
}

std::vector<std::int32_t> ids_of_library(const std::string& model, const std::string& text) {
  sentencepiece::SentencePieceProcessor processor;
  EXPECT_TRUE(processor.LoadFromSerializedProto({model.data(), model.size()}).ok());
  std::vector<int> ids;
  EXPECT_TRUE(processor.Encode({text.data(), text.size()}, &ids).ok());
  return {ids.begin(), ids.end()};
}

TEST(SentencePieceTokenizer, EncodesAsTheLibrary) {
  for (const auto& changes : std::vector<std::unordered_map<std::string, std::string>>{
           {},
           {{"model_type", "unigram"}, {"vocab_size", "440"}},
           {{"normalization_rule_name", "nmt_nfkc"}, {"remove_extra_whitespaces", "true"}},
           {{"user_defined_symbols", "<tool>,ab cd"}}}) {
    const std::string model = train_foreign_spm(changes);
    const SentencePieceTokenizer tokenizer({{"tokenizer.model", model}});
    for (const std::string& text : stress_texts()) {
      EXPECT_EQ(encode(tokenizer, text), ids_of_library(model, text)) << text;
    }
  }
}

TEST(SentencePieceTokenizer, LosesNothing) {
  std::mt19937_64 random(1);
  for (int i = 0; i < 1000; ++i) {
    std::string text = random_text(random, random() % 30);
    if (i % 3 == 0) text.push_back(static_cast<char>(random()));
    if (i % 5 == 0) text += std::string("\0x", 2);
    const auto ids = encode(llama(), text);
    ASSERT_EQ(llama().decode(ids), with_blanks(text));
    std::int64_t bytes = 0;
    for (const std::int32_t id : ids) {
      ASSERT_NE(id, llama().eos_id());
      bytes += llama().token_bytes(id);
    }
    const bool prefixed = !text.empty() && text[0] != '\0' && find_invalid_utf8(text) != 0;
    const std::size_t normalised = with_blanks(text).size();
    ASSERT_EQ(bytes, static_cast<std::int64_t>(normalised + (prefixed ? 1 : 0)));
  }
}

TEST(SentencePieceTokenizer, PartsGiveTheIdsOfTheWhole) {
  std::string text = testing::plain_text(6, 200000);
  for (const std::string& one : stress_texts()) text += one;
  for (const std::size_t target : {200, 70000}) {
    std::vector<std::int32_t> ids;
    int parts = 0;
    for (std::string_view rest = text; !rest.empty(); ++parts) {
      const std::size_t cut = llama().cut(rest, target);
      parts == 0 ? llama().encode(rest.substr(0, cut), ids)
                 : llama().encode_rest(rest.substr(0, cut), ids);
      rest.remove_prefix(cut);
    }
    EXPECT_GT(parts, 2);
    EXPECT_EQ(ids, encode(llama(), text));
    EXPECT_EQ(ids, ids_of_library(llama_model(), text));
  }
}

TEST(SentencePieceTokenizer, OneThatRewritesTextIsNotCut) {
  const SentencePieceTokenizer tokenizer(
      {{"tokenizer.model", train_foreign_spm({{"remove_extra_whitespaces", "true"}})}});
  const std::string text = testing::plain_text(1, 5000);
  EXPECT_EQ(tokenizer.cut(text, 1000), text.size());
}

TEST(SentencePieceTokenizer, SpecialTokensAreTextUnlessMarked) {
  const auto plain = encode(llama(), "a</s>");
  EXPECT_EQ(llama().decode(plain), "a</s>");
  std::vector<std::int32_t> marked;
  llama().encode_marked("a</s>b", marked);
  EXPECT_EQ(std::count(marked.begin(), marked.end(), llama().eos_id()), 1);
  EXPECT_EQ(llama().decode(marked), "ab");
}

TEST(SentencePieceTokenizer, ConfigurationsAddTokensAndNameTheEnd) {
  const SentencePieceTokenizer t({{"tokenizer.model", llama_model()},
                                  {"tokenizer_config.json",
                                   R"({"eos_token": "<|im_end|>", "added_tokens_decoder": {
            "700": {"content": "<|im_end|>", "special": true},
            "701": {"content": "<tool>", "special": false}}})"},
                                  {"added_tokens.json", R"({"<tool>": 701, "<more>": 703})"}});
  EXPECT_EQ(t.vocab_size(), 704);
  EXPECT_EQ(t.eos_id(), 700);
  const auto ids = encode(t, "a<tool>b<|im_end|>");
  EXPECT_EQ(std::count(ids.begin(), ids.end(), 701), 1);
  EXPECT_EQ(std::count(ids.begin(), ids.end(), 700), 0);
  EXPECT_EQ(t.decode(ids), "a<tool>b<|im_end|>");
  EXPECT_EQ(t.token_text(702), "");
}

TEST(SentencePieceTokenizer, ModelsThatLoseTextOrAreNoneAreErrors) {
  const auto refuse = [](const std::vector<std::string>& words, const TokenizerFiles& files) {
    expect_failure(ExitCode::data, words, [&] { (void)SentencePieceTokenizer(files); });
  };
  refuse({"byte fallback"}, {{"tokenizer.model", train_foreign_spm({{"byte_fallback", "false"},
                                                                    {"vocab_size", "500"}})}});
  refuse({"SentencePiece"}, {{"tokenizer.model", "no model"}});
  refuse({"no tokenizer.model"}, {{"other", ""}});
  refuse({"eos_token", "nowhere"}, {{"tokenizer.model", llama_model()},
                                    {"tokenizer_config.json", R"({"eos_token": "nowhere"})"}});
  refuse({"id 99999999"},
         {{"tokenizer.model", llama_model()}, {"added_tokens.json", R"({"<x>": 99999999})"}});
  refuse({"id 5", "piece"},
         {{"tokenizer.model", llama_model()}, {"added_tokens.json", R"({"<x>": 5})"}});
  const std::string with_rules = train_foreign_spm(
      {{"normalization_rule_name", "nmt_nfkc"}, {"remove_extra_whitespaces", "true"}});
  std::mt19937_64 random(2);
  for (int i = 0; i < 400; ++i) {
    std::string model = i % 4 < 2 ? llama_model() : with_rules;
    if (i % 2 == 0) model.resize(random() % model.size());
    for (int n = 0; n < 3 && !model.empty(); ++n) {
      model[random() % model.size()] = static_cast<char>(random());
    }
    try {
      encode(SentencePieceTokenizer({{"tokenizer.model", model}}), "some text");
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::data) << error.what();
    }
  }
}

TEST(SpmProto, WritesWhatItReads) {
  const SpmProto proto = read_spm_proto(llama_model());
  EXPECT_EQ(proto.pieces.size(), 700U);
  EXPECT_EQ(proto.model, SpmProto::bpe);
  EXPECT_TRUE(proto.add_dummy_prefix && proto.byte_fallback);
  const std::string again = write_spm_proto(proto);
  for (const std::string& text : stress_texts()) {
    EXPECT_EQ(ids_of_library(again, text), ids_of_library(llama_model(), text));
  }
}

}  // namespace
}  // namespace arcus
