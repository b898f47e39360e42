#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "checkpoints/interop/gguf.hpp"
#include "src/data/tokenizer.hpp"
#include "src/data/tokenizer_files.hpp"

namespace arcus {

/// Ids that other programs make with these files are those of Arcus, for texts that they can tell
/// apart:
/// - "bytes": texts without NUL, whose id ends a text.
/// - "spm": texts without U+2581 (a blank there), of valid UTF-8, with lines of up to 64 KiB (Arcus
///   cuts longer ones, the others do not).
/// - All: programs that take special tokens spelled in a text ("</s>") for these tokens give their
///   ids; to Arcus they are text unless encode_marked is asked.
/// - GGUF: llama.cpp composes no characters where a tokenizer.json says NFC, and its pre-tokenizer
///   "gpt-4o" splits words at combining marks.

/// What a Hugging Face directory says of its tokenizer: tokenizer.json, tokenizer_config.json,
/// special_tokens_map.json, tokenizer.model, chat_template.jinja, vocab.json, merges.txt, as far as
/// they are there: those of an imported tokenizer verbatim. Ids [tokenizer.vocab_size(),
/// vocab_size) become [PADn].
TokenizerFiles hf_tokenizer_files(const Tokenizer& tokenizer, std::int64_t vocab_size);
/// The same as GGUF keys (tokenizer.ggml.* and tokenizer.chat_template), in order.
std::vector<std::pair<std::string, GgufValue>> gguf_tokenizer_keys(const Tokenizer& tokenizer,
                                                                   std::int64_t vocab_size);

/// Names of tokenizer files that an import keeps, as far as a directory has them.
const std::vector<std::string>& hf_tokenizer_file_names();
/// The tokenizer of a Hugging Face directory, from its files; null where there is none. Throws
/// (data) for one whose parts Arcus cannot do, naming them.
std::unique_ptr<Tokenizer> tokenizer_from_hf(const TokenizerFiles& files);
/// The tokenizer of a GGUF file; null where there is none (tokenizer.ggml.model "none").
std::unique_ptr<Tokenizer> tokenizer_from_gguf(const GgufFile& file);

}  // namespace arcus
