#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace arcus {

/// The "normalizer" of a tokenizer.json: NFC, Prepend, Replace of a text, and sequences of these;
/// others are refused by name. Works on valid UTF-8.
class Normalizer {
 public:
  Normalizer() = default;
  /// Throws (data) naming `file` and the part that is not supported.
  Normalizer(const std::string& file, const nlohmann::json& node);

  bool empty() const { return steps_.empty(); }
  bool is_nfc() const { return steps_.size() == 1 && steps_[0].kind == Kind::nfc; }
  /// `continued`: the text goes on from one before it, so nothing is put in front.
  std::string apply(std::string_view text, bool continued) const;
  /// Whether what becomes of a character never depends on a blank or a line end after it.
  bool is_local() const;

 private:
  enum class Kind { nfc, prepend, replace };
  struct Step {
    Kind kind;
    std::string from, to;
  };
  void add(const std::string& file, const nlohmann::json& node);
  std::vector<Step> steps_;
};

}  // namespace arcus
