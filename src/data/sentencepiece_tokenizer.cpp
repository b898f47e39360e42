#include "src/data/sentencepiece_tokenizer.hpp"

#include <sentencepiece_processor.h>

#include <algorithm>
#include <charconv>
#include <nlohmann/json.hpp>

#include "src/base/error.hpp"
#include "src/data/checked_json.hpp"
#include "src/data/utf8.hpp"

namespace arcus {
namespace {

using nlohmann::json;
constexpr const char* kFile = "tokenizer.model";
/// What the library gets at once, where the text may be cut; it needs some 60 bytes a character.
constexpr std::size_t kPartBytes = std::size_t{1} << 16;

absl::string_view view(std::string_view text) { return {text.data(), text.size()}; }

std::unique_ptr<sentencepiece::SentencePieceProcessor> load(const std::string& model) {
  auto processor = std::make_unique<sentencepiece::SentencePieceProcessor>();
  const auto status = processor->LoadFromSerializedProto(view(model));
  ARCUS_REQUIRE(status.ok(), ExitCode::data, "{} ({} bytes) is no SentencePiece model: {}", kFile,
                model.size(), excerpt(status.ToString(), 120));
  return processor;
}

std::int32_t added_id(const std::string& file, std::int64_t id, std::size_t pieces,
                      std::size_t added) {
  const auto most = static_cast<std::int64_t>(2 * (pieces + added) + 1024);
  ARCUS_REQUIRE(id >= 0 && id < most, ExitCode::data,
                "{}: an added token has id {}; with {} pieces ids lie below {}", file, id, pieces,
                most);
  return static_cast<std::int32_t>(id);
}

}  // namespace

SentencePieceTokenizer::SentencePieceTokenizer(TokenizerFiles files)
    : ImportedTokenizer(std::move(files)) {
  const auto found = files_.find(kFile);
  ARCUS_REQUIRE(found != files_.end(), ExitCode::data, "there is no {}", kFile);
  proto_ = read_spm_proto(found->second);
  first_ = load(found->second);
  rest_ = load(without_dummy_prefix(found->second));
  read_pieces();
  read_added_tokens();
  find_eos();
  find_safe_cuts();
}

SentencePieceTokenizer::~SentencePieceTokenizer() = default;

void SentencePieceTokenizer::read_pieces() {
  ARCUS_REQUIRE(proto_.pieces.size() == static_cast<std::size_t>(first_->GetPieceSize()),
                ExitCode::data, "{}: the library finds {} pieces of {}", kFile,
                first_->GetPieceSize(), proto_.pieces.size());
  byte_ids_.fill(-1);
  for (std::size_t id = 0; id < proto_.pieces.size(); ++id) {
    const SpmProto::Piece& piece = proto_.pieces[id];
    std::string text;
    if (piece.type == SpmProto::byte) {
      const int byte = byte_of_piece(piece.text);
      ARCUS_REQUIRE(byte >= 0, ExitCode::data, "{}: byte piece {} is \"{}\"", kFile, id,
                    excerpt(piece.text));
      byte_ids_[byte] = static_cast<std::int32_t>(id);
      text = std::string(1, static_cast<char>(byte));
    } else if (piece.type != SpmProto::control && piece.type != SpmProto::unknown) {
      text = with_blanks(piece.text);
    }
    texts_.push_back(std::move(text));
  }
  ARCUS_REQUIRE(std::find(byte_ids_.begin(), byte_ids_.end(), -1) == byte_ids_.end(),
                ExitCode::data,
                "{}: the model has no byte fallback: text would be lost (it becomes <unk>)", kFile);
}

void SentencePieceTokenizer::read_added_tokens() {
  const auto add = [&](AddedToken token, const std::string& file) {
    const auto id = static_cast<std::size_t>(token.id);
    if (id < proto_.pieces.size()) {
      if (proto_.pieces[id].text != token.content) {
        ARCUS_FAIL(ExitCode::data, "{}: added token \"{}\" has the id {} of piece \"{}\"", file,
                   excerpt(token.content), id, excerpt(proto_.pieces[id].text));
      }
    } else {
      if (texts_.size() <= id) texts_.resize(id + 1);
      if (!token.special) texts_[id] = token.content;
    }
    const bool known = std::any_of(added_.begin(), added_.end(), [&](const AddedToken& other) {
      return other.id == token.id || other.content == token.content;
    });
    if (!known) added_.push_back(std::move(token));
  };
  if (const auto found = files_.find("tokenizer_config.json"); found != files_.end()) {
    const json root = parse_checked_json(found->first, found->second);
    const json list = root.is_object() ? root.value("added_tokens_decoder", json()) : json();
    for (const auto& [key, node] : list.items()) {
      std::int64_t id = -1;
      std::from_chars(key.data(), key.data() + key.size(), id);
      AddedToken token{added_id(found->first, id, proto_.pieces.size(), list.size()),
                       json_text(found->first, node, "content")};
      token.special = json_flag(found->first, node, "special", false);
      token.lstrip = json_flag(found->first, node, "lstrip", false);
      token.rstrip = json_flag(found->first, node, "rstrip", false);
      token.single_word = json_flag(found->first, node, "single_word", false);
      add(std::move(token), found->first);
    }
  }
  if (const auto found = files_.find("added_tokens.json"); found != files_.end()) {
    const json root = parse_checked_json(found->first, found->second);
    for (const auto& [content, id] : root.items()) {
      ARCUS_REQUIRE(id.is_number_integer(), ExitCode::data, "{}: \"{}\" has no id", found->first,
                    excerpt(content));
      add({added_id(found->first, id.get<std::int64_t>(), proto_.pieces.size(), root.size()),
           content},
          found->first);
    }
  }
}

void SentencePieceTokenizer::find_eos() {
  const std::string named = read_special_tokens(files_).eos;
  if (named.empty()) {
    eos_id_ = first_->eos_id();
    ARCUS_REQUIRE(eos_id_ >= 0, ExitCode::data,
                  "{}: no piece ends a text; name one as \"eos_token\" in tokenizer_config.json",
                  kFile);
  } else {
    for (std::size_t id = 0; id < proto_.pieces.size(); ++id) {
      if (proto_.pieces[id].text == named) eos_id_ = static_cast<std::int32_t>(id);
    }
    for (const AddedToken& token : added_) {
      if (token.content == named) eos_id_ = token.id;
    }
    ARCUS_REQUIRE(eos_id_ >= 0, ExitCode::data,
                  "the eos_token \"{}\" of tokenizer_config.json is no piece of {}", excerpt(named),
                  kFile);
  }
  const auto eos = static_cast<std::size_t>(eos_id_);
  ARCUS_REQUIRE(eos >= proto_.pieces.size() || proto_.pieces[eos].type == SpmProto::control,
                ExitCode::data, "{}: the piece \"{}\" that ends a text is no control piece", kFile,
                excerpt(proto_.pieces[eos].text));
  texts_[eos].clear();
  for (AddedToken& token : added_) token.special = token.special || token.id == eos_id_;
  // Control pieces are special whether or not somebody lists them.
  std::vector<AddedToken> found = added_;
  for (std::size_t id = 0; id < proto_.pieces.size(); ++id) {
    const bool listed = std::any_of(added_.begin(), added_.end(), [&](const AddedToken& token) {
      return token.id == static_cast<std::int32_t>(id);
    });
    if (proto_.pieces[id].type == SpmProto::control && !listed) {
      found.push_back({static_cast<std::int32_t>(id), proto_.pieces[id].text, /*special=*/true});
    }
  }
  finder_ = AddedTokenFinder(std::move(found));
}

/// Between characters that stand side by side in no piece: no piece reaches over, and BPE merges
/// on either side do not depend on each other. (Sums of unigram scores may round otherwise.)
void SentencePieceTokenizer::find_safe_cuts() {
  safe_cuts_ = proto_.model == SpmProto::bpe && !proto_.has_rules && !proto_.blank_is_suffix &&
               !proto_.remove_extra_whitespaces && proto_.escape_whitespaces;
  for (const AddedToken& token : added_) {
    if (!token.special) safe_cuts_ = false;
  }
  for (const SpmProto::Piece& piece : proto_.pieces) {
    if (piece.type == SpmProto::control || piece.type == SpmProto::unknown ||
        piece.type == SpmProto::byte || find_invalid_utf8(piece.text) != std::string::npos) {
      continue;
    }
    std::string_view text = piece.text;
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t end = next_code_point(text, at);
      if (at > 0) {
        joins_.add(code_point_of(last_character(text.substr(0, at))),
                   code_point_of(text.substr(at, end - at)));
      }
      at = end;
    }
  }
}

bool SentencePieceTokenizer::may_cut(std::string_view text, std::size_t at) const {
  if (text[at] != ' ' && text[at] != '\n') return false;
  const std::string_view left = last_character(text.substr(0, at));
  if (find_invalid_utf8(left) != std::string_view::npos) return false;
  const std::uint32_t right = text[at] == ' ' ? 0x2581 : '\n';
  return is_settled_letter(code_point_of(left)) && !joins_.may_join(code_point_of(left), right);
}

std::size_t SentencePieceTokenizer::cut(std::string_view text, std::size_t target) const {
  if (text.size() <= target || !safe_cuts_) return text.size();
  for (std::size_t at = target; at > 0; --at) {
    if (may_cut(text, at)) return at;
  }
  for (std::size_t at = target + 1; at < text.size(); ++at) {
    if (may_cut(text, at)) return at;
  }
  return text.size();
}

void SentencePieceTokenizer::encode(std::string_view text, std::vector<std::int32_t>& ids) const {
  encode_text(text, /*first=*/true, /*specials=*/false, ids);
}

void SentencePieceTokenizer::encode_rest(std::string_view text,
                                         std::vector<std::int32_t>& ids) const {
  encode_text(text, /*first=*/false, /*specials=*/false, ids);
}

void SentencePieceTokenizer::encode_marked(std::string_view text,
                                           std::vector<std::int32_t>& ids) const {
  encode_text(text, /*first=*/true, /*specials=*/true, ids);
}

void SentencePieceTokenizer::encode_text(std::string_view text, bool first, bool specials,
                                         std::vector<std::int32_t>& ids) const {
  // Tokens are of valid UTF-8, so they may be looked for in any bytes.
  finder_.split(
      text, specials,
      [&](std::size_t begin, std::size_t end) {
        std::string_view rest = text.substr(begin, end - begin);
        for (bool at_begin = first && begin == 0; !rest.empty(); at_begin = false) {
          const std::size_t bytes = cut(rest, kPartBytes);
          encode_parts(rest.substr(0, bytes), at_begin, ids);
          rest.remove_prefix(bytes);
        }
      },
      [&](std::int32_t id) { ids.push_back(id); });
}

void SentencePieceTokenizer::encode_parts(std::string_view text, bool first,
                                          std::vector<std::int32_t>& ids) const {
  for (std::size_t at = 0; at < text.size();) {
    const std::string_view rest = text.substr(at);
    const std::size_t plain = std::min({find_invalid_utf8(rest), rest.find('\0'), rest.size()});
    if (plain > 0) encode_plain(rest.substr(0, plain), first && at == 0, ids);
    at += plain;
    if (at < text.size()) ids.push_back(byte_ids_[static_cast<unsigned char>(text[at++])]);
  }
}

void SentencePieceTokenizer::encode_plain(std::string_view text, bool first,
                                          std::vector<std::int32_t>& ids) const {
  std::vector<int> found;
  const auto status = (first ? first_ : rest_)->Encode(view(text), &found);
  ARCUS_CHECK(status.ok(), "SentencePiece cannot encode: {}", status.ToString());
  ids.insert(ids.end(), found.begin(), found.end());
}

std::string SentencePieceTokenizer::decode(const std::vector<std::int32_t>& ids) const {
  std::string text;
  for (const std::int32_t id : ids) text += token_text(id);
  if (proto_.add_dummy_prefix && text.starts_with(' ')) text.erase(0, 1);
  return text;
}

}  // namespace arcus
