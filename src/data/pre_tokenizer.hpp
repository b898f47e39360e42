#pragma once

#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "src/data/regex.hpp"

namespace arcus {

/// The "pre_tokenizer" of a tokenizer.json: how a text is split into words that are encoded each
/// for itself. Split, Digits, Punctuation, Metaspace, ByteLevel and sequences of these; others are
/// refused by name. Works on valid UTF-8.
class PreTokenizer {
 public:
  PreTokenizer() = default;
  /// Throws (data) naming `file` and the part that is not supported.
  PreTokenizer(const std::string& file, const nlohmann::json& node);

  /// Where a text stands: nothing is put in front of one that goes on from another, and some put a
  /// blank in front of the first of all alone.
  enum class Place { first, later, continued };
  using Word = std::function<void(std::string_view)>;
  /// Calls `word` for the words of `text` in order; a word lives as long as the call.
  void for_each_word(std::string_view text, Place place, const Word& word) const;

  /// Whether ByteLevel is the last step: words are bytes of the GPT-2 alphabet.
  bool byte_level() const { return byte_level_; }
  bool adds_prefix_space() const { return adds_prefix_space_; }
  /// Metaspace's, if it is there: words begin at its blanks.
  bool has_metaspace() const { return !metaspace_.empty(); }
  bool is_metaspace_alone() const {
    return has_metaspace() && steps_.size() == (splits_at_blanks_ ? 2U : 1U);
  }
  bool splits_at_blanks() const { return splits_at_blanks_; }
  const std::string& metaspace() const { return metaspace_; }
  bool empty() const { return steps_.empty(); }
  /// The regular expressions that stand alone around their matches, in order, line ends and tabs
  /// spelled \n, \r and \t; nothing where other steps than these (and ByteLevel) split.
  std::vector<std::string> isolated_patterns() const;

 private:
  enum class Behavior { isolated, removed, merged_with_previous, merged_with_next, contiguous };
  enum class Kind { split, metaspace, prefix_space };
  enum class Prepend { always, first, never };
  struct Step {
    Kind kind;
    std::vector<Regex> regex;  ///< one for split
    Behavior behavior = Behavior::isolated;
    bool invert = false;
    Prepend prepend = Prepend::never;
    bool splits = true;
  };
  void add(const std::string& file, const nlohmann::json& node);
  void add_split(const std::string& file, const std::string& pattern, Behavior behavior,
                 bool invert);
  void add_metaspace(const std::string& file, const nlohmann::json& node);
  static Behavior behavior_of(const std::string& file, const nlohmann::json& node,
                              const char* otherwise);
  void run(std::size_t step, std::string_view text, Place place, const Word& word) const;
  void run_split(std::size_t step, std::string_view text, Place place, const Word& word) const;
  std::string with_metaspace(const Step& step, std::string_view text, Place place) const;

  std::vector<Step> steps_;
  std::string metaspace_;
  bool byte_level_ = false;
  bool adds_prefix_space_ = false;
  bool splits_at_blanks_ = false;
};

/// A pre-tokenizer that GGUF has a name for.
struct KnownPreTokenizer {
  std::string_view name;                   ///< tokenizer.ggml.pre
  std::vector<std::string_view> patterns;  ///< as isolated_patterns()
  bool ignore_merges = false;              ///< whole words of the vocabulary are taken as they are
  std::vector<std::string_view> aliases;   ///< other names of the same
};
const std::vector<KnownPreTokenizer>& known_pre_tokenizers();

}  // namespace arcus
