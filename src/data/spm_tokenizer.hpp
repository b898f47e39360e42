#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "src/data/tokenizer.hpp"

namespace sentencepiece {
class SentencePieceProcessor;
}

namespace arcus {

/// A SentencePiece BPE model used so that no text is lost. The library writes blanks as U+2581 and
/// so cannot tell the two apart: U+2581 itself, NUL and bytes that are no UTF-8 are spelled in byte
/// pieces around the library, and decoding works from the pieces' bytes.
class SpmTokenizer final : public Tokenizer {
 public:
  explicit SpmTokenizer(std::string model);
  ~SpmTokenizer() override;

  std::int64_t vocab_size() const override { return static_cast<std::int64_t>(pieces_.size()); }
  std::int32_t eos_id() const override { return eos_id_; }
  void encode(std::string_view text, std::vector<std::int32_t>& ids) const override;
  std::string decode(const std::vector<std::int32_t>& ids) const override;
  std::int64_t token_bytes(std::int32_t id) const override;
  std::string kind() const override { return "spm"; }
  std::string serialized() const override { return model_; }

 private:
  void read_pieces();
  void check_lossless() const;
  void encode_line(std::string_view line, std::vector<std::int32_t>& ids) const;
  void encode_plain(std::string_view text, std::vector<std::int32_t>& ids) const;
  const std::string& piece(std::int32_t id) const;

  std::string model_;
  std::unique_ptr<sentencepiece::SentencePieceProcessor> processor_;
  std::vector<std::string> pieces_;  ///< the text of each id
  std::array<std::int32_t, 256> byte_ids_{};
  std::int32_t eos_id_ = -1;
};

}  // namespace arcus
