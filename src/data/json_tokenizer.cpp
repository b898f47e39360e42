#include "src/data/json_tokenizer.hpp"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <unordered_set>

#include "src/base/error.hpp"
#include "src/data/checked_json.hpp"
#include "src/data/spm_proto.hpp"
#include "src/data/utf8.hpp"

namespace arcus {
namespace {

using nlohmann::json;
using Place = PreTokenizer::Place;
constexpr const char* kFile = "tokenizer.json";

/// How far ids may lie apart: a vocabulary may have gaps, but not be made of them.
std::int64_t most_ids(std::size_t tokens) { return static_cast<std::int64_t>(2 * tokens + 1024); }

std::int32_t read_id(const json& node, const std::string& token, std::size_t tokens) {
  const bool fits = node.is_number_integer() && node.get<std::int64_t>() >= 0 &&
                    node.get<std::int64_t>() < most_ids(tokens);
  ARCUS_REQUIRE(fits, ExitCode::data,
                "{}: token \"{}\" has id {}; a vocabulary of {} tokens has ids from 0 to below {}",
                kFile, excerpt(token), node.dump().substr(0, 30), tokens, most_ids(tokens));
  return node.get<std::int32_t>();
}

/// "a b" or ["a", "b"].
std::pair<std::string, std::string> read_merge(const json& node, std::size_t rank) {
  if (node.is_array() && node.size() == 2 && node[0].is_string() && node[1].is_string()) {
    return {node[0].get<std::string>(), node[1].get<std::string>()};
  }
  ARCUS_REQUIRE(node.is_string(), ExitCode::data, "{}: merge {} is no pair of tokens", kFile, rank);
  const auto& text = node.get_ref<const std::string&>();
  const std::size_t blank = text.find(' ');
  ARCUS_REQUIRE(blank != std::string::npos && text.find(' ', blank + 1) == std::string::npos,
                ExitCode::data, "{}: merge {} is \"{}\", not two tokens and a blank between them",
                kFile, rank, excerpt(text));
  return {text.substr(0, blank), text.substr(blank + 1)};
}

void append_code_point(std::uint32_t c, std::string& text) {
  if (c < 0x80) {
    text += static_cast<char>(c);
  } else {
    text += static_cast<char>(0xC0 | (c >> 6));
    text += static_cast<char>(0x80 | (c & 0x3F));
  }
}

struct Alphabet {
  std::array<std::uint32_t, 256> of_byte{};
  std::array<int, 512> byte_of{};

  Alphabet() {
    byte_of.fill(-1);
    std::uint32_t next = 256;
    for (std::uint32_t b = 0; b < 256; ++b) {
      const bool itself = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
      of_byte[b] = itself ? b : next++;
      byte_of[of_byte[b]] = static_cast<int>(b);
    }
  }
};

const Alphabet& alphabet() {
  static const Alphabet instance;
  return instance;
}

void replace_in(std::string& text, const std::string& from, const std::string& to) {
  for (std::size_t at = text.find(from); at != std::string::npos;
       at = text.find(from, at + to.size())) {
    text.replace(at, from.size(), to);
  }
}

}  // namespace

std::string spell_bytes(std::string_view bytes) {
  std::string spelled;
  for (const char c : bytes) {
    append_code_point(alphabet().of_byte[static_cast<unsigned char>(c)], spelled);
  }
  return spelled;
}

bool unspell_bytes(std::string_view spelled, std::string& bytes) {
  bytes.clear();
  for (std::size_t at = 0; at < spelled.size();) {
    const std::size_t end = next_code_point(spelled, at);
    const std::uint32_t c = code_point_of(spelled.substr(at, end - at));
    if (c >= alphabet().byte_of.size() || alphabet().byte_of[c] < 0) return false;
    bytes += static_cast<char>(alphabet().byte_of[c]);
    at = end;
  }
  return true;
}

struct JsonTokenizer::Model {
  std::size_t bytes;  ///< of the file
  json root;
  IdOfText vocab;
  std::vector<std::pair<std::string, std::string>> merges;
  bool byte_fallback = false;
  bool ignore_merges = false;

  explicit Model(const std::string& text);
  const json& part(const char* name) const {
    static const json kNone;
    const auto found = root.find(name);
    return found == root.end() ? kNone : *found;
  }
  std::int32_t id_of(const std::string& token) const {
    const auto found = vocab.find(token);
    return found == vocab.end() ? -1 : found->second;
  }

 private:
  void read_vocab(const json& node);
  void read_merges(const json& node);
};

JsonTokenizer::Model::Model(const std::string& text)
    : bytes(text.size()), root(parse_checked_json(kFile, text)) {
  ARCUS_REQUIRE(root.is_object() && part("model").is_object(), ExitCode::data,
                "{}: it has no \"model\"", kFile);
  const json& model = part("model");
  const std::string type = model.contains("type") ? json_text(kFile, model, "type") : "BPE";
  ARCUS_REQUIRE(type == "BPE", ExitCode::data,
                "{}: model type \"{}\" is not supported; BPE is, and so is a tokenizer.model of "
                "SentencePiece",
                kFile, excerpt(type));
  const auto dropout = model.find("dropout");
  ARCUS_REQUIRE(dropout == model.end() || dropout->is_null() || *dropout == 0, ExitCode::data,
                "{}: a \"dropout\" of merges is not supported; set it to null", kFile);
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    ARCUS_REQUIRE(json_text_or_none(kFile, model, key).empty(), ExitCode::data,
                  "{}: a \"{}\" is not supported", kFile, key);
  }
  byte_fallback = json_flag(kFile, model, "byte_fallback", false);
  ignore_merges = json_flag(kFile, model, "ignore_merges", false);
  read_vocab(model.contains("vocab") ? model.at("vocab") : json());
  read_merges(model.contains("merges") ? model.at("merges") : json());
}

void JsonTokenizer::Model::read_vocab(const json& node) {
  ARCUS_REQUIRE(node.is_object() && !node.empty(), ExitCode::data, "{}: the model has no \"vocab\"",
                kFile);
  const json& added = part("added_tokens");
  const std::size_t tokens = node.size() + (added.is_array() ? added.size() : 0);
  vocab.reserve(node.size());
  for (const auto& [token, id] : node.items()) vocab.emplace(token, read_id(id, token, tokens));
}

void JsonTokenizer::Model::read_merges(const json& node) {
  ARCUS_REQUIRE(node.is_array(), ExitCode::data, "{}: the model has no list \"merges\"", kFile);
  merges.reserve(node.size());
  for (const json& merge : node) merges.push_back(read_merge(merge, merges.size()));
}

/// One call of encode, so that what its parts share need not be handed on one by one.
struct JsonTokenizer::Call {
  std::vector<std::int32_t>& ids;
  Place place = Place::first;
  bool specials = false;
  std::unique_ptr<Scratch> scratch{};
};

JsonTokenizer::JsonTokenizer(TokenizerFiles files) : ImportedTokenizer(std::move(files)) {
  const auto found = files_.find(kFile);
  ARCUS_REQUIRE(found != files_.end(), ExitCode::data, "there is no {}", kFile);
  const Model model(found->second);
  normalizer_ = Normalizer(kFile, model.part("normalizer"));
  pre_tokenizer_ = PreTokenizer(kFile, model.part("pre_tokenizer"));
  byte_level_ = pre_tokenizer_.byte_level();
  ARCUS_REQUIRE(byte_level_ || model.byte_fallback, ExitCode::data,
                "{}: neither is the pre_tokenizer ByteLevel nor is byte_fallback true: text would "
                "be lost",
                kFile);
  read_added_tokens(model);
  find_eos(model);
  read_texts(model);
  read_decoder(model);
  make_model(model);
  find_safe_cuts(model);
}

JsonTokenizer::~JsonTokenizer() = default;

void JsonTokenizer::read_added_tokens(const Model& model) {
  const json& list = model.part("added_tokens");
  if (list.is_null()) return;
  ARCUS_REQUIRE(list.is_array(), ExitCode::data, "{}: \"added_tokens\" is no list", kFile);
  std::unordered_set<std::string> seen;
  for (const json& node : list) {
    AddedToken token;
    token.content = json_text(kFile, node, "content");
    token.id = read_id(node.contains("id") ? node.at("id") : json(), token.content,
                       model.vocab.size() + list.size());
    token.special = json_flag(kFile, node, "special", false);
    token.normalized = json_flag(kFile, node, "normalized", !token.special);
    token.single_word = json_flag(kFile, node, "single_word", false);
    token.lstrip = json_flag(kFile, node, "lstrip", false);
    token.rstrip = json_flag(kFile, node, "rstrip", false);
    const std::int32_t known = model.id_of(token.content);
    ARCUS_REQUIRE(known < 0 || known == token.id, ExitCode::data,
                  "{}: added token \"{}\" has id {}, in the vocabulary it has {}", kFile,
                  excerpt(token.content), token.id, known);
    ARCUS_REQUIRE(!token.content.empty() && seen.insert(token.content).second, ExitCode::data,
                  "{}: added token \"{}\" is empty or listed twice", kFile, excerpt(token.content));
    added_.push_back(std::move(token));
  }
}

void JsonTokenizer::find_eos(const Model& model) {
  const auto id_of = [&](const std::string& name) {
    for (const AddedToken& token : added_) {
      if (token.content == name) return token.id;
    }
    return model.id_of(name);
  };
  const std::string named = read_special_tokens(files_).eos;
  if (!named.empty()) {
    eos_id_ = id_of(named);
    ARCUS_REQUIRE(eos_id_ >= 0, ExitCode::data,
                  "the eos_token \"{}\" of tokenizer_config.json is no token of {}", excerpt(named),
                  kFile);
  }
  for (const std::string_view usual : kUsualEosTokens) {
    if (eos_id_ < 0) eos_id_ = id_of(std::string(usual));
  }
  ARCUS_REQUIRE(eos_id_ >= 0, ExitCode::data,
                "{}: no token ends a text; name one as \"eos_token\" in tokenizer_config.json",
                kFile);
  for (AddedToken& token : added_) token.special = token.special || token.id == eos_id_;
}

void JsonTokenizer::read_texts(const Model& model) {
  std::int32_t last = 0;
  for (const auto& [token, id] : model.vocab) last = std::max(last, id);
  for (const AddedToken& token : added_) last = std::max(last, token.id);
  texts_.resize(static_cast<std::size_t>(last) + 1);
  std::vector<bool> taken(texts_.size());
  for (const auto& [token, id] : model.vocab) {
    ARCUS_REQUIRE(!taken[id], ExitCode::data, "{}: token \"{}\" and another have id {}", kFile,
                  excerpt(token), id);
    taken[id] = true;
    std::string& text = texts_[id];
    if (byte_level_) {
      if (!unspell_bytes(token, text)) text = token;
    } else {
      const int byte = byte_of_piece(token);
      text = byte >= 0 ? std::string(1, static_cast<char>(byte)) : token;
    }
  }
  for (const AddedToken& token : added_) {
    const bool own = model.id_of(token.content) < 0;
    ARCUS_REQUIRE(!own || !taken[token.id], ExitCode::data,
                  "{}: added token \"{}\" and another have id {}", kFile, excerpt(token.content),
                  token.id);
    taken[token.id] = true;
    texts_[token.id] = token.special ? "" : token.content;
  }
  texts_[eos_id_].clear();
}

/// Tokens decode one by one; what joins them or looks at the whole text is refused, but for a
/// blank that is taken away from its begin.
void JsonTokenizer::read_decoder(const Model& model) {
  std::vector<const json*> steps;
  const json& decoder = model.part("decoder");
  if (decoder.is_object() && decoder.value("type", json()) == "Sequence") {
    const auto parts = decoder.find("decoders");
    ARCUS_REQUIRE(parts != decoder.end() && parts->is_array(), ExitCode::data,
                  "{}: a decoder \"Sequence\" lists no \"decoders\"", kFile);
    for (const json& part : *parts) steps.push_back(&part);
  } else if (!decoder.is_null()) {
    steps.push_back(&decoder);
  }
  const auto replace = [&](const std::string& from, const std::string& to) {
    ARCUS_REQUIRE(!from.empty(), ExitCode::data, "{}: a decoder replaces an empty text", kFile);
    std::size_t total = 0;
    for (std::string& text : texts_) {
      const std::size_t before = text.size();
      replace_in(text, from, to);
      total += text.size();
      // Real ones write a blank for U+2581.
      ARCUS_REQUIRE(text.size() <= 4 * before + 64 && total <= 4 * model.bytes, ExitCode::data,
                    "{}: a decoder makes more than four times the text of the tokens", kFile);
    }
  };
  for (const json* step : steps) {
    const std::string type = json_text(kFile, *step, "type");
    if (type == "ByteLevel" || type == "ByteFallback" || type == "Fuse") continue;
    if (!byte_level_ && type == "Replace" && step->contains("pattern")) {
      replace(json_text(kFile, step->at("pattern"), "String"), json_text(kFile, *step, "content"));
    } else if (!byte_level_ && type == "Metaspace") {
      replace(json_text(kFile, *step, "replacement"), " ");
      const std::string scheme = json_text_or_none(kFile, *step, "prepend_scheme");
      const bool never = scheme == "never" || !json_flag(kFile, *step, "add_prefix_space", true);
      stripped_blanks_ = never ? 0 : 1;
    } else if (!byte_level_ && type == "Strip" && json_text(kFile, *step, "content") == " " &&
               step->value("stop", json(0)) == 0) {
      const json start = step->value("start", json(0));
      ARCUS_REQUIRE(start.is_number_unsigned() && start.get<std::uint64_t>() <= 16, ExitCode::data,
                    "{}: decoder \"Strip\" begins with {}", kFile, start.dump().substr(0, 30));
      stripped_blanks_ = start.get<std::size_t>();
    } else {
      ARCUS_FAIL(ExitCode::data,
                 "{}: decoder \"{}\" is not supported here; ByteLevel is, and with byte_fallback "
                 "Replace, ByteFallback, Fuse, Metaspace and Strip of blanks at the begin",
                 kFile, excerpt(type));
    }
  }
}

void JsonTokenizer::make_model(const Model& model) {
  std::array<std::int32_t, 256> byte_ids{};
  IdOfText texts;
  for (int byte = 0; byte < 256; ++byte) {
    const char c = static_cast<char>(byte);
    byte_ids[byte] =
        model.id_of(byte_level_ ? spell_bytes({&c, 1}) : fmt::format("<0x{:02X}>", byte));
    ARCUS_REQUIRE(byte_level_ || byte_ids[byte] >= 0, ExitCode::data,
                  "{}: byte_fallback is true, but there is no token <0x{:02X}>: text would be lost",
                  kFile, byte);
    if (byte_ids[byte] == eos_id_) byte_ids[byte] = -1;
  }
  std::string bytes;
  for (const auto& [token, id] : model.vocab) {
    if (id == eos_id_) continue;
    if (!byte_level_ && byte_of_piece(token) < 0) texts.emplace(token, id);
    if (!model.ignore_merges) continue;
    if (!byte_level_) {
      whole_words_.emplace(token, id);
    } else if (unspell_bytes(token, bytes)) {
      whole_words_.emplace(bytes, id);
    }
  }
  std::vector<BpeModel::Merge> merges;
  merges.reserve(model.merges.size());
  for (std::size_t rank = 0; rank < model.merges.size(); ++rank) {
    const auto& [left, right] = model.merges[rank];
    const BpeModel::Merge merge{model.id_of(left), model.id_of(right), model.id_of(left + right)};
    ARCUS_REQUIRE(
        !left.empty() && !right.empty() && merge.left >= 0 && merge.right >= 0 && merge.id >= 0,
        ExitCode::data,
        "{}: merge {} joins \"{}\" and \"{}\": both and what they make must be tokens", kFile, rank,
        excerpt(left), excerpt(right));
    if (merge.id != eos_id_) merges.push_back(merge);  // text never gives EOS
  }
  bpe_ = std::make_unique<BpeModel>(byte_level_ ? BpeUnit::byte : BpeUnit::character, texts,
                                    byte_ids, merges);
  std::vector<AddedToken> in_text;
  std::vector<AddedToken> in_normalized;
  for (AddedToken token : added_) {
    if (token.normalized) token.content = normalizer_.apply(token.content, false);
    (token.normalized ? in_normalized : in_text).push_back(std::move(token));
  }
  in_text_ = AddedTokenFinder(std::move(in_text));
  in_normalized_ = AddedTokenFinder(std::move(in_normalized));
}

/// Texts are cut between a letter and a blank or line end, where the known pre-tokenizers always
/// end a word and look neither back nor ahead, and elsewhere no merge may reach over.
void JsonTokenizer::find_safe_cuts(const Model& model) {
  safe_cuts_ = normalizer_.is_local() && !pre_tokenizer_.adds_prefix_space();
  if (byte_level_) {
    const std::vector<std::string> patterns = pre_tokenizer_.isolated_patterns();
    const auto& known = known_pre_tokenizers();
    safe_cuts_ = safe_cuts_ && std::any_of(known.begin(), known.end(), [&](const auto& one) {
                   return std::equal(patterns.begin(), patterns.end(), one.patterns.begin(),
                                     one.patterns.end());
                 });
  } else {
    safe_cuts_ = safe_cuts_ && !model.ignore_merges &&
                 (pre_tokenizer_.empty() || pre_tokenizer_.is_metaspace_alone());
  }
  for (const AddedToken& token : added_) {
    if (token.special) continue;
    safe_cuts_ = safe_cuts_ && !token.rstrip;
    for (std::size_t at = 1; at < token.content.size(); ++at) {
      const bool blank = token.content[at] == ' ' || token.content[at] == '\n';
      if (blank && is_settled_letter(code_point_of(last_character(token.content.substr(0, at))))) {
        safe_cuts_ = false;
      }
    }
  }
}

bool JsonTokenizer::may_cut(std::string_view text, std::size_t at) const {
  if (text[at] != ' ' && text[at] != '\n') return false;
  const std::string_view left = last_character(text.substr(0, at));
  // What is no UTF-8 has no last character of its own: one that looks so is none of the settled.
  if (find_invalid_utf8(left) != std::string_view::npos) return false;
  if (!is_settled_letter(code_point_of(left))) return false;
  if (byte_level_ || (text[at] == ' ' && pre_tokenizer_.splits_at_blanks())) return true;
  std::string right = normalizer_.apply(text.substr(at, 1), /*continued=*/true);
  if (right == " " && pre_tokenizer_.has_metaspace()) right = pre_tokenizer_.metaspace();
  const std::string normal_left = normalizer_.apply(left, /*continued=*/true);
  return !right.empty() && !normal_left.empty() &&
         !bpe_->joins().may_join(code_point_of(last_character(normal_left)),
                                 code_point_of(first_character(right)));
}

std::size_t JsonTokenizer::cut(std::string_view text, std::size_t target) const {
  if (text.size() <= target || !safe_cuts_) return text.size();
  for (std::size_t at = target; at > 0; --at) {
    if (may_cut(text, at)) return at;
  }
  for (std::size_t at = target + 1; at < text.size(); ++at) {
    if (may_cut(text, at)) return at;
  }
  return text.size();
}

std::unique_ptr<BpeModel::Scratch> JsonTokenizer::borrow_scratch() const {
  const std::lock_guard lock(mutex_);
  if (scratch_.empty()) return std::make_unique<Scratch>();
  auto scratch = std::move(scratch_.back());
  scratch_.pop_back();
  return scratch;
}

void JsonTokenizer::return_scratch(std::unique_ptr<Scratch> scratch) const {
  const std::lock_guard lock(mutex_);
  scratch_.push_back(std::move(scratch));
}

void JsonTokenizer::encode(std::string_view text, std::vector<std::int32_t>& ids) const {
  Call call{ids};
  encode_text(text, call);
}

void JsonTokenizer::encode_rest(std::string_view text, std::vector<std::int32_t>& ids) const {
  Call call{ids, Place::continued};
  encode_text(text, call);
}

void JsonTokenizer::encode_marked(std::string_view text, std::vector<std::int32_t>& ids) const {
  Call call{ids, Place::first, /*specials=*/true};
  encode_text(text, call);
}

void JsonTokenizer::encode_text(std::string_view text, Call& call) const {
  call.scratch = borrow_scratch();
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t invalid = find_invalid_utf8(text.substr(at));
    const std::size_t bytes = std::min(invalid, text.size() - at);
    if (bytes > 0) {
      encode_valid(text.substr(at, bytes), at == 0 ? call.place : Place::continued, call);
    }
    at += bytes;
    if (at < text.size()) call.ids.push_back(bpe_->byte_id(static_cast<unsigned char>(text[at++])));
  }
  return_scratch(std::move(call.scratch));
}

void JsonTokenizer::encode_valid(std::string_view text, Place place, Call& call) const {
  const auto place_at = [](std::size_t begin, Place of_first) {
    return begin == 0 ? of_first : Place::later;
  };
  const auto on_token = [&](std::int32_t id) { call.ids.push_back(id); };
  const auto on_text = [&](std::size_t begin, std::size_t end) {
    const Place here = place_at(begin, place);
    const std::string_view segment = text.substr(begin, end - begin);
    std::string normalized;
    if (!normalizer_.empty()) normalized = normalizer_.apply(segment, here == Place::continued);
    const std::string_view whole = normalizer_.empty() ? segment : normalized;
    in_normalized_.split(
        whole, call.specials,
        [&](std::size_t from, std::size_t to) {
          encode_segment(whole.substr(from, to - from), place_at(from, here), call);
        },
        on_token);
  };
  in_text_.split(text, call.specials, on_text, on_token);
}

void JsonTokenizer::encode_segment(std::string_view text, Place place, Call& call) const {
  pre_tokenizer_.for_each_word(text, place,
                               [&](std::string_view word) { encode_word(word, call); });
}

void JsonTokenizer::encode_word(std::string_view word, Call& call) const {
  if (!whole_words_.empty()) {
    const auto found = whole_words_.find(word);
    if (found != whole_words_.end()) {
      call.ids.push_back(found->second);
      return;
    }
  }
  bpe_->encode(word, *call.scratch, call.ids);
}

std::string JsonTokenizer::decode(const std::vector<std::int32_t>& ids) const {
  std::string text;
  for (const std::int32_t id : ids) text += token_text(id);
  const std::size_t blanks = std::min(text.find_first_not_of(' '), text.size());
  return text.substr(std::min(blanks, stripped_blanks_));
}

JsonTokenizer::Spelling JsonTokenizer::spelling() const {
  const Model model(files_.at(kFile));
  Spelling spelling{.tokens = std::vector<std::string>(texts_.size()),
                    .added = added_,
                    .merges = model.merges,
                    .unk = json_text_or_none(kFile, model.part("model"), "unk_token"),
                    .byte_level = byte_level_,
                    .ignore_merges = model.ignore_merges,
                    .normalizer = &normalizer_,
                    .pre_tokenizer = &pre_tokenizer_};
  for (const auto& [token, id] : model.vocab) spelling.tokens[id] = token;
  for (const AddedToken& token : added_) spelling.tokens[token.id] = token.content;
  return spelling;
}

namespace {

std::string words_of(const PreTokenizer& pre_tokenizer, std::string_view text) {
  std::string joined;
  pre_tokenizer.for_each_word(text, Place::first, [&](std::string_view word) {
    joined += joined.empty() ? "" : "|";
    joined += word;
  });
  return joined;
}

}  // namespace

bool JsonTokenizer::puts_blank_in_front() const {
  const std::string text = words_of(pre_tokenizer_, normalizer_.apply("x", false));
  return text == "\xE2\x96\x81x";
}

/// Asked on texts, since there are several ways to say it.
bool JsonTokenizer::is_plain_sentencepiece() const {
  if (!whole_words_.empty() || normalizer_.is_nfc() || !normalizer_.is_local()) return false;
  const std::string prefix = puts_blank_in_front() ? "\xE2\x96\x81" : "";
  const auto expected = [&](std::string_view text) {
    std::string result = prefix;
    for (const char c : text) result += c == ' ' ? "\xE2\x96\x81" : std::string(1, c);
    return result;
  };
  for (const char* text : {"a", "a b", "a  b\n\n1234 e\xCC\x81 ", "\xE2\x84\xAB\t x."}) {
    std::string got = words_of(pre_tokenizer_, normalizer_.apply(text, false));
    // Where no merge begins a piece's second half with a blank, splitting there changes nothing.
    if (pre_tokenizer_.splits_at_blanks()) std::erase(got, '|');
    if (got != expected(text)) return false;
  }
  if (!pre_tokenizer_.splits_at_blanks()) return true;
  const Model model(files_.at(kFile));
  return std::none_of(model.merges.begin(), model.merges.end(),
                      [](const auto& merge) { return merge.second.starts_with("\xE2\x96\x81"); });
}

bool JsonTokenizer::post_processor_adds_bos() const {
  const std::string bos = read_special_tokens(files_).bos;
  const json root = parse_checked_json(kFile, files_.at(kFile));
  if (bos.empty() || !root.contains("post_processor")) return false;
  std::vector<json> steps{root.at("post_processor")};
  if (steps.front().is_object() && steps.front().contains("processors")) {
    const json list = steps.front().at("processors");
    steps.assign(list.begin(), list.end());
  }
  return std::any_of(steps.begin(), steps.end(), [&](const json& step) {
    if (!step.is_object() || !step.contains("single") || !step.at("single").is_array() ||
        step.at("single").empty()) {
      return false;
    }
    const json& first = step.at("single").front();
    return first.is_object() && first.contains("SpecialToken") &&
           first.at("SpecialToken").value("id", json()) == bos;
  });
}

}  // namespace arcus
