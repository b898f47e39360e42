#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace arcus {

/// Text to token ids and back. Constant functions may be called from several threads at once.
///
/// decode(encode(x)) == x, and the token_bytes of encode(x) add up to x's bytes:
/// - for all texts with "bytes" (NUL is refused) and "spm";
/// - with "tokenizer_json" and "sentencepiece" for the text as the tokenizer normalises it (NFC, a
///   blank put in front, which decode takes away where the tokenizer's decoder does). One with a
///   U+2581 for blanks cannot tell the character U+2581 from a blank. A tokenizer without the token
///   of a byte refuses a text that has it; nothing is lost in silence. Bytes that are no UTF-8 are
///   kept, spelled in byte tokens.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  virtual std::int64_t vocab_size() const = 0;
  /// The id that ends a document; encode never gives it.
  virtual std::int32_t eos_id() const = 0;
  /// Appends the ids of `text` (no BOS, no EOS) to `ids`. Special tokens that the text spells, such
  /// as "<|endoftext|>", are text like any other.
  virtual void encode(std::string_view text, std::vector<std::int32_t>& ids) const = 0;
  /// The same for a text that goes on from another: nothing is put in front of it.
  virtual void encode_rest(std::string_view text, std::vector<std::int32_t>& ids) const {
    encode(text, ids);
  }
  /// The same for a text written by a chat template: special tokens that it spells become their
  /// ids, EOS too.
  virtual void encode_marked(std::string_view text, std::vector<std::int32_t>& ids) const {
    encode(text, ids);
  }
  /// A place to cut `text` (which begins at its own begin or at a former cut), so that encode_rest
  /// of what follows gives the ids of the whole: at most `target` bytes from its begin where
  /// `target` >= kMaxEncodePiece and the text has such a place; text.size() where it has none.
  virtual std::size_t cut(std::string_view text, std::size_t target) const;
  /// Bytes of the ids; EOS and ids without text give none. One id may be part of a code point.
  virtual std::string decode(const std::vector<std::int32_t>& ids) const = 0;
  /// What one id adds to a text.
  virtual std::string token_text(std::int32_t id) const { return decode({id}); }
  /// Its bytes.
  virtual std::int64_t token_bytes(std::int32_t id) const = 0;
  /// "bytes", "spm", "tokenizer_json" or "sentencepiece".
  virtual std::string kind() const = 0;
  /// What `load_tokenizer` needs to make it again: empty for bytes, the model file's bytes for spm,
  /// the packed files (tokenizer_files.hpp) for the others.
  virtual std::string serialized() const = 0;
  /// Hash of kind and serialized().
  std::uint64_t hash() const;
};

/// kind "bytes": id = byte, EOS = 0 (a NUL byte in text is refused by `prepare`). kind "spm": a
/// SentencePiece model with byte fallback and no normalisation, as `train_spm` makes them. kinds
/// "tokenizer_json" and "sentencepiece": files of another program, with tokenizer.json or
/// tokenizer.model among them. Throws (data) for another kind, for a model that would lose text and
/// for parts of a tokenizer that Arcus does not do, by name.
std::unique_ptr<Tokenizer> load_tokenizer(const std::string& kind, const std::string& serialized);

/// With "bytes" and "spm" no piece reaches over a line end, and longer lines are cut: so a text may
/// be encoded part by part with the same ids, if it is cut where encode_cut says.
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
