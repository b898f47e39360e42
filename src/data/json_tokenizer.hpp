#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "src/data/added_tokens.hpp"
#include "src/data/bpe_model.hpp"
#include "src/data/imported_tokenizer.hpp"
#include "src/data/normalizer.hpp"
#include "src/data/pre_tokenizer.hpp"

namespace arcus {

/// A Hugging Face tokenizer.json of model type BPE, byte-level (GPT-2, Qwen, Llama 3) or with byte
/// fallback (Llama 2, Mixtral). Ids equal those of the Python package `tokenizers` without special
/// tokens around the text. The post-processor is kept and not applied.
class JsonTokenizer final : public ImportedTokenizer {
 public:
  /// `files` has tokenizer.json and what names the special tokens. Throws (data) naming the part
  /// that is wrong or not supported.
  explicit JsonTokenizer(TokenizerFiles files);
  ~JsonTokenizer() override;

  void encode(std::string_view text, std::vector<std::int32_t>& ids) const override;
  void encode_rest(std::string_view text, std::vector<std::int32_t>& ids) const override;
  void encode_marked(std::string_view text, std::vector<std::int32_t>& ids) const override;
  std::size_t cut(std::string_view text, std::size_t target) const override;
  std::string decode(const std::vector<std::int32_t>& ids) const override;
  std::string kind() const override { return "tokenizer_json"; }

  /// The tokenizer as its file spells it, for what writes it in another format.
  struct Spelling {
    std::vector<std::string> tokens;  ///< by id; "" where there is none
    std::vector<AddedToken> added;
    std::vector<std::pair<std::string, std::string>> merges;
    std::string unk;  ///< the token for what has none
    bool byte_level = false;
    bool ignore_merges = false;
    const Normalizer* normalizer = nullptr;
    const PreTokenizer* pre_tokenizer = nullptr;
  };
  Spelling spelling() const;
  /// With byte fallback: a blank in front of every text, and whether that and U+2581 for blanks is
  /// all that happens to a text before it is merged as a whole.
  bool puts_blank_in_front() const;
  bool is_plain_sentencepiece() const;
  /// Whether the post-processor puts the BOS token of tokenizer_config.json before a text.
  bool post_processor_adds_bos() const;

 private:
  struct Model;  ///< what tokenizer.json's "model" says
  struct Call;   ///< one call of encode
  using Scratch = BpeModel::Scratch;

  void read_added_tokens(const Model& model);
  void read_texts(const Model& model);
  void read_decoder(const Model& model);
  void find_eos(const Model& model);
  void make_model(const Model& model);
  void find_safe_cuts(const Model& model);
  std::unique_ptr<Scratch> borrow_scratch() const;
  void return_scratch(std::unique_ptr<Scratch> scratch) const;

  void encode_text(std::string_view text, Call& call) const;
  void encode_valid(std::string_view text, PreTokenizer::Place place, Call& call) const;
  void encode_segment(std::string_view text, PreTokenizer::Place place, Call& call) const;
  void encode_word(std::string_view word, Call& call) const;
  bool may_cut(std::string_view text, std::size_t at) const;

  AddedTokenFinder in_text_, in_normalized_;
  Normalizer normalizer_;
  PreTokenizer pre_tokenizer_;
  std::unique_ptr<BpeModel> bpe_;
  IdOfText whole_words_;  ///< with ignore_merges
  bool byte_level_ = false;
  bool safe_cuts_ = false;
  std::size_t stripped_blanks_ = 0;  ///< of a decoded text's begin
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Scratch>> scratch_;
};

/// The GPT-2 alphabet, in which byte-level tokens are spelled: printable ASCII and Latin-1 stand
/// for themselves, other bytes for U+0100 and on.
std::string spell_bytes(std::string_view bytes);
/// Back; false where `spelled` has another character.
bool unspell_bytes(std::string_view spelled, std::string& bytes);

}  // namespace arcus
