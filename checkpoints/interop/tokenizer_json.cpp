#include "checkpoints/interop/tokenizer_json.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <unordered_map>

#include "src/data/pre_tokenizer.hpp"
#include "src/data/utf8.hpp"

namespace arcus {
namespace {

using Json = nlohmann::ordered_json;

std::string quoted(const std::string& text) { return Json(text).dump(); }

Json replace_rule(const char* from, const char* to) {
  return {{"type", "Replace"}, {"pattern", {{"String", from}}}, {"content", to}};
}

Json sequence(const char* list, std::vector<Json> parts) {
  if (parts.empty()) return nullptr;
  if (parts.size() == 1) return parts.front();
  return {{"type", "Sequence"}, {list, parts}};
}

Json added_json(const AddedToken& token) {
  return {{"id", token.id},          {"content", token.content}, {"single_word", token.single_word},
          {"lstrip", token.lstrip},  {"rstrip", token.rstrip},   {"normalized", token.normalized},
          {"special", token.special}};
}

Json normalizer_json(const JsonVocabulary& v) {
  if (v.byte_level) return v.nfc ? Json{{"type", "NFC"}} : Json(nullptr);
  std::vector<Json> parts;
  if (v.dummy_prefix) parts.push_back({{"type", "Prepend"}, {"prepend", "▁"}});
  parts.push_back(replace_rule(" ", "▁"));
  return sequence("normalizers", parts);
}

/// ByteLevel has the regular expression of GPT-2 built in; others stand before it.
Json pre_tokenizer_json(const JsonVocabulary& v, std::string_view gpt2_pattern) {
  if (!v.byte_level) return nullptr;
  std::vector<std::string_view> patterns = v.patterns;
  const bool gpt2 = !patterns.empty() && patterns.back() == gpt2_pattern;
  if (gpt2) patterns.pop_back();
  std::vector<Json> parts;
  for (const std::string_view pattern : patterns) {
    parts.push_back({{"type", "Split"},
                     {"pattern", {{"Regex", std::string(pattern)}}},
                     {"behavior", "Isolated"},
                     {"invert", false}});
  }
  parts.push_back({{"type", "ByteLevel"},
                   {"add_prefix_space", false},
                   {"trim_offsets", true},
                   {"use_regex", gpt2}});
  return sequence("pretokenizers", parts);
}

Json decoder_json(const JsonVocabulary& v) {
  if (v.byte_level) {
    return {{"type", "ByteLevel"},
            {"add_prefix_space", false},
            {"trim_offsets", true},
            {"use_regex", true}};
  }
  std::vector<Json> parts{replace_rule("▁", " "), {{"type", "ByteFallback"}}, {{"type", "Fuse"}}};
  if (v.dummy_prefix) {
    parts.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}});
  }
  return sequence("decoders", parts);
}

/// Added tokens after the last other one get their ids by their order; those before it have to
/// stand in the vocabulary too.
std::size_t end_of_model_vocabulary(const JsonVocabulary& v) {
  std::vector<bool> is_added(v.tokens.size());
  for (const AddedToken& token : v.added) is_added[static_cast<std::size_t>(token.id)] = true;
  std::size_t end = v.tokens.size();
  while (end > 0 && is_added[end - 1]) --end;
  return end;
}

std::string vocab_text(const JsonVocabulary& v) {
  std::string text;
  const std::size_t end = end_of_model_vocabulary(v);
  for (std::size_t id = 0; id < end; ++id) {
    text += fmt::format("{}\n      {}: {}", id == 0 ? "" : ",", quoted(v.tokens[id]), id);
  }
  return text;
}

std::string merges_text(const JsonVocabulary& v) {
  std::string text;
  for (const auto& [left, right] : v.merges) {
    text += fmt::format("{}\n      [{}, {}]", text.empty() ? "" : ",", quoted(left), quoted(right));
  }
  return text;
}

std::string added_text(const JsonVocabulary& v) {
  std::vector<AddedToken> added = v.added;
  std::sort(added.begin(), added.end(),
            [](const AddedToken& a, const AddedToken& b) { return a.id < b.id; });
  std::string text;
  for (const AddedToken& token : added) {
    text += fmt::format("{}\n    {}", text.empty() ? "" : ",", added_json(token).dump());
  }
  return text;
}

Json or_null(const std::string& text) { return text.empty() ? Json(nullptr) : Json(text); }

}  // namespace

std::string tokenizer_json_text(const JsonVocabulary& v) {
  const std::string_view gpt2 = known_pre_tokenizers().front().patterns.front();
  return fmt::format(
      R"({{
  "version": "1.0",
  "truncation": null,
  "padding": null,
  "added_tokens": [{}
  ],
  "normalizer": {},
  "pre_tokenizer": {},
  "post_processor": null,
  "decoder": {},
  "model": {{
    "type": "BPE",
    "dropout": null,
    "unk_token": {},
    "continuing_subword_prefix": null,
    "end_of_word_suffix": null,
    "fuse_unk": {},
    "byte_fallback": {},
    "ignore_merges": {},
    "vocab": {{{}
    }},
    "merges": [{}
    ]
  }}
}}
)",
      added_text(v), normalizer_json(v).dump(), pre_tokenizer_json(v, gpt2).dump(),
      decoder_json(v).dump(), or_null(v.unk).dump(), !v.byte_level, !v.byte_level, v.ignore_merges,
      vocab_text(v), merges_text(v));
}

namespace {

bool may_merge(const SpmProto::Piece& piece) {
  return piece.type == SpmProto::normal || piece.type == SpmProto::user_defined;
}

struct PieceMerge {
  std::string left, right;
  float score;
  std::size_t left_characters, right_characters;
};

std::size_t count_characters(std::string_view text) {
  return static_cast<std::size_t>(std::count_if(text.begin(), text.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xC0) != 0x80;
  }));
}

}  // namespace

/// SentencePiece joins the neighbours whose piece has the best score, whichever way the piece falls
/// in two; a list of merges has one rank for each way. Ways of one piece stand side by side, so
/// that only two ways of the same piece that overlap in a text could be told apart.
JsonVocabulary json_vocabulary_of(const SpmProto& proto) {
  JsonVocabulary vocabulary{.byte_level = false, .dummy_prefix = proto.add_dummy_prefix};
  std::unordered_map<std::string_view, std::size_t> ids;
  for (std::size_t id = 0; id < proto.pieces.size(); ++id) {
    const SpmProto::Piece& piece = proto.pieces[id];
    vocabulary.tokens.push_back(piece.text);
    if (may_merge(piece)) ids.emplace(piece.text, id);
    if (piece.type == SpmProto::unknown) vocabulary.unk = piece.text;
    if (piece.type == SpmProto::unknown || piece.type == SpmProto::control) {
      vocabulary.added.push_back({static_cast<std::int32_t>(id), piece.text, /*special=*/true});
    }
  }
  std::vector<PieceMerge> merges;
  for (const SpmProto::Piece& piece : proto.pieces) {
    if (!may_merge(piece)) continue;
    std::vector<PieceMerge> ways;
    const std::string_view text = piece.text;
    for (std::size_t at = next_code_point(text, 0); at < text.size();
         at = next_code_point(text, at)) {
      const std::string_view left = text.substr(0, at);
      const std::string_view right = text.substr(at);
      if (!ids.contains(left) || !ids.contains(right)) continue;
      ways.push_back({std::string(left), std::string(right), piece.score, count_characters(left),
                      count_characters(right)});
    }
    std::sort(ways.begin(), ways.end(), [&](const PieceMerge& a, const PieceMerge& b) {
      return std::pair(ids.at(a.left), ids.at(a.right)) <
             std::pair(ids.at(b.left), ids.at(b.right));
    });
    std::move(ways.begin(), ways.end(), std::back_inserter(merges));
  }
  std::stable_sort(merges.begin(), merges.end(), [](const PieceMerge& a, const PieceMerge& b) {
    return std::tuple(a.score, a.left_characters, a.right_characters) >
           std::tuple(b.score, b.left_characters, b.right_characters);
  });
  for (PieceMerge& merge : merges) {
    vocabulary.merges.emplace_back(std::move(merge.left), std::move(merge.right));
  }
  return vocabulary;
}

std::string pad_name(std::int64_t id) { return fmt::format("[PAD{}]", id); }

void pad_vocabulary(std::int64_t vocab_size, JsonVocabulary& vocabulary) {
  for (auto id = static_cast<std::int64_t>(vocabulary.tokens.size()); id < vocab_size; ++id) {
    vocabulary.tokens.push_back(pad_name(id));
    vocabulary.added.push_back({static_cast<std::int32_t>(id), pad_name(id), /*special=*/true});
  }
}

std::string tokenizer_config_text(const TokenizerConfig& config) {
  Json json = {
      {"tokenizer_class", config.tokenizer_class}, {"bos_token", or_null(config.bos)},
      {"eos_token", or_null(config.eos)},          {"unk_token", or_null(config.unk)},
      {"pad_token", or_null(config.pad)},          {"add_bos_token", config.add_bos},
      {"add_eos_token", config.add_eos},           {"clean_up_tokenization_spaces", false}};
  if (!config.chat_template.empty()) json["chat_template"] = config.chat_template;
  if (!config.arcus_kind.empty()) json["arcus_kind"] = config.arcus_kind;
  return json.dump(2) + "\n";
}

std::string special_tokens_map_text(const TokenizerConfig& config) {
  Json json = Json::object();
  const auto add = [&](const char* key, const std::string& token) {
    if (!token.empty()) json[key] = token;
  };
  add("bos_token", config.bos);
  add("eos_token", config.eos);
  add("unk_token", config.unk);
  add("pad_token", config.pad);
  return json.dump(2) + "\n";
}

}  // namespace arcus
