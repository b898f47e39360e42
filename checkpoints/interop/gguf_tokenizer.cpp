#include "checkpoints/interop/gguf_tokenizer.hpp"

#include <algorithm>
#include <optional>
#include <unordered_map>
#include <unordered_set>

#include "checkpoints/interop/tokenizer_files.hpp"
#include "checkpoints/interop/tokenizer_json.hpp"
#include "src/base/error.hpp"
#include "src/data/checked_json.hpp"
#include "src/data/json_tokenizer.hpp"
#include "src/data/sentencepiece_tokenizer.hpp"
#include "src/data/utf8.hpp"

namespace arcus {
namespace {

using Keys = std::map<std::string, GgufValue>;
using Type = SpmProto::Type;  // GGUF counts them likewise

// ---------------------------------------------------------------------------------------- to keys

struct GgufVocabulary {
  std::string model, pre = "default";
  std::vector<std::string> tokens;
  std::vector<float> scores;  ///< "llama"
  std::vector<std::int32_t> types;
  std::vector<std::string> merges;  ///< "gpt2"
  std::optional<std::int32_t> bos, eos, unk, pad;
  bool add_bos = false;
  bool add_eos = false;
  bool add_space_prefix = false;
  std::string chat_template;
};

std::vector<std::pair<std::string, GgufValue>> keys_of(const GgufVocabulary& v) {
  std::vector<std::pair<std::string, GgufValue>> keys{{"tokenizer.ggml.model", v.model},
                                                      {"tokenizer.ggml.pre", v.pre},
                                                      {"tokenizer.ggml.tokens", v.tokens}};
  if (v.model == "llama") keys.emplace_back("tokenizer.ggml.scores", v.scores);
  keys.emplace_back("tokenizer.ggml.token_type", v.types);
  if (v.model == "gpt2") keys.emplace_back("tokenizer.ggml.merges", v.merges);
  const auto add_id = [&](const char* key, const std::optional<std::int32_t>& id) {
    if (id) keys.emplace_back(key, static_cast<std::uint32_t>(*id));
  };
  // Without them engines take ids of their own, of other vocabularies.
  add_id("tokenizer.ggml.bos_token_id", v.bos ? v.bos : v.eos);
  add_id("tokenizer.ggml.eos_token_id", v.eos);
  add_id("tokenizer.ggml.unknown_token_id", v.unk);
  add_id("tokenizer.ggml.padding_token_id", v.pad);
  keys.emplace_back("tokenizer.ggml.add_bos_token", v.add_bos);
  keys.emplace_back("tokenizer.ggml.add_eos_token", v.add_eos);
  if (v.model == "llama") {
    keys.emplace_back("tokenizer.ggml.add_space_prefix", v.add_space_prefix);
  }
  if (!v.chat_template.empty()) keys.emplace_back("tokenizer.chat_template", v.chat_template);
  return keys;
}

std::optional<std::int32_t> id_of(const std::vector<std::string>& tokens, const std::string& name) {
  const auto found = std::find(tokens.begin(), tokens.end(), name);
  if (name.empty() || found == tokens.end()) return {};
  return static_cast<std::int32_t>(found - tokens.begin());
}

/// What the files of an imported tokenizer say of the special tokens.
void set_special_tokens(const SpecialTokens& special, bool add_bos, GgufVocabulary& v) {
  v.bos = id_of(v.tokens, special.bos);
  v.unk = id_of(v.tokens, special.unk);
  v.pad = id_of(v.tokens, special.pad);
  v.add_bos = special.add_bos.value_or(add_bos) && v.bos;
  v.add_eos = special.add_eos.value_or(false);
  v.chat_template = special.chat_template;
}

/// Fills gaps and the end of the vocabulary with tokens that no text has. Every token needs a name
/// of its own.
void pad(std::int64_t vocab_size, GgufVocabulary& v) {
  v.tokens.resize(static_cast<std::size_t>(vocab_size));
  v.types.resize(v.tokens.size(), Type::unused);
  std::unordered_set<std::string> names(v.tokens.begin(), v.tokens.end());
  for (std::size_t id = 0; id < v.tokens.size(); ++id) {
    if (!v.tokens[id].empty()) continue;
    std::string name = pad_name(static_cast<std::int64_t>(id));
    while (!names.insert(name).second) name += '_';
    v.tokens[id] = name;
    v.types[id] = Type::unused;
  }
  if (v.model == "llama") v.scores.resize(v.tokens.size(), -10000);
}

GgufVocabulary bytes_vocabulary(const Tokenizer& tokenizer) {
  // As hf_tokenizer_files spells it.
  const TokenizerFiles files = hf_tokenizer_files(tokenizer, tokenizer.vocab_size());
  const JsonTokenizer spelled(files);
  GgufVocabulary v{.model = "gpt2", .pre = "gpt-2", .tokens = spelled.spelling().tokens};
  v.types.assign(v.tokens.size(), Type::normal);
  v.types[0] = Type::control;
  return v;
}

void set_pieces(const SpmProto& proto, GgufVocabulary& v) {
  v.model = "llama";
  for (const SpmProto::Piece& piece : proto.pieces) {
    v.tokens.push_back(piece.text);
    v.scores.push_back(piece.score);
    v.types.push_back(piece.type);
    if (piece.type == Type::unknown) v.unk = static_cast<std::int32_t>(v.tokens.size()) - 1;
  }
  v.add_space_prefix = proto.add_dummy_prefix;
}

void set_added(const std::vector<AddedToken>& added, GgufVocabulary& v) {
  for (const AddedToken& token : added) {
    const auto id = static_cast<std::size_t>(token.id);
    if (id >= v.tokens.size()) {
      v.tokens.resize(id + 1);
      v.types.resize(id + 1, Type::unused);
      if (v.model == "llama") v.scores.resize(id + 1, -10000);
    }
    if (v.model == "llama" && !v.tokens[id].empty()) continue;  // a piece
    v.tokens[id] = token.content;
    v.types[id] = token.special ? Type::control : Type::user_defined;
    if (token.content == pad_name(token.id)) v.types[id] = Type::unused;
    if (v.model == "llama") v.scores[id] = -1000;
  }
}

/// GGUF's "llama" is BPE by scores on the text as it stands.
void check_is_plain_bpe(const SpmProto& proto) {
  ARCUS_REQUIRE(proto.model == SpmProto::bpe, ExitCode::data,
                "the tokenizer.model is not of type BPE; GGUF's \"llama\" vocabularies are: export "
                "with --to hf");
  ARCUS_REQUIRE(!proto.has_rules && !proto.remove_extra_whitespaces && !proto.blank_is_suffix,
                ExitCode::data,
                "the tokenizer.model rewrites text before it is split, for which GGUF's \"llama\" "
                "vocabularies have no place: export with --to hf");
}

GgufVocabulary spm_vocabulary(const Tokenizer& tokenizer) {
  GgufVocabulary v;
  set_pieces(read_spm_proto(tokenizer.serialized()), v);
  return v;
}

GgufVocabulary sentencepiece_vocabulary(const SentencePieceTokenizer& tokenizer) {
  check_is_plain_bpe(tokenizer.proto());
  GgufVocabulary v;
  set_pieces(tokenizer.proto(), v);
  set_added(tokenizer.added(), v);
  return v;
}

bool same_patterns(const std::vector<std::string>& a, const std::vector<std::string_view>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

/// The name that GGUF has for how text is split.
std::string pre_of(const JsonTokenizer::Spelling& spelling) {
  const std::vector<std::string> patterns = spelling.pre_tokenizer->isolated_patterns();
  if (!spelling.pre_tokenizer->adds_prefix_space()) {
    for (const KnownPreTokenizer& known : known_pre_tokenizers()) {
      if (same_patterns(patterns, known.patterns) &&
          known.ignore_merges == spelling.ignore_merges) {
        return std::string(known.name);
      }
    }
  }
  ARCUS_FAIL(ExitCode::data,
             "there is no GGUF pre type for this tokenizer's pre_tokenizer ({}{}): export with "
             "--to hf",
             patterns.empty() ? "no regular expression" : excerpt(patterns.front(), 80),
             spelling.ignore_merges ? ", ignore_merges" : "");
}

GgufVocabulary byte_level_vocabulary(const JsonTokenizer::Spelling& spelling) {
  ARCUS_REQUIRE(spelling.normalizer->empty() || spelling.normalizer->is_nfc(), ExitCode::data,
                "the tokenizer's normalizer has no place in a GGUF file: export with --to hf");
  GgufVocabulary v{.model = "gpt2", .pre = pre_of(spelling), .tokens = spelling.tokens};
  v.types.assign(v.tokens.size(), Type::normal);
  for (const auto& [left, right] : spelling.merges) v.merges.push_back(left + " " + right);
  set_added(spelling.added, v);
  return v;
}

/// Scores that order pieces as merges do: all ways to make a piece stand side by side in the list,
/// and every way is there, so that joining by score does the same.
std::unordered_map<std::string, float> scores_of_merges(const JsonTokenizer::Spelling& spelling) {
  const auto refuse = [](const std::string& piece) {
    ARCUS_FAIL(ExitCode::data,
               "the merges that make \"{}\" cannot be told by scores, as GGUF's \"llama\" "
               "vocabularies have them, and there is no tokenizer.model: export with --to hf",
               excerpt(piece));
  };
  std::unordered_map<std::string, float> scores;
  std::unordered_set<std::string> pairs;
  std::string last;
  for (const auto& [left, right] : spelling.merges) {
    const std::string piece = left + right;
    if (piece != last && !scores.emplace(piece, -static_cast<float>(scores.size())).second) {
      refuse(piece);
    }
    last = piece;
    pairs.insert(left + " " + right);
  }
  std::unordered_set<std::string> tokens;
  for (const std::string& token : spelling.tokens) {
    if (byte_of_piece(token) < 0) tokens.insert(token);
  }
  for (const AddedToken& token : spelling.added) tokens.erase(token.content);
  for (const std::string& token : tokens) {
    for (std::size_t at = 1; at < token.size(); ++at) {
      const std::string left = token.substr(0, at);
      const std::string right = token.substr(at);
      if (tokens.contains(left) && tokens.contains(right) && !pairs.contains(left + " " + right)) {
        refuse(token);
      }
    }
  }
  return scores;
}

GgufVocabulary byte_fallback_vocabulary(const JsonTokenizer& tokenizer,
                                        const JsonTokenizer::Spelling& spelling) {
  GgufVocabulary v{.model = "llama", .tokens = spelling.tokens};
  const auto own_model = tokenizer.files().find("tokenizer.model");
  if (own_model != tokenizer.files().end()) {
    const SpmProto proto = read_spm_proto(own_model->second);
    check_is_plain_bpe(proto);
    v.tokens.clear();
    set_pieces(proto, v);
    for (std::size_t id = 0; id < std::min(v.tokens.size(), spelling.tokens.size()); ++id) {
      ARCUS_REQUIRE(v.tokens[id] == spelling.tokens[id], ExitCode::data,
                    "token {} is \"{}\" in tokenizer.json and \"{}\" in tokenizer.model", id,
                    excerpt(spelling.tokens[id]), excerpt(v.tokens[id]));
    }
  } else {
    const auto scores = scores_of_merges(spelling);
    for (const std::string& token : v.tokens) {
      const auto score = scores.find(token);
      v.scores.push_back(score == scores.end() ? -static_cast<float>(scores.size())
                                               : score->second);
      v.types.push_back(byte_of_piece(token) >= 0 ? Type::byte : Type::normal);
    }
    for (const AddedToken& token : spelling.added) {
      v.types[static_cast<std::size_t>(token.id)] =
          token.special ? Type::control : Type::user_defined;
    }
    if (const auto unk = id_of(v.tokens, spelling.unk)) v.types[*unk] = Type::unknown;
  }
  v.add_space_prefix = tokenizer.puts_blank_in_front();
  ARCUS_REQUIRE(tokenizer.is_plain_sentencepiece(), ExitCode::data,
                "the tokenizer's normalizer or pre_tokenizer has no place in a GGUF file: export "
                "with --to hf");
  set_added(spelling.added, v);
  return v;
}

GgufVocabulary json_vocabulary(const JsonTokenizer& tokenizer) {
  const JsonTokenizer::Spelling spelling = tokenizer.spelling();
  return spelling.byte_level ? byte_level_vocabulary(spelling)
                             : byte_fallback_vocabulary(tokenizer, spelling);
}

// -------------------------------------------------------------------------------------- from keys

template <class T>
const T* find(const Keys& keys, const std::string& key) {
  const auto found = keys.find(key);
  if (found == keys.end()) return nullptr;
  const T* value = std::get_if<T>(&found->second);
  ARCUS_REQUIRE(value != nullptr, ExitCode::data, "the GGUF key {} has a value of another type",
                key);
  return value;
}

template <class T>
const T& get(const Keys& keys, const std::string& key) {
  const T* value = find<T>(keys, key);
  ARCUS_REQUIRE(value != nullptr, ExitCode::data, "the GGUF key {} is missing", key);
  return *value;
}

/// The token whose id a key of any integer type holds; "" where there is none.
std::string token_named(const Keys& keys, const std::string& key,
                        const std::vector<std::string>& tokens) {
  const auto found = keys.find(key);
  if (found == keys.end()) return "";
  return std::visit(
      [&](const auto& value) -> std::string {
        if constexpr (std::is_integral_v<std::decay_t<decltype(value)>>) {
          const auto id = static_cast<std::uint64_t>(value);
          ARCUS_REQUIRE(id < tokens.size(), ExitCode::data,
                        "the GGUF key {} is {}, but there are {} tokens", key, value,
                        tokens.size());
          return tokens[id];
        } else {
          ARCUS_FAIL(ExitCode::data, "the GGUF key {} is no id", key);
        }
      },
      found->second);
}

bool flag(const Keys& keys, const std::string& key, bool otherwise) {
  const bool* value = find<bool>(keys, key);
  return value == nullptr ? otherwise : *value;
}

const std::vector<std::string>& read_tokens(const Keys& keys) {
  const auto& tokens = get<std::vector<std::string>>(keys, "tokenizer.ggml.tokens");
  std::unordered_set<std::string_view> seen;
  for (const std::string& token : tokens) {
    ARCUS_REQUIRE(!token.empty() && seen.insert(token).second &&
                      find_invalid_utf8(token) == std::string::npos,
                  ExitCode::data,
                  "the GGUF key tokenizer.ggml.tokens has an entry that is empty, no UTF-8 or "
                  "there twice (entry {})",
                  &token - tokens.data());
  }
  ARCUS_REQUIRE(!tokens.empty(), ExitCode::data, "the GGUF key tokenizer.ggml.tokens is empty");
  return tokens;
}

/// Types by id; all normal where there are none.
std::vector<std::int32_t> read_types(const Keys& keys, std::size_t tokens) {
  std::vector<std::int32_t> types(tokens, Type::normal);
  const auto* given = find<std::vector<std::int32_t>>(keys, "tokenizer.ggml.token_type");
  if (given == nullptr) return types;
  ARCUS_REQUIRE(given->size() == tokens, ExitCode::data,
                "the GGUF key tokenizer.ggml.token_type has {} entries for {} tokens",
                given->size(), tokens);
  return *given;
}

TokenizerConfig read_config(const Keys& keys, const std::vector<std::string>& tokens,
                            bool add_bos) {
  const std::string prefix = "tokenizer.ggml.";
  TokenizerConfig config{.bos = token_named(keys, prefix + "bos_token_id", tokens),
                         .eos = token_named(keys, prefix + "eos_token_id", tokens),
                         .unk = token_named(keys, prefix + "unknown_token_id", tokens),
                         .pad = token_named(keys, prefix + "padding_token_id", tokens),
                         .add_bos = flag(keys, prefix + "add_bos_token", add_bos),
                         .add_eos = flag(keys, prefix + "add_eos_token", false)};
  if (const auto* text = find<std::string>(keys, "tokenizer.chat_template")) {
    ARCUS_REQUIRE(find_invalid_utf8(*text) == std::string::npos, ExitCode::data,
                  "the GGUF key tokenizer.chat_template is no UTF-8");
    config.chat_template = *text;
  }
  return config;
}

const KnownPreTokenizer& pre_named(const std::string& name) {
  std::string names;
  for (const KnownPreTokenizer& known : known_pre_tokenizers()) {
    const bool alias =
        std::find(known.aliases.begin(), known.aliases.end(), name) != known.aliases.end();
    if (known.name == name || alias) return known;
    names += fmt::format("{}{}", names.empty() ? "" : ", ", known.name);
  }
  ARCUS_FAIL(ExitCode::data,
             "the GGUF pre-tokenizer type \"{}\" (tokenizer.ggml.pre) is not supported; known: {} "
             "and others that are the same; import the model's Hugging Face directory instead",
             excerpt(name), names);
}

std::unique_ptr<Tokenizer> packed(const std::string& kind, const TokenizerFiles& files) {
  return load_tokenizer(kind, pack_tokenizer_files(files));
}

std::unique_ptr<Tokenizer> byte_level_from(const Keys& keys) {
  const std::vector<std::string>& tokens = read_tokens(keys);
  const std::vector<std::int32_t> types = read_types(keys, tokens.size());
  const std::string* pre = find<std::string>(keys, "tokenizer.ggml.pre");
  const KnownPreTokenizer& known = pre_named(pre == nullptr ? "default" : *pre);
  JsonVocabulary vocabulary{
      .tokens = tokens, .ignore_merges = known.ignore_merges, .patterns = known.patterns};
  for (std::size_t id = 0; id < tokens.size(); ++id) {
    if (types[id] == Type::normal || types[id] == Type::byte) continue;
    vocabulary.added.push_back({static_cast<std::int32_t>(id), tokens[id],
                                /*special=*/types[id] != Type::user_defined});
  }
  for (const std::string& merge : get<std::vector<std::string>>(keys, "tokenizer.ggml.merges")) {
    const std::size_t blank = merge.find(' ', 1);
    ARCUS_REQUIRE(blank != std::string::npos && find_invalid_utf8(merge) == std::string::npos,
                  ExitCode::data,
                  "the GGUF key tokenizer.ggml.merges has an entry that is no pair");
    vocabulary.merges.emplace_back(merge.substr(0, blank), merge.substr(blank + 1));
  }
  const TokenizerConfig config = read_config(keys, tokens, known.ignore_merges);
  return packed("tokenizer_json", {{"tokenizer.json", tokenizer_json_text(vocabulary)},
                                   {"tokenizer_config.json", tokenizer_config_text(config)},
                                   {"special_tokens_map.json", special_tokens_map_text(config)}});
}

std::unique_ptr<Tokenizer> sentencepiece_from(const Keys& keys) {
  const std::vector<std::string>& tokens = read_tokens(keys);
  const std::vector<std::int32_t> types = read_types(keys, tokens.size());
  const auto& scores = get<std::vector<float>>(keys, "tokenizer.ggml.scores");
  ARCUS_REQUIRE(scores.size() == tokens.size(), ExitCode::data,
                "the GGUF key tokenizer.ggml.scores has {} entries for {} tokens", scores.size(),
                tokens.size());
  TokenizerConfig config = read_config(keys, tokens, /*add_bos=*/true);
  config.tokenizer_class = "LlamaTokenizer";
  SpmProto proto{.model = SpmProto::bpe,
                 .byte_fallback = true,
                 .add_dummy_prefix = flag(keys, "tokenizer.ggml.add_space_prefix", true),
                 .remove_extra_whitespaces = false};
  for (std::size_t id = 0; id < tokens.size(); ++id) {
    ARCUS_REQUIRE(types[id] >= Type::normal && types[id] <= Type::byte, ExitCode::data,
                  "the GGUF key tokenizer.ggml.token_type has {} for token {}", types[id], id);
    proto.pieces.push_back({tokens[id], scores[id], types[id]});
    if (types[id] == Type::unknown) proto.unk_piece = tokens[id];
  }
  if (!config.bos.empty()) proto.bos_piece = config.bos;
  if (!config.eos.empty()) proto.eos_piece = config.eos;
  if (!config.pad.empty()) proto.pad_piece = config.pad;
  return packed("sentencepiece",
                {{"tokenizer.model", write_spm_proto(proto)},
                 {"tokenizer.json", tokenizer_json_text(json_vocabulary_of(proto))},
                 {"tokenizer_config.json", tokenizer_config_text(config)},
                 {"special_tokens_map.json", special_tokens_map_text(config)}});
}

}  // namespace

std::vector<std::pair<std::string, GgufValue>> gguf_tokenizer_keys(const Tokenizer& tokenizer,
                                                                   std::int64_t vocab_size) {
  ARCUS_REQUIRE(tokenizer.vocab_size() <= vocab_size, ExitCode::data,
                "the tokenizer has {} ids, the model's vocabulary {}", tokenizer.vocab_size(),
                vocab_size);
  GgufVocabulary v;
  TokenizerFiles files;
  bool add_bos = false;
  if (const auto* json = dynamic_cast<const JsonTokenizer*>(&tokenizer)) {
    v = json_vocabulary(*json);
    files = json->files();
    add_bos = json->post_processor_adds_bos();
  } else if (const auto* spm = dynamic_cast<const SentencePieceTokenizer*>(&tokenizer)) {
    v = sentencepiece_vocabulary(*spm);
    files = spm->files();
    add_bos = true;  // what transformers does with a bare tokenizer.model
  } else if (tokenizer.kind() == "spm") {
    v = spm_vocabulary(tokenizer);
  } else {
    v = bytes_vocabulary(tokenizer);
  }
  const std::optional<std::int32_t> unk = v.unk;
  set_special_tokens(read_special_tokens(files), add_bos, v);
  if (!v.unk) v.unk = unk;
  v.eos = tokenizer.eos_id();
  pad(vocab_size, v);
  return keys_of(v);
}

namespace {

/// The tokenizer "bytes", where the keys are those that it is written as; else null.
std::unique_ptr<Tokenizer> bytes_from(const Keys& keys) {
  const auto* tokens = find<std::vector<std::string>>(keys, "tokenizer.ggml.tokens");
  if (tokens == nullptr || tokens->size() < 256 || tokens->size() > (1U << 24)) return nullptr;
  auto bytes = load_tokenizer("bytes", "");
  for (const auto& [key, value] :
       gguf_tokenizer_keys(*bytes, static_cast<std::int64_t>(tokens->size()))) {
    const auto found = keys.find(key);
    if (found == keys.end() || found->second != value) return nullptr;
  }
  return bytes;
}

}  // namespace

std::unique_ptr<Tokenizer> tokenizer_from_gguf_keys(const Keys& keys) {
  const std::string* model = find<std::string>(keys, "tokenizer.ggml.model");
  if (model == nullptr || *model == "none") return nullptr;
  if (*model == "gpt2") {
    if (auto bytes = bytes_from(keys)) return bytes;
    return byte_level_from(keys);
  }
  if (*model == "llama") return sentencepiece_from(keys);
  ARCUS_FAIL(ExitCode::data,
             "the GGUF vocabulary is of the kind \"{}\" (tokenizer.ggml.model); gpt2 and llama are "
             "supported: import the model's Hugging Face directory instead",
             excerpt(*model));
}

std::unique_ptr<Tokenizer> tokenizer_from_gguf(const GgufFile& file) {
  return tokenizer_from_gguf_keys(file.keys());
}

}  // namespace arcus
