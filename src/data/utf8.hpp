#pragma once

#include <cstddef>
#include <string_view>

namespace arcus {

/// Offset of the first byte that no valid UTF-8 text has there (overlong forms, surrogates and code
/// points above U+10FFFF are invalid); npos when all of `text` is valid.
std::size_t find_invalid_utf8(std::string_view text);

/// The largest position <= `position` that does not split a code point of valid UTF-8.
std::size_t utf8_boundary(std::string_view text, std::size_t position);

}  // namespace arcus
