#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "src/base/error.hpp"
#include "src/data/added_tokens.hpp"
#include "src/data/tokenizer.hpp"
#include "src/data/tokenizer_files.hpp"

namespace arcus {

/// A tokenizer of another program: its files, kept verbatim, and what each id stands for.
class ImportedTokenizer : public Tokenizer {
 public:
  std::int64_t vocab_size() const override { return static_cast<std::int64_t>(texts_.size()); }
  std::int32_t eos_id() const override { return eos_id_; }
  std::string token_text(std::int32_t id) const override {
    ARCUS_CHECK(id >= 0 && id < vocab_size(), "token {} is outside the vocabulary of {}", id,
                vocab_size());
    return texts_[static_cast<std::size_t>(id)];
  }
  std::int64_t token_bytes(std::int32_t id) const override {
    return static_cast<std::int64_t>(token_text(id).size());
  }
  std::string serialized() const override { return pack_tokenizer_files(files_); }
  const TokenizerFiles& files() const { return files_; }

 protected:
  explicit ImportedTokenizer(TokenizerFiles files) : files_(std::move(files)) {}

  TokenizerFiles files_;
  std::vector<std::string> texts_;  ///< what each id decodes to
  std::vector<AddedToken> added_;   ///< all of them, also those that are pieces
  std::int32_t eos_id_ = -1;
};

}  // namespace arcus
