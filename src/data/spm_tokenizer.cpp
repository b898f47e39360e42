#include "src/data/spm_tokenizer.hpp"

#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>

#include <algorithm>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "src/base/error.hpp"
#include "src/data/spm_proto.hpp"
#include "src/data/utf8.hpp"

namespace arcus {
namespace {

constexpr std::int64_t kNumSpecialPieces = 258;  // 256 bytes, unknown, end of document

absl::string_view view(std::string_view text) { return {text.data(), text.size()}; }

/// Finds what the library must not see: U+2581, NUL and bytes that are no UTF-8. Each kind's next
/// place is remembered, so that a text is scanned once whatever it holds.
class SpecialFinder {
 public:
  explicit SpecialFinder(std::string_view text) : text_(text) { refresh(0); }

  struct Found {
    std::size_t begin;  ///< text.size() when there is no more
    std::size_t end;
  };
  /// The first one at or after `from`; `from` never decreases.
  Found next(std::size_t from) {
    refresh(from);
    const std::size_t begin = std::min({invalid_, nul_, blank_, text_.size()});
    const std::size_t bytes = begin == blank_ ? kSpmBlank.size() : 1;
    return {begin, std::min(begin + bytes, text_.size())};
  }

 private:
  void refresh(std::size_t from) {
    if (first_ || invalid_ < from) {
      const std::size_t found = find_invalid_utf8(text_.substr(from));
      invalid_ = found == std::string_view::npos ? found : from + found;
    }
    if (first_ || nul_ < from) nul_ = text_.find('\0', from);
    if (first_ || blank_ < from) blank_ = text_.find(kSpmBlank, from);
    first_ = false;
  }

  std::string_view text_;
  bool first_ = true;
  std::size_t invalid_ = 0, nul_ = 0, blank_ = 0;
};

/// Calls `fn` for the characters of valid UTF-8, in order.
template <class Fn>
void for_each_character(std::string_view text, const Fn& fn) {
  for (std::size_t at = 0; at < text.size();) {
    std::size_t end = at + 1;
    while (end < text.size() && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) ++end;
    fn(text.substr(at, end - at));
    at = end;
  }
}

/// The commonest characters: enough to cover `coverage` of the text, but no more than leave half of
/// the learned pieces for longer ones, so that a script of many characters cannot fill a small
/// vocabulary.
std::unordered_set<std::string_view> common_characters(const std::vector<std::string>& lines,
                                                       const SpmTrainOptions& options) {
  std::unordered_map<std::string_view, std::int64_t> counts;
  std::int64_t total = 0;
  for (const std::string& line : lines) {
    for_each_character(line, [&](std::string_view character) {
      ++counts[character];
      ++total;
    });
  }
  std::vector<std::pair<std::int64_t, std::string_view>> by_count;
  by_count.reserve(counts.size());
  for (const auto& [character, count] : counts) by_count.emplace_back(-count, character);
  std::sort(by_count.begin(), by_count.end());
  const auto affordable = static_cast<std::size_t>((options.vocab_size - kNumSpecialPieces) / 2);
  const double enough = options.character_coverage * static_cast<double>(total);
  std::unordered_set<std::string_view> common;
  std::int64_t covered = 0;
  for (const auto& [negative_count, character] : by_count) {
    if (common.size() >= affordable || static_cast<double>(covered) >= enough) break;
    common.insert(character);
    covered -= negative_count;
  }
  return common;
}

/// The lines, split where a rare character is left out. (The library's own character_coverage
/// accepts no less than 0.98 and does not look at the vocabulary's size.)
std::vector<std::string> without_rare_characters(const std::vector<std::string>& lines,
                                                 const SpmTrainOptions& options) {
  const auto common = common_characters(lines, options);
  std::vector<std::string> result;
  for (const std::string& line : lines) {
    std::string part;
    for_each_character(line, [&](std::string_view character) {
      if (common.contains(character)) {
        part += character;
      } else if (!part.empty()) {
        result.push_back(std::exchange(part, {}));
      }
    });
    if (!part.empty()) result.push_back(std::move(part));
  }
  return result;
}

class LineIterator final : public sentencepiece::SentenceIterator {
 public:
  explicit LineIterator(const std::vector<std::string>& lines) : lines_(lines) {}
  bool done() const override { return next_ >= lines_.size(); }
  void Next() override { ++next_; }
  const std::string& value() const override { return lines_[next_]; }
  sentencepiece::util::Status status() const override { return {}; }

 private:
  const std::vector<std::string>& lines_;
  std::size_t next_ = 0;
};

}  // namespace

SpmTokenizer::SpmTokenizer(std::string model)
    : model_(std::move(model)),
      processor_(std::make_unique<sentencepiece::SentencePieceProcessor>()) {
  read_spm_proto(model_);  // throws where the library would trust damaged rules
  const auto status = processor_->LoadFromSerializedProto(view(model_));
  ARCUS_REQUIRE(status.ok(), ExitCode::data,
                "the tokenizer model ({} bytes) is no SentencePiece model: {}", model_.size(),
                status.ToString());
  read_pieces();
  check_lossless();
}

SpmTokenizer::~SpmTokenizer() = default;

void SpmTokenizer::read_pieces() {
  byte_ids_.fill(-1);
  eos_id_ = processor_->eos_id();
  ARCUS_REQUIRE(eos_id_ >= 0, ExitCode::data,
                "the SentencePiece model has no end-of-sentence piece, which ends documents");
  pieces_.resize(static_cast<std::size_t>(processor_->GetPieceSize()));
  for (int id = 0; id < processor_->GetPieceSize(); ++id) {
    const std::string& name = processor_->IdToPiece(id);
    if (processor_->IsByte(id)) {
      const int value = byte_of_piece(name);
      ARCUS_REQUIRE(value >= 0, ExitCode::data,
                    "byte piece {} of the SentencePiece model is \"{}\"", id, name);
      pieces_[id] = std::string(1, static_cast<char>(value));
      byte_ids_[value] = id;
    } else if (!processor_->IsControl(id) && !processor_->IsUnknown(id)) {
      pieces_[id] = with_blanks(name);
    }
  }
  ARCUS_REQUIRE(std::find(byte_ids_.begin(), byte_ids_.end(), -1) == byte_ids_.end(),
                ExitCode::data, "the SentencePiece model has no byte fallback: text would be lost");
}

void SpmTokenizer::check_lossless() const {
  // Leading, inner and trailing blanks, line ends, and characters that normalisation rewrites.
  const std::string sample = "  a \t b\r\n\n\xC2\xA0\xEF\xAC\x81\xE2\x84\xAB x\xCC\x88  ";
  std::vector<std::int32_t> ids;
  encode(sample, ids);
  ARCUS_REQUIRE(decode(ids) == sample, ExitCode::data,
                "the SentencePiece model normalises text and would lose some: train it with "
                "normalization_rule_name=identity, remove_extra_whitespaces=false and "
                "add_dummy_prefix=false");
}

void SpmTokenizer::encode(std::string_view text, std::vector<std::int32_t>& ids) const {
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t line_end = text.find('\n', begin);
    const std::size_t end = line_end == std::string_view::npos ? text.size() : line_end + 1;
    while (begin < end) {
      const std::string_view rest = text.substr(begin, end - begin);
      const std::size_t bytes = encode_cut(rest, kMaxEncodePiece);
      encode_line(rest.substr(0, bytes), ids);
      begin += bytes;
    }
  }
}

void SpmTokenizer::encode_line(std::string_view line, std::vector<std::int32_t>& ids) const {
  SpecialFinder specials(line);
  for (std::size_t at = 0; at < line.size();) {
    const auto special = specials.next(at);
    encode_plain(line.substr(at, special.begin - at), ids);
    for (const char c : line.substr(special.begin, special.end - special.begin)) {
      ids.push_back(byte_ids_[static_cast<unsigned char>(c)]);
    }
    at = special.end;
  }
}

void SpmTokenizer::encode_plain(std::string_view text, std::vector<std::int32_t>& ids) const {
  if (text.empty()) return;
  std::vector<int> found;
  const auto status = processor_->Encode(view(text), &found);
  ARCUS_CHECK(status.ok(), "SentencePiece cannot encode: {}", status.ToString());
  ids.insert(ids.end(), found.begin(), found.end());
}

const std::string& SpmTokenizer::piece(std::int32_t id) const {
  ARCUS_CHECK(id >= 0 && id < vocab_size(), "token {} is outside the vocabulary of {}", id,
              vocab_size());
  return pieces_[static_cast<std::size_t>(id)];
}

std::string SpmTokenizer::decode(const std::vector<std::int32_t>& ids) const {
  std::string text;
  for (const std::int32_t id : ids) text += piece(id);
  return text;
}

std::int64_t SpmTokenizer::token_bytes(std::int32_t id) const {
  return static_cast<std::int64_t>(piece(id).size());
}

std::string train_spm(const std::vector<std::string>& lines, const SpmTrainOptions& options) {
  ARCUS_REQUIRE(options.vocab_size > kNumSpecialPieces && options.vocab_size <= (1 << 20),
                ExitCode::usage,
                "a SentencePiece vocabulary of {} pieces is impossible: it holds 256 bytes, two "
                "special pieces and the learned ones, at most 2^20; try spm:8192",
                options.vocab_size);
  const std::vector<std::string> common = without_rare_characters(lines, options);
  const std::unordered_map<std::string, std::string> arguments{
      {"model_type", "bpe"},
      {"vocab_size", std::to_string(options.vocab_size)},
      {"character_coverage", "1.0"},
      {"byte_fallback", "true"},
      {"split_digits", "true"},
      {"allow_whitespace_only_pieces", "true"},  // indentation
      {"normalization_rule_name", "identity"},
      {"remove_extra_whitespaces", "false"},
      {"add_dummy_prefix", "false"},
      {"max_sentence_length", std::to_string(kMaxSpmLine)},
      {"unk_id", "0"},
      {"eos_id", "1"},
      {"bos_id", "-1"},
      {"pad_id", "-1"},
      {"num_threads", "1"},
      {"minloglevel", "2"}};
  LineIterator iterator(common);
  std::string model;
  const auto status = sentencepiece::SentencePieceTrainer::Train(arguments, &iterator, &model);
  ARCUS_REQUIRE(status.ok(), ExitCode::data,
                "the text does not yield a SentencePiece vocabulary of {} pieces ({}); give more "
                "text or a vocabulary of another size",
                options.vocab_size, status.ToString());
  return model;
}

}  // namespace arcus
