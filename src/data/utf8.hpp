#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace arcus {

/// Offset of the first byte that no valid UTF-8 text has there (overlong forms, surrogates and code
/// points above U+10FFFF are invalid); npos when all of `text` is valid.
std::size_t find_invalid_utf8(std::string_view text);

/// The largest position <= `position` that does not split a code point of valid UTF-8.
std::size_t utf8_boundary(std::string_view text, std::size_t position);

/// Where the code point after the one at `position` begins; `text` is valid UTF-8.
inline std::size_t next_code_point(std::string_view text, std::size_t position) {
  do {
    ++position;
  } while (position < text.size() && (static_cast<unsigned char>(text[position]) & 0xC0) == 0x80);
  return position;
}

/// The first and the last character of valid UTF-8 that is not empty.
inline std::string_view first_character(std::string_view text) {
  return text.substr(0, next_code_point(text, 0));
}
inline std::string_view last_character(std::string_view text) {
  std::size_t begin = text.size() - 1;
  while (begin > 0 && (static_cast<unsigned char>(text[begin]) & 0xC0) == 0x80) --begin;
  return text.substr(begin);
}

/// A letter or digit that every version of Unicode since 2000 has and that combines with nothing
/// before it: those of ASCII and the main letters of some scripts. False for many others.
bool is_settled_letter(std::uint32_t code_point);

/// The code point that `character`, its bytes, spells.
std::uint32_t code_point_of(std::string_view character);

}  // namespace arcus
