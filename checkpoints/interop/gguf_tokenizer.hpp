#pragma once

#include <map>
#include <memory>
#include <string>

#include "checkpoints/interop/gguf.hpp"
#include "src/data/tokenizer.hpp"

namespace arcus {

/// The tokenizer that the keys of a GGUF file describe; null for tokenizer.ggml.model "none" and
/// where there is none. "gpt2" becomes an equal tokenizer.json, "llama" an equal tokenizer.model.
/// Throws (data) naming the key that is wrong or not supported.
std::unique_ptr<Tokenizer> tokenizer_from_gguf_keys(const std::map<std::string, GgufValue>& keys);

}  // namespace arcus
