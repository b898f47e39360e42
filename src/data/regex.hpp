#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

namespace arcus {

/// A regular expression of a tokenizer.json, which means it in Oniguruma's Ruby syntax on UTF-8;
/// it is translated for PCRE2 and run there. What the two take differently and what depends on it
/// (named groups, back references, \h, POSIX classes, ...) is refused by name. Constant functions
/// may be called from several threads at once.
class Regex {
 public:
  /// Throws (data) for a pattern that does not compile or uses what is refused.
  explicit Regex(const std::string& pattern);

  /// Calls `found(begin, end)` for the matches of `text`, valid UTF-8, from left to right. As in
  /// Oniguruma's iterator an empty match counts, but not straight after another match. Throws
  /// (data) where the pattern backtracks without end.
  void for_each_match(std::string_view text,
                      const std::function<void(std::size_t, std::size_t)>& found) const;
  const std::string& pattern() const { return pattern_; }

 private:
  std::string pattern_;
  std::shared_ptr<const void> code_;  ///< pcre2_code
};

/// The pattern in PCRE2's syntax.
std::string translate_regex(const std::string& pattern);
/// A pattern that matches `text` alone.
std::string escape_regex(std::string_view text);

}  // namespace arcus
