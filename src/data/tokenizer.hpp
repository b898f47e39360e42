#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace arcus {

/// Text to token ids and back. decode(encode(x)) == x for all valid UTF-8 (without NUL characters
/// for "bytes"). Constant functions may be called from several threads at once.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  virtual std::int64_t vocab_size() const = 0;
  /// The id that ends a document; encode never gives it.
  virtual std::int32_t eos_id() const = 0;
  /// Appends the ids of `text` (no EOS) to `ids`.
  virtual void encode(std::string_view text, std::vector<std::int32_t>& ids) const = 0;
  /// Bytes of the ids; EOS and ids without text give none. One id may be part of a code point.
  virtual std::string decode(const std::vector<std::int32_t>& ids) const = 0;
  /// Number of bytes that one id decodes to.
  virtual std::int64_t token_bytes(std::int32_t id) const = 0;
  /// "bytes" or "spm".
  virtual std::string kind() const = 0;
  /// What `load_tokenizer` needs to make it again: empty for bytes, the model file's bytes for spm.
  virtual std::string serialized() const = 0;
  /// Hash of kind and serialized().
  std::uint64_t hash() const;
};

/// kind "bytes": id = byte, EOS = 0 (a NUL byte in text is refused by `prepare`). kind "spm": a
/// SentencePiece model with byte fallback and no normalisation, as `train_spm` makes them.
/// Throws (data) for another kind and for a model that would lose text.
std::unique_ptr<Tokenizer> load_tokenizer(const std::string& kind, const std::string& serialized);

/// No piece reaches over a line end, and longer lines are cut: so a text may be encoded part by
/// part with the same ids, if it is cut where encode_cut says.
inline constexpr std::size_t kMaxEncodePiece = std::size_t{1} << 16;

/// A cut of `text` (which starts at the text's begin or at a former cut), at most `target` bytes
/// from its begin where `target` >= kMaxEncodePiece; text.size() when that is not larger.
std::size_t encode_cut(std::string_view text, std::size_t target);

struct SpmTrainOptions {
  std::int64_t vocab_size = 0;
  double character_coverage = 0.9995;  ///< at most; rarer characters are spelled in bytes
};

/// Trains a SentencePiece BPE model on `lines` (each at most kMaxSpmLine bytes, with its line end)
/// and returns it as load_tokenizer's `serialized`. Throws (data) when the text does not yield
/// vocab_size pieces.
inline constexpr std::size_t kMaxSpmLine = 4096;
std::string train_spm(const std::vector<std::string>& lines, const SpmTrainOptions& options);

}  // namespace arcus
