#pragma once

#include <map>
#include <optional>
#include <string>
#include <string_view>

namespace arcus {

/// The files of a tokenizer that another program made, by name: tokenizer.json,
/// tokenizer_config.json, tokenizer.model, ...
using TokenizerFiles = std::map<std::string, std::string>;

/// The files in one text (FORMAT.md, "Tokenizer files") and back, byte for byte; unpacking throws
/// (data) for what `pack` did not write.
std::string pack_tokenizer_files(const TokenizerFiles& files);
TokenizerFiles unpack_tokenizer_files(std::string_view packed);

/// What tokenizer_config.json, special_tokens_map.json and chat_template.jinja say of the special
/// tokens; "" for those that are not named.
struct SpecialTokens {
  std::string bos, eos, unk, pad;
  std::optional<bool> add_bos, add_eos;
  std::string chat_template;
};

/// Throws (data) naming the file for JSON that is none or has values of the wrong type.
SpecialTokens read_special_tokens(const TokenizerFiles& files);

/// Names that end a document where no file says so, the first one that a vocabulary has.
inline constexpr std::string_view kUsualEosTokens[] = {"</s>", "<|endoftext|>", "<|end_of_text|>",
                                                       "<eos>"};

}  // namespace arcus
