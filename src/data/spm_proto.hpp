#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace arcus {

/// What a tokenizer.model of SentencePiece holds (its ModelProto), as far as other formats and the
/// cutting of texts need it. GGUF counts the types of pieces likewise.
struct SpmProto {
  enum Type : std::int32_t {
    normal = 1,
    unknown = 2,
    control = 3,
    user_defined = 4,
    unused = 5,
    byte = 6
  };
  enum Model : std::int32_t { unigram = 1, bpe = 2, word = 3, character = 4 };
  struct Piece {
    std::string text;
    float score = 0;
    std::int32_t type = normal;
  };
  std::vector<Piece> pieces;
  std::int32_t model = unigram;
  bool byte_fallback = false;
  bool blank_is_suffix = false;  ///< treat_whitespace_as_suffix
  std::string unk_piece = "<unk>", bos_piece = "<s>", eos_piece = "</s>", pad_piece = "<pad>";
  bool has_rules = false;  ///< characters are rewritten
  bool add_dummy_prefix = true;
  bool remove_extra_whitespaces = true;
  bool escape_whitespaces = true;
};

/// Throws (data) for what is no such model.
SpmProto read_spm_proto(std::string_view model);
/// A model without rules, as SentencePiece reads it.
std::string write_spm_proto(const SpmProto& proto);
/// The model without a blank in front of texts.
std::string without_dummy_prefix(std::string model);

/// The byte that "<0xE2>" names; -1 for another piece.
int byte_of_piece(std::string_view piece);

/// How SentencePiece writes a blank: U+2581.
inline constexpr std::string_view kSpmBlank = "\xE2\x96\x81";
/// A piece's text with blanks for U+2581.
std::string with_blanks(std::string_view piece);

}  // namespace arcus
