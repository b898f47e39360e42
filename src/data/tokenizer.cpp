#include "src/data/tokenizer.hpp"

#include "src/base/hash.hpp"
#include "src/data/utf8.hpp"

namespace arcus {

std::size_t Tokenizer::cut(std::string_view text, std::size_t target) const {
  return encode_cut(text, target);
}

std::uint64_t Tokenizer::hash() const {
  const std::string model = serialized();
  return hash_text(kind() + ':' + hex(hash_text(model)));
}

std::size_t encode_cut(std::string_view text, std::size_t target) {
  if (text.size() <= target) return text.size();
  const std::size_t line_end = text.substr(0, target).rfind('\n');
  if (line_end != std::string_view::npos) return line_end + 1;
  std::size_t cut = 0;
  for (;;) {
    const std::size_t next = utf8_boundary(text, cut + kMaxEncodePiece);
    if (next > target || next == cut) return cut > 0 ? cut : next;
    cut = next;
  }
}

}  // namespace arcus
