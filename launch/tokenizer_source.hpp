#pragma once

#include <memory>
#include <string>

#include "src/data/tokenizer.hpp"

namespace arcus {

/// What a command line may name as a tokenizer besides one to train.
inline constexpr const char* kTokenizerSources =
    "bytes, hf:DIR, model:FILE, gguf:FILE, checkpoint:PATH or data:DIR";
/// The same for the foot of a help text.
inline constexpr const char* kTokenizerSourcesExplained =
    "Tokenizers: hf:DIR is a Hugging Face directory or its tokenizer.json, model:FILE a\n"
    "tokenizer.model of SentencePiece, gguf:FILE the vocabulary of such a file, checkpoint:PATH "
    "and\n"
    "data:DIR what a run or a data set was made with.\n";

/// "bytes", "hf:DIR", "hf:DIR/tokenizer.json", "model:FILE", "gguf:FILE", "checkpoint:PATH" (a run
/// or a checkpoint) or "data:DIR" (a data set); null for anything else. Throws where there is none.
std::unique_ptr<Tokenizer> open_tokenizer_source(const std::string& source);

}  // namespace arcus
