#include "src/data/sentencepiece_tokenizer.hpp"
#include "tests/fuzz/fuzz.hpp"

/// A tokenizer.model. What is taken must encode any text to ids of its vocabulary.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace arcus;
  static const char kText[] = "It's 12  a\r\n\n\xE4\xB8\xAD\xE2\x96\x81 e\xCC\x81\xFF<s>\0";
  const std::string_view input = fuzz::view(data, size);
  fuzz::takes_or_refuses([&] {
    const SentencePieceTokenizer tokenizer({{"tokenizer.model", std::string(input)}});
    for (const std::string_view text :
         {std::string_view(kText, sizeof kText - 1), input.substr(0, 100)}) {
      fuzz::takes_or_refuses([&] {
        std::vector<std::int32_t> ids;
        tokenizer.encode(text, ids);
        tokenizer.encode_marked(text, ids);
        tokenizer.decode(ids);
        const std::size_t cut = tokenizer.cut(text, text.size() / 2);
        if (cut > text.size() || (cut == 0 && !text.empty())) std::abort();
      });
    }
    if (tokenizer.token_bytes(tokenizer.eos_id()) != 0) std::abort();
    write_spm_proto(tokenizer.proto());
  });
  return 0;
}
