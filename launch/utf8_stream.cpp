#include "launch/utf8_stream.hpp"

#include <cstdint>

namespace arcus {
namespace {

constexpr std::string_view kReplacement = "\xef\xbf\xbd";

/// What stands at the begin of a text: a whole character, the begin of one, or neither.
enum class Prefix { whole, incomplete, bad };
struct Parsed {
  Prefix kind;
  std::size_t bytes;
};

/// Length of the character that `lead` begins; 0 for a byte that begins none.
std::size_t expected_length(unsigned char lead) {
  if (lead < 0x80) return 1;
  if (lead >= 0xc2 && lead < 0xe0) return 2;
  if (lead >= 0xe0 && lead < 0xf0) return 3;
  if (lead >= 0xf0 && lead < 0xf5) return 4;
  return 0;
}

/// Second bytes that would spell an overlong form, a surrogate or a value above U+10FFFF.
bool second_byte_fits(unsigned char lead, unsigned char second) {
  if (lead == 0xe0) return second >= 0xa0;
  if (lead == 0xed) return second < 0xa0;
  if (lead == 0xf0) return second >= 0x90;
  if (lead == 0xf4) return second < 0x90;
  return true;
}

Parsed parse(std::string_view text) {
  const auto lead = static_cast<unsigned char>(text[0]);
  const std::size_t length = expected_length(lead);
  if (length == 0) return {Prefix::bad, 1};
  for (std::size_t i = 1; i < length; ++i) {
    if (i == text.size()) return {Prefix::incomplete, i};
    const auto byte = static_cast<unsigned char>(text[i]);
    const bool continues = (byte & 0xc0) == 0x80 && (i > 1 || second_byte_fits(lead, byte));
    if (!continues) return {Prefix::bad, i};
  }
  return {Prefix::whole, length};
}

}  // namespace

std::string Utf8Stream::push(std::string_view bytes) {
  pending_ += bytes;
  std::string text;
  std::size_t at = 0;
  while (at < pending_.size()) {
    const std::string_view rest = std::string_view(pending_).substr(at);
    const Parsed parsed = parse(rest);
    if (parsed.kind == Prefix::incomplete) break;
    text += parsed.kind == Prefix::whole ? rest.substr(0, parsed.bytes) : kReplacement;
    at += parsed.bytes;
  }
  pending_.erase(0, at);
  return text;
}

std::string Utf8Stream::finish() {
  const bool incomplete = !pending_.empty();
  pending_.clear();
  return incomplete ? std::string(kReplacement) : "";
}

}  // namespace arcus
