#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "src/base/dtype.hpp"
#include "src/data/manifest.hpp"
#include "src/data/tokenizer.hpp"

namespace arcus {

/// One domain's tokens of one split, memory-mapped: documents one after the other, each ending with
/// EOS. num_tokens may exceed 2^31. Constant functions may be called from several threads at once.
class TokenFile {
 public:
  TokenFile();
  ~TokenFile();
  TokenFile(TokenFile&&) noexcept;
  std::int64_t num_tokens() const;
  std::int64_t num_documents() const;
  /// UTF-8 bytes of the text the tokens stand for (EOS counts none).
  std::int64_t num_bytes() const;
  /// Whether it says which tokens are learned: those of answers, not those of prompts.
  bool is_masked() const;
  /// Tokens that may be learned in [begin, end).
  std::int64_t num_targets(std::int64_t begin, std::int64_t end) const;
  /// Puts -1 in place of those of `tokens`, from token `begin` on, that must not be learned.
  void mask(std::int64_t begin, std::span<std::int32_t> tokens) const;
  /// Copies tokens [begin, begin + out.size()). Throws (data) for an id outside the vocabulary.
  void read(std::int64_t begin, std::span<std::int32_t> out) const;
  /// First token of the document that token `index` belongs to.
  std::int64_t document_begin(std::int64_t index) const;
  /// Token range [begin, end) of a document, EOS included.
  std::pair<std::int64_t, std::int64_t> document_range(std::int64_t document) const;

 private:
  friend class TokenDataset;
  struct Impl;
  explicit TokenFile(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

/// A folder made by `arcus prepare` (FORMAT.md).
class TokenDataset {
 public:
  /// Checks presence, sizes, headers and document boundaries of all files; `verify` also reads
  /// every token and compares checksums. Throws (data) naming the file and what is wrong with it.
  static TokenDataset open(const std::filesystem::path& dir, bool verify = false);

  std::int64_t vocab_size() const { return vocab_size_; }
  const Tokenizer& tokenizer() const { return *tokenizer_; }
  /// Hash of tokenizer and domains: a checkpoint remembers which data it was trained on.
  std::uint64_t fingerprint() const { return fingerprint_; }
  const std::vector<std::string>& domains() const { return domains_; }
  /// Index of a domain; throws (usage), listing the domains, for an unknown one.
  std::size_t domain_idx(const std::string& name) const;
  const TokenFile& file(std::size_t domain_idx, Split split) const;
  /// tokenizer().token_bytes of every id.
  std::span<const std::int64_t> token_bytes() const { return token_bytes_; }
  /// The files' records, for reports.
  const Manifest& manifest() const { return manifest_; }

 private:
  std::int64_t vocab_size_ = 0;
  std::uint64_t fingerprint_ = 0;
  std::shared_ptr<const Tokenizer> tokenizer_;
  std::vector<std::string> domains_;
  std::vector<TokenFile> train_, valid_;
  std::vector<std::int64_t> token_bytes_;
  Manifest manifest_;
};

}  // namespace arcus
