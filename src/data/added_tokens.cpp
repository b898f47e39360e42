#include "src/data/added_tokens.hpp"

#include <utf8proc.h>

#include <algorithm>

#include "src/data/utf8.hpp"

namespace arcus {
namespace {

bool is_word(std::string_view character) {
  const std::uint32_t c = code_point_of(character);
  if (c == 0x200C || c == 0x200D) return true;
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
      return true;
    default:
      return (c >= 0x24B6 && c <= 0x24E9) || (c >= 0x1F130 && c <= 0x1F189);  // circled letters
  }
}

/// Unicode's White_Space.
bool is_space(std::string_view character) {
  const std::uint32_t c = code_point_of(character);
  return (c >= 9 && c <= 13) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

bool stands_alone(std::string_view text, std::size_t begin, std::size_t end) {
  return (begin == 0 || !is_word(last_character(text.substr(0, begin)))) &&
         (end == text.size() || !is_word(first_character(text.substr(end))));
}

}  // namespace

AddedTokenFinder::AddedTokenFinder(std::vector<AddedToken> tokens)
    : tokens_(std::move(tokens)), begins_(256) {
  std::erase_if(tokens_, [](const AddedToken& token) { return token.content.empty(); });
  std::sort(tokens_.begin(), tokens_.end(),
            [](const AddedToken& a, const AddedToken& b) { return a.content < b.content; });
  for (const AddedToken& token : tokens_)
    begins_[static_cast<unsigned char>(token.content[0])] = true;
}

const AddedToken* AddedTokenFinder::longest_at(std::string_view text, std::size_t at) const {
  // Narrows the sorted range to the tokens that begin as the text does, byte by byte.
  const AddedToken* longest = nullptr;
  auto first = tokens_.begin();
  auto last = tokens_.end();
  for (std::size_t depth = 0; at + depth < text.size(); ++depth) {
    const auto byte = static_cast<unsigned char>(text[at + depth]);
    const auto byte_of = [&](const AddedToken& token) {
      return depth < token.content.size() ? static_cast<unsigned char>(token.content[depth]) : -1;
    };
    first = std::partition_point(first, last, [&](const auto& t) { return byte_of(t) < byte; });
    last = std::partition_point(first, last, [&](const auto& t) { return byte_of(t) <= byte; });
    if (first == last) break;
    if (first->content.size() == depth + 1) longest = &*first;
  }
  return longest;
}

void AddedTokenFinder::split(std::string_view text, bool specials,
                             const std::function<void(std::size_t, std::size_t)>& on_text,
                             const std::function<void(std::int32_t)>& on_token) const {
  std::size_t done = 0;
  for (std::size_t at = 0; at < text.size() && !tokens_.empty();) {
    const bool may_begin = begins_[static_cast<unsigned char>(text[at])];
    const AddedToken* token = may_begin ? longest_at(text, at) : nullptr;
    if (token == nullptr) {
      ++at;
      continue;
    }
    std::size_t begin = at;
    std::size_t end = at + token->content.size();
    at = end;
    if (token->special && !specials) continue;
    if (begin < done) continue;  // its white space went to a token before it
    if (token->single_word && !stands_alone(text, begin, end)) continue;
    while (token->lstrip && begin > done && is_space(last_character(text.substr(0, begin)))) {
      begin -= last_character(text.substr(0, begin)).size();
    }
    while (token->rstrip && end < text.size() && is_space(first_character(text.substr(end)))) {
      end = next_code_point(text, end);
    }
    if (done < begin) on_text(done, begin);
    on_token(token->id);
    done = end;
  }
  if (done < text.size()) on_text(done, text.size());
}

}  // namespace arcus
