#pragma once

#include <array>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "src/data/added_tokens.hpp"
#include "src/data/bpe_model.hpp"
#include "src/data/imported_tokenizer.hpp"
#include "src/data/spm_proto.hpp"

namespace sentencepiece {
class SentencePieceProcessor;
}

namespace arcus {

/// The tokenizer.model of another program, BPE or unigram, as the SentencePiece library does it:
/// with its rules for characters, and a blank in front of a text if it says so. It must have byte
/// fallback. Bytes that are no UTF-8, and NUL, are spelled in byte pieces around the library. Added
/// tokens are those of tokenizer_config.json and added_tokens.json.
class SentencePieceTokenizer final : public ImportedTokenizer {
 public:
  explicit SentencePieceTokenizer(TokenizerFiles files);
  ~SentencePieceTokenizer() override;

  void encode(std::string_view text, std::vector<std::int32_t>& ids) const override;
  void encode_rest(std::string_view text, std::vector<std::int32_t>& ids) const override;
  void encode_marked(std::string_view text, std::vector<std::int32_t>& ids) const override;
  std::size_t cut(std::string_view text, std::size_t target) const override;
  std::string decode(const std::vector<std::int32_t>& ids) const override;
  std::string kind() const override { return "sentencepiece"; }
  const SpmProto& proto() const { return proto_; }
  /// All of them, also those that are pieces.
  const std::vector<AddedToken>& added() const { return added_; }

 private:
  void read_pieces();
  void read_added_tokens();
  void find_eos();
  void find_safe_cuts();
  bool may_cut(std::string_view text, std::size_t at) const;
  void encode_text(std::string_view text, bool first, bool specials,
                   std::vector<std::int32_t>& ids) const;
  void encode_parts(std::string_view text, bool first, std::vector<std::int32_t>& ids) const;
  void encode_plain(std::string_view text, bool first, std::vector<std::int32_t>& ids) const;

  SpmProto proto_;
  /// As it is, and for what follows other text.
  std::unique_ptr<sentencepiece::SentencePieceProcessor> first_, rest_;
  std::array<std::int32_t, 256> byte_ids_{};
  AddedTokenFinder finder_;
  CharacterJoins joins_;
  bool safe_cuts_ = false;
};

}  // namespace arcus
