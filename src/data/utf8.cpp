#include "src/data/utf8.hpp"

#include <cstdint>
#include <cstring>

namespace arcus {
namespace {

bool in_range(unsigned char c, unsigned low, unsigned high) { return c >= low && c <= high; }

/// Bytes of the code point that starts at `at`; 0 when there is none.
std::size_t code_point_bytes(std::string_view text, std::size_t at) {
  const auto byte = [&](std::size_t i) {
    return at + i < text.size() ? static_cast<unsigned char>(text[at + i]) : 0;
  };
  const unsigned char lead = byte(0);
  if (lead < 0x80) return 1;
  if (in_range(lead, 0xC2, 0xDF)) return in_range(byte(1), 0x80, 0xBF) ? 2 : 0;
  if (in_range(lead, 0xE0, 0xEF)) {
    const unsigned low = lead == 0xE0 ? 0xA0 : 0x80;   // no overlong forms
    const unsigned high = lead == 0xED ? 0x9F : 0xBF;  // no surrogates
    return in_range(byte(1), low, high) && in_range(byte(2), 0x80, 0xBF) ? 3 : 0;
  }
  if (in_range(lead, 0xF0, 0xF4)) {
    const unsigned low = lead == 0xF0 ? 0x90 : 0x80;
    const unsigned high = lead == 0xF4 ? 0x8F : 0xBF;  // up to U+10FFFF
    return in_range(byte(1), low, high) && in_range(byte(2), 0x80, 0xBF) &&
                   in_range(byte(3), 0x80, 0xBF)
               ? 4
               : 0;
  }
  return 0;
}

}  // namespace

std::size_t find_invalid_utf8(std::string_view text) {
  std::size_t at = 0;
  while (at < text.size()) {
    std::uint64_t word = 0;
    if (at + sizeof word <= text.size()) {  // eight ASCII bytes at a time
      std::memcpy(&word, text.data() + at, sizeof word);
      if ((word & 0x8080808080808080U) == 0) {
        at += sizeof word;
        continue;
      }
    }
    const std::size_t bytes = code_point_bytes(text, at);
    if (bytes == 0) return at;
    at += bytes;
  }
  return std::string_view::npos;
}

std::size_t utf8_boundary(std::string_view text, std::size_t position) {
  if (position >= text.size()) return text.size();
  // A code point has at most three continuation bytes; more of them are no UTF-8 anyway.
  for (std::size_t back = 0; back < 4 && back <= position; ++back) {
    if ((static_cast<unsigned char>(text[position - back]) & 0xC0) != 0x80) return position - back;
  }
  return position;
}

bool is_settled_letter(std::uint32_t c) {
  const auto within = [c](std::uint32_t first, std::uint32_t last) {
    return c >= first && c <= last;
  };
  return within('a', 'z') || within('A', 'Z') || within('0', '9') ||
         (within(0xC0, 0x17F) && c != 0xD7 && c != 0xF7) || within(0x3B1, 0x3C9) ||
         within(0x410, 0x44F) || within(0x5D0, 0x5EA) || within(0x621, 0x63A) ||
         within(0x3042, 0x3093) || within(0x30A2, 0x30F6) || within(0x4E00, 0x9FA5) ||
         within(0xAC00, 0xD7A3);
}

std::uint32_t code_point_of(std::string_view character) {
  const auto lead = static_cast<unsigned char>(character[0]);
  if (lead < 0x80) return lead;
  std::uint32_t value = lead & (0xFFU >> (character.size() + 1));
  for (const char c : character.substr(1))
    value = value << 6 | (static_cast<unsigned char>(c) & 0x3F);
  return value;
}

}  // namespace arcus
