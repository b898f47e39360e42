#include "checkpoints/interop/tokenizer_files.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <sstream>

#include "checkpoints/interop/tokenizer_json.hpp"
#include "src/base/error.hpp"
#include "src/data/checked_json.hpp"
#include "src/data/json_tokenizer.hpp"
#include "src/data/sentencepiece_tokenizer.hpp"

namespace arcus {
namespace {

using nlohmann::json;
constexpr const char* kEndOfText = "<|endoftext|>";

// ------------------------------------------------------------------------------------ from files

std::unique_ptr<Tokenizer> bundled(const std::string& kind, const TokenizerFiles& files) {
  return load_tokenizer(kind, pack_tokenizer_files(files));
}

/// What tokenizer_config.json names, or "".
std::string config_text(const TokenizerFiles& files, const char* key) {
  const auto found = files.find("tokenizer_config.json");
  if (found == files.end()) return "";
  return json_text_or_none(found->first, parse_checked_json(found->first, found->second), key);
}

/// The merges of a merges.txt: "left right" a line after an optional "#version".
std::vector<std::pair<std::string, std::string>> read_merges(const std::string& text) {
  std::vector<std::pair<std::string, std::string>> merges;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with("#version") || line.empty()) continue;
    const std::size_t blank = line.find(' ');
    ARCUS_REQUIRE(blank != std::string::npos, ExitCode::data,
                  "merges.txt: \"{}\" is not two tokens and a blank between them", excerpt(line));
    merges.emplace_back(line.substr(0, blank), line.substr(blank + 1));
  }
  return merges;
}

/// Tokens by id; what a vocab.json lists.
std::vector<std::string> read_vocab(const std::string& text) {
  const json root = parse_checked_json("vocab.json", text);
  ARCUS_REQUIRE(root.is_object(), ExitCode::data, "vocab.json: it is no JSON object");
  std::vector<std::string> tokens(root.size());
  for (const auto& [token, id] : root.items()) {
    const bool fits = id.is_number_unsigned() && id.get<std::uint64_t>() < tokens.size() &&
                      tokens[id.get<std::size_t>()].empty() && !token.empty();
    ARCUS_REQUIRE(fits, ExitCode::data,
                  "vocab.json: token \"{}\" has id {}; {} tokens have the ids below, each once",
                  excerpt(token), id.dump().substr(0, 30), tokens.size());
    tokens[id.get<std::size_t>()] = token;
  }
  return tokens;
}

/// The added_tokens_decoder of tokenizer_config.json after (or among) the vocabulary's tokens.
void read_added(const TokenizerFiles& files, JsonVocabulary& vocabulary) {
  const auto found = files.find("tokenizer_config.json");
  if (found == files.end()) return;
  const json root = parse_checked_json(found->first, found->second);
  const json list = root.is_object() ? root.value("added_tokens_decoder", json()) : json();
  std::map<std::int64_t, AddedToken> added;
  for (const auto& [key, node] : list.items()) {
    AddedToken token{.content = json_text(found->first, node, "content")};
    token.special = json_flag(found->first, node, "special", false);
    token.normalized = json_flag(found->first, node, "normalized", !token.special);
    token.lstrip = json_flag(found->first, node, "lstrip", false);
    token.rstrip = json_flag(found->first, node, "rstrip", false);
    token.single_word = json_flag(found->first, node, "single_word", false);
    std::int64_t id = -1;
    std::istringstream(key) >> id;
    added[id] = token;
  }
  for (auto& [id, token] : added) {
    const auto next = static_cast<std::int64_t>(vocabulary.tokens.size());
    if (id == next) vocabulary.tokens.push_back(token.content);
    ARCUS_REQUIRE(id >= 0 && id <= next && vocabulary.tokens[id] == token.content, ExitCode::data,
                  "{}: added token \"{}\" has id {}, which is another's or leaves a gap",
                  found->first, excerpt(token.content), id);
    token.id = static_cast<std::int32_t>(id);
    vocabulary.added.push_back(token);
  }
}

/// A directory of before tokenizer.json: what its class means is known for two.
std::unique_ptr<Tokenizer> from_vocab_and_merges(const TokenizerFiles& files) {
  std::string type = config_text(files, "tokenizer_class");
  if (type.ends_with("Fast")) type.resize(type.size() - 4);
  ARCUS_REQUIRE(
      type == "GPT2Tokenizer" || type == "Qwen2Tokenizer", ExitCode::data,
      "vocab.json and merges.txt do not say how text is split, and tokenizer_class \"{}\" "
      "is not known to (GPT2Tokenizer and Qwen2Tokenizer are); save the tokenizer with "
      "transformers' AutoTokenizer, which writes a tokenizer.json",
      excerpt(type));
  JsonVocabulary vocabulary{.tokens = read_vocab(files.at("vocab.json")),
                            .merges = read_merges(files.at("merges.txt"))};
  const char* name = type == "GPT2Tokenizer" ? "gpt-2" : "qwen2";
  for (const KnownPreTokenizer& known : known_pre_tokenizers()) {
    if (known.name == name) vocabulary.patterns = known.patterns;
  }
  vocabulary.nfc = type == "Qwen2Tokenizer";
  read_added(files, vocabulary);
  TokenizerFiles all = files;
  all["tokenizer.json"] = tokenizer_json_text(vocabulary);
  return bundled("tokenizer_json", all);
}

bool is_bpe(const std::string& tokenizer_json) {
  const json root = parse_checked_json("tokenizer.json", tokenizer_json);
  if (!root.is_object() || !root.contains("model") || !root.at("model").is_object()) return true;
  const json& model = root.at("model");
  return !model.contains("type") || model.at("type") == "BPE";
}

// -------------------------------------------------------------------------------------- to files

/// Ids are bytes; the id of NUL ends a text.
JsonVocabulary bytes_vocabulary() {
  JsonVocabulary vocabulary{.patterns = known_pre_tokenizers().front().patterns};
  for (int byte = 0; byte < 256; ++byte) {
    const char c = static_cast<char>(byte);
    vocabulary.tokens.push_back(byte == 0 ? kEndOfText : spell_bytes({&c, 1}));
  }
  vocabulary.added.push_back({0, kEndOfText, /*special=*/true});
  return vocabulary;
}

TokenizerFiles made_files(const JsonVocabulary& vocabulary, const TokenizerConfig& config) {
  return {{"tokenizer.json", tokenizer_json_text(vocabulary)},
          {"tokenizer_config.json", tokenizer_config_text(config)},
          {"special_tokens_map.json", special_tokens_map_text(config)}};
}

TokenizerFiles bytes_files(std::int64_t vocab_size) {
  JsonVocabulary vocabulary = bytes_vocabulary();
  pad_vocabulary(vocab_size, vocabulary);
  return made_files(vocabulary, {.eos = kEndOfText, .arcus_kind = "bytes"});
}

TokenizerFiles spm_files(const Tokenizer& tokenizer, std::int64_t vocab_size) {
  const std::string model = tokenizer.serialized();
  const SpmProto proto = read_spm_proto(model);
  JsonVocabulary vocabulary = json_vocabulary_of(proto);
  pad_vocabulary(vocab_size, vocabulary);
  TokenizerFiles files =
      made_files(vocabulary, {.eos = proto.eos_piece, .unk = proto.unk_piece, .arcus_kind = "spm"});
  files["tokenizer.model"] = model;
  return files;
}

/// One past the largest id of a tokenizer.json, as far as it is one that was made here.
std::int64_t num_ids(const std::string& text) {
  const nlohmann::json root = parse_checked_json("tokenizer.json", text);
  std::int64_t ids = 0;
  const auto see = [&](const nlohmann::json& id) {
    if (id.is_number_integer()) ids = std::max(ids, id.get<std::int64_t>() + 1);
  };
  if (root.contains("model") && root["model"].is_object() && root["model"].contains("vocab") &&
      root["model"]["vocab"].is_object()) {
    for (const auto& entry : root["model"]["vocab"].items()) see(entry.value());
  }
  if (root.contains("added_tokens") && root["added_tokens"].is_array()) {
    for (const nlohmann::json& token : root["added_tokens"]) {
      if (token.is_object() && token.contains("id")) see(token["id"]);
    }
  }
  return ids;
}

/// The tokenizer of Arcus that the files were made from; null where there is none, or where
/// somebody changed tokenizer.json since, which then counts.
std::unique_ptr<Tokenizer> own_tokenizer(const TokenizerFiles& files) {
  const std::string kind = config_text(files, "arcus_kind");
  const bool spm = kind == "spm" && files.contains("tokenizer.model");
  if ((kind != "bytes" && !spm) || !files.contains("tokenizer.json")) return nullptr;
  constexpr std::int64_t kMostIds = std::int64_t{1} << 24;
  const std::int64_t ids = num_ids(files.at("tokenizer.json"));
  auto own = load_tokenizer(kind, spm ? files.at("tokenizer.model") : std::string());
  if (ids < own->vocab_size() || ids > kMostIds) return nullptr;
  const TokenizerFiles made = spm ? spm_files(*own, ids) : bytes_files(ids);
  if (made.at("tokenizer.json") != files.at("tokenizer.json")) return nullptr;
  return own;
}

}  // namespace

const std::vector<std::string>& hf_tokenizer_file_names() {
  static const std::vector<std::string> names{
      "tokenizer.json",    "tokenizer_config.json", "special_tokens_map.json",
      "added_tokens.json", "tokenizer.model",       "vocab.json",
      "merges.txt",        "chat_template.jinja"};
  return names;
}

std::unique_ptr<Tokenizer> tokenizer_from_hf(const TokenizerFiles& given) {
  TokenizerFiles files;
  for (const std::string& name : hf_tokenizer_file_names()) {
    if (given.contains(name)) files[name] = given.at(name);
  }
  if (auto own = own_tokenizer(files)) return own;
  const bool has_model = files.contains("tokenizer.model");
  if (files.contains("tokenizer.json") && (!has_model || is_bpe(files.at("tokenizer.json")))) {
    return bundled("tokenizer_json", files);
  }
  if (has_model) return bundled("sentencepiece", files);
  if (files.contains("vocab.json") && files.contains("merges.txt")) {
    return from_vocab_and_merges(files);
  }
  return nullptr;
}

TokenizerFiles hf_tokenizer_files(const Tokenizer& tokenizer, std::int64_t vocab_size) {
  ARCUS_REQUIRE(tokenizer.vocab_size() <= vocab_size, ExitCode::data,
                "the tokenizer has {} ids, the model's vocabulary {}", tokenizer.vocab_size(),
                vocab_size);
  if (tokenizer.kind() == "bytes") return bytes_files(vocab_size);
  if (tokenizer.kind() == "spm") return spm_files(tokenizer, vocab_size);
  return unpack_tokenizer_files(tokenizer.serialized());
}

}  // namespace arcus
