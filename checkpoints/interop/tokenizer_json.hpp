#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "src/data/added_tokens.hpp"
#include "src/data/spm_proto.hpp"

namespace arcus {

/// What makes up a tokenizer.json of model type BPE.
struct JsonVocabulary {
  std::vector<std::string> tokens;  ///< by id, as the file spells them
  std::vector<AddedToken> added;
  std::vector<std::pair<std::string, std::string>> merges;
  bool byte_level = true;
  bool ignore_merges = false;
  bool nfc = false;
  std::vector<std::string_view> patterns;  ///< byte level: regular expressions that isolate words
  bool dummy_prefix = false;               ///< SentencePiece: a blank in front of every text
  std::string unk;                         ///< SentencePiece: the unknown piece
};
std::string tokenizer_json_text(const JsonVocabulary& vocabulary);

/// Vocabulary and merges of a SentencePiece BPE model, as transformers' converters derive them:
/// each way to split a piece in two pieces is a merge, pieces in the order of their scores.
JsonVocabulary json_vocabulary_of(const SpmProto& proto);

/// Appends special tokens "[PADn]" until there are `vocab_size`.
void pad_vocabulary(std::int64_t vocab_size, JsonVocabulary& vocabulary);
/// The name of a padding token that `tokens` has not.
std::string pad_name(std::int64_t id);

/// A tokenizer_config.json that Arcus makes itself.
struct TokenizerConfig {
  std::string tokenizer_class = "PreTrainedTokenizerFast";
  std::string bos, eos, unk, pad;  ///< "" is null
  bool add_bos = false;
  bool add_eos = false;
  std::string chat_template;
  std::string arcus_kind;  ///< of Tokenizer::kind(), where Arcus made the vocabulary
};
std::string tokenizer_config_text(const TokenizerConfig& config);
std::string special_tokens_map_text(const TokenizerConfig& config);

}  // namespace arcus
