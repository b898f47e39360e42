#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace arcus {

/// Text to token ids and back. decode(encode(x)) == x for all valid UTF-8.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  virtual std::int64_t vocab_size() const = 0;
  virtual std::int32_t eos_id() const = 0;
  /// Appends the ids of `text` (no EOS) to `ids`.
  virtual void encode(std::string_view text, std::vector<std::int32_t>& ids) const = 0;
  /// Bytes of the ids; EOS gives none.
  virtual std::string decode(const std::vector<std::int32_t>& ids) const = 0;
  /// "bytes" or "spm".
  virtual std::string kind() const = 0;
  /// What `load_tokenizer` needs to make it again: empty for bytes, the model file's bytes for spm.
  virtual std::string serialized() const = 0;
};

/// kind "bytes": id = byte, EOS = 0 (a NUL byte in text is refused by `prepare`).
std::unique_ptr<Tokenizer> load_tokenizer(const std::string& kind, const std::string& serialized);

}  // namespace arcus
