#include "src/data/bpe_model.hpp"

#include <algorithm>
#include <bit>

#include "src/base/error.hpp"
#include "src/data/utf8.hpp"

namespace arcus {
namespace {

constexpr std::size_t kLongestCachedWord = 64;
constexpr std::size_t kMostCachedIds = std::size_t{1} << 20;
constexpr int kJoinBits = 22;

std::uint64_t scramble(std::uint64_t value) { return value * 0x9E3779B97F4A7C15U; }

std::uint64_t pair_of(std::uint32_t left, std::uint32_t right) {
  return std::uint64_t{left} << 32 | right;
}

std::size_t join_bit(std::uint32_t left, std::uint32_t right) {
  return scramble(pair_of(left, right)) >> (64 - kJoinBits);
}

}  // namespace

CharacterJoins::CharacterJoins() : bits_((std::size_t{1} << kJoinBits) / 64) {}

void CharacterJoins::add(std::uint32_t left, std::uint32_t right) {
  const std::size_t bit = join_bit(left, right);
  bits_[bit / 64] |= std::uint64_t{1} << (bit % 64);
}

void CharacterJoins::add_all() { std::fill(bits_.begin(), bits_.end(), ~std::uint64_t{0}); }

bool CharacterJoins::may_join(std::uint32_t left, std::uint32_t right) const {
  const std::size_t bit = join_bit(left, right);
  return (bits_[bit / 64] >> (bit % 64) & 1) != 0;
}

MergeTable::MergeTable(std::size_t most)
    : slots_(std::bit_ceil(2 * most + 2)), shift_(64 - std::countr_zero(slots_.size())) {}

std::size_t MergeTable::place_of(std::uint64_t pair) const {
  std::size_t place = scramble(pair) >> shift_;
  while (slots_[place].pair != pair && slots_[place].merge.id >= 0) {
    place = (place + 1) & (slots_.size() - 1);
  }
  return place;
}

void MergeTable::set(std::int32_t left, std::int32_t right, Merge merge) {
  const std::uint64_t pair =
      pair_of(static_cast<std::uint32_t>(left), static_cast<std::uint32_t>(right));
  slots_[place_of(pair)] = {pair, merge};
}

MergeTable::Merge MergeTable::find(std::int32_t left, std::int32_t right) const {
  const std::uint64_t pair =
      pair_of(static_cast<std::uint32_t>(left), static_cast<std::uint32_t>(right));
  return slots_[place_of(pair)].merge;
}

BpeModel::BpeModel(BpeUnit unit, const IdOfText& texts,
                   const std::array<std::int32_t, 256>& byte_ids, const std::vector<Merge>& merges)
    : unit_(unit), merges_(merges.size()), byte_ids_(byte_ids) {
  for (std::size_t rank = 0; rank < merges.size(); ++rank) {
    merges_.set(merges[rank].left, merges[rank].right,
                {static_cast<std::uint32_t>(rank), merges[rank].id});
  }
  if (unit == BpeUnit::byte) return;
  std::unordered_map<std::int32_t, std::string_view> text_of;
  for (const auto& [text, id] : texts) {
    text_of.emplace(id, text);
    if (!text.empty() && next_code_point(text, 0) == text.size()) {
      character_ids_.emplace(code_point_of(text), id);
    }
  }
  for (const Merge& merge : merges) note_join(text_of[merge.left], text_of[merge.right]);
}

/// A merge over a boundary of characters has a first one, whose left part ends there and whose
/// right part begins there. Parts without a text are byte tokens, which may spell any character.
void BpeModel::note_join(std::string_view left, std::string_view right) {
  if (left.empty() || right.empty()) return joins_.add_all();
  joins_.add(code_point_of(last_character(left)), code_point_of(first_character(right)));
}

std::int32_t BpeModel::byte_id(unsigned char byte) const {
  const std::int32_t id = byte_ids_[byte];
  ARCUS_REQUIRE(id >= 0, ExitCode::data,
                "the text has the byte 0x{:02X}, for which the tokenizer has no token", byte);
  return id;
}

void BpeModel::encode(std::string_view word, Scratch& scratch,
                      std::vector<std::int32_t>& ids) const {
  if (unit_ == BpeUnit::byte) return encode_cached(word, scratch, ids);
  // Cut wherever no merge can reach over: the same ids from shorter words, which come again.
  std::size_t begin = 0;
  std::uint32_t previous = 0;
  for (std::size_t at = 0; at < word.size();) {
    const std::size_t end = next_code_point(word, at);
    const std::uint32_t character = code_point_of(word.substr(at, end - at));
    if (at > begin && !joins_.may_join(previous, character)) {
      encode_cached(word.substr(begin, at - begin), scratch, ids);
      begin = at;
    }
    previous = character;
    at = end;
  }
  if (begin < word.size()) encode_cached(word.substr(begin), scratch, ids);
}

void BpeModel::encode_cached(std::string_view word, Scratch& scratch,
                             std::vector<std::int32_t>& ids) const {
  const auto found = scratch.cache.find(word);
  if (found != scratch.cache.end()) {
    const auto begin = scratch.cached_ids.begin() + found->second.begin;
    ids.insert(ids.end(), begin, begin + found->second.size);
    return;
  }
  start(word, scratch);
  merge_all(scratch);
  const std::size_t before = ids.size();
  for (std::int32_t i = scratch.symbols.empty() ? -1 : 0; i >= 0; i = scratch.symbols[i].next) {
    ids.push_back(scratch.symbols[i].id);
  }
  if (word.size() > kLongestCachedWord) return;
  if (scratch.cached_ids.size() > kMostCachedIds) {
    scratch.cache.clear();
    scratch.cached_ids.clear();
  }
  scratch.cache.emplace(word,
                        Scratch::CachedIds{static_cast<std::uint32_t>(scratch.cached_ids.size()),
                                           static_cast<std::uint32_t>(ids.size() - before)});
  scratch.cached_ids.insert(scratch.cached_ids.end(),
                            ids.begin() + static_cast<std::ptrdiff_t>(before), ids.end());
}

void BpeModel::start(std::string_view word, Scratch& scratch) const {
  ARCUS_REQUIRE(word.size() < (std::size_t{1} << 31), ExitCode::data,
                "a word of {} bytes is too long to encode", word.size());
  auto& symbols = scratch.symbols;
  symbols.clear();
  const auto add = [&](std::int32_t id) {
    const auto place = static_cast<std::int32_t>(symbols.size());
    symbols.push_back({id, place - 1, place + 1});
  };
  for (std::size_t at = 0; at < word.size();) {
    const std::size_t end = unit_ == BpeUnit::byte ? at + 1 : next_code_point(word, at);
    const std::string_view character = word.substr(at, end - at);
    const auto found = unit_ == BpeUnit::byte ? character_ids_.end()
                                              : character_ids_.find(code_point_of(character));
    if (found != character_ids_.end()) {
      add(found->second);
    } else {
      for (const char c : character) add(byte_id(static_cast<unsigned char>(c)));
    }
    at = end;
  }
  if (!symbols.empty()) symbols.back().next = -1;
}

namespace {

/// The heap's front is the lowest rank, of equal ones the leftmost.
constexpr auto kLater = [](const auto& a, const auto& b) {
  return a.rank != b.rank ? a.rank > b.rank : a.position > b.position;
};

}  // namespace

void BpeModel::push(Scratch& scratch, std::int32_t left, std::int32_t right) const {
  if (left < 0 || right < 0) return;
  const std::int32_t left_id = scratch.symbols[left].id;
  const std::int32_t right_id = scratch.symbols[right].id;
  const MergeTable::Merge merge = merges_.find(left_id, right_id);
  if (merge.id < 0) return;
  scratch.heap.push_back(
      {merge.rank, static_cast<std::uint32_t>(left), left_id, right_id, merge.id});
  std::push_heap(scratch.heap.begin(), scratch.heap.end(), kLater);
}

void BpeModel::merge_all(Scratch& scratch) const {
  auto& symbols = scratch.symbols;
  auto& heap = scratch.heap;
  heap.clear();
  for (std::size_t i = 1; i < symbols.size(); ++i) {
    push(scratch, static_cast<std::int32_t>(i) - 1, static_cast<std::int32_t>(i));
  }
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), kLater);
    const Scratch::Candidate best = heap.back();
    heap.pop_back();
    auto& left = symbols[best.position];
    if (left.id != best.left || left.next < 0) continue;  // merged meanwhile
    auto& right = symbols[left.next];
    if (right.id != best.right) continue;
    left.id = best.id;
    right.id = -1;
    left.next = right.next;
    if (left.next >= 0) symbols[left.next].previous = static_cast<std::int32_t>(best.position);
    push(scratch, left.previous, static_cast<std::int32_t>(best.position));
    push(scratch, static_cast<std::int32_t>(best.position), left.next);
  }
}

}  // namespace arcus
