#include "src/data/tokenizer.hpp"

#include <algorithm>

#include "src/base/error.hpp"
#include "src/data/json_tokenizer.hpp"
#include "src/data/sentencepiece_tokenizer.hpp"
#include "src/data/spm_tokenizer.hpp"
#include "src/data/tokenizer_files.hpp"
#include "src/data/utf8.hpp"

namespace arcus {
namespace {

class ByteTokenizer final : public Tokenizer {
 public:
  std::int64_t vocab_size() const override { return 256; }
  std::int32_t eos_id() const override { return 0; }

  void encode(std::string_view text, std::vector<std::int32_t>& ids) const override {
    const std::size_t nul = text.find('\0');
    ARCUS_REQUIRE(
        nul == std::string_view::npos, ExitCode::data,
        "the text has a NUL byte at offset {}, which the tokenizer \"bytes\" needs as end "
        "of document; remove it or use the tokenizer spm:VOCAB",
        nul);
    const std::size_t begin = ids.size();
    ids.resize(begin + text.size());
    std::transform(text.begin(), text.end(), ids.begin() + static_cast<std::ptrdiff_t>(begin),
                   [](char c) { return static_cast<unsigned char>(c); });
  }

  std::string decode(const std::vector<std::int32_t>& ids) const override {
    std::string text;
    text.reserve(ids.size());
    for (const std::int32_t id : ids) {
      if (token_bytes(id) > 0) text.push_back(static_cast<char>(id));
    }
    return text;
  }

  std::int64_t token_bytes(std::int32_t id) const override {
    ARCUS_CHECK(id >= 0 && id < 256, "token {} is no byte", id);
    return id == eos_id() ? 0 : 1;
  }

  std::string kind() const override { return "bytes"; }
  std::string serialized() const override { return {}; }
};

}  // namespace

std::unique_ptr<Tokenizer> load_tokenizer(const std::string& kind, const std::string& serialized) {
  if (kind == "bytes") return std::make_unique<ByteTokenizer>();
  if (kind == "spm") return std::make_unique<SpmTokenizer>(serialized);
  if (kind == "tokenizer_json") {
    return std::make_unique<JsonTokenizer>(unpack_tokenizer_files(serialized));
  }
  if (kind == "sentencepiece") {
    return std::make_unique<SentencePieceTokenizer>(unpack_tokenizer_files(serialized));
  }
  ARCUS_FAIL(ExitCode::data,
             "unknown tokenizer kind \"{}\"; known: bytes, spm, tokenizer_json, sentencepiece",
             kind);
}

}  // namespace arcus
