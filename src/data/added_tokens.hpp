#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace arcus {

/// A token that is found in a text before the text is split into words.
struct AddedToken {
  std::int32_t id = -1;
  std::string content;
  bool special = false;      ///< no part of any text: found where a caller asks for it alone
  bool normalized = false;   ///< looked for in the normalised text
  bool single_word = false;  ///< not beside a letter or digit
  bool lstrip = false;       ///< takes the white space before it
  bool rstrip = false;       ///< and after it
};

/// Finds added tokens: the leftmost, of those the longest, one after the other, as the Python
/// package `tokenizers` does.
class AddedTokenFinder {
 public:
  AddedTokenFinder() = default;
  explicit AddedTokenFinder(std::vector<AddedToken> tokens);

  bool empty() const { return tokens_.empty(); }
  /// Calls `text(begin, end)` for what is between the tokens and `token(id)` for these, in order.
  /// Special ones are text unless `specials`.
  void split(std::string_view text, bool specials,
             const std::function<void(std::size_t, std::size_t)>& on_text,
             const std::function<void(std::int32_t)>& on_token) const;

 private:
  /// The longest token at `at`, or null.
  const AddedToken* longest_at(std::string_view text, std::size_t at) const;

  std::vector<AddedToken> tokens_;  ///< by content
  std::vector<bool> begins_;        ///< [256] first bytes
};

}  // namespace arcus
