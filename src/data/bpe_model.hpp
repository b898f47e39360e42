#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace arcus {

struct StringHash {
  using is_transparent = void;
  std::size_t operator()(std::string_view text) const {
    return std::hash<std::string_view>{}(text);
  }
};
using IdOfText = std::unordered_map<std::string, std::int32_t, StringHash, std::equal_to<>>;

/// Pairs of neighbouring characters that a token may hold; may say so in error, but never denies it
/// in error. Where none does, a text falls into parts that are encoded each for itself.
class CharacterJoins {
 public:
  CharacterJoins();
  void add(std::uint32_t left, std::uint32_t right);
  void add_all();
  bool may_join(std::uint32_t left, std::uint32_t right) const;

 private:
  std::vector<std::uint64_t> bits_;  ///< by hash of the pair
};

/// Pairs of ids to what they merge into: open addressing, at most half full.
class MergeTable {
 public:
  struct Merge {
    std::uint32_t rank = 0;
    std::int32_t id = -1;  ///< -1: the pair does not merge
  };
  explicit MergeTable(std::size_t most);
  /// The last one of equal pairs counts.
  void set(std::int32_t left, std::int32_t right, Merge merge);
  Merge find(std::int32_t left, std::int32_t right) const;

 private:
  struct Slot {
    std::uint64_t pair = ~std::uint64_t{0};
    Merge merge;
  };
  std::size_t place_of(std::uint64_t pair) const;
  std::vector<Slot> slots_;
  int shift_ = 0;
};

/// What symbols a word starts from.
enum class BpeUnit {
  byte,       ///< bytes, each of which is a token (GPT-2)
  character,  ///< characters, spelled in byte tokens where they are no token (SentencePiece)
};

/// Byte pair encoding: of all neighbours that may merge those of the lowest rank do, the leftmost
/// first, until none may.
class BpeModel {
 public:
  struct Merge {
    std::int32_t left, right, id;  ///< in the order of ranks
  };
  /// `texts`: ids of what a word may consist of, bytes as they are; `byte_ids`: the token of each
  /// byte, -1 where there is none.
  BpeModel(BpeUnit unit, const IdOfText& texts, const std::array<std::int32_t, 256>& byte_ids,
           const std::vector<Merge>& merges);

  /// Room that encoding needs, and words that it has seen. For one thread at a time.
  class Scratch {
   private:
    friend class BpeModel;
    struct Symbol {
      std::int32_t id, previous, next;  ///< id -1: merged into its left neighbour
    };
    struct Candidate {
      std::uint32_t rank, position;
      std::int32_t left, right, id;
    };
    struct CachedIds {
      std::uint32_t begin, size;
    };
    std::vector<Symbol> symbols;
    std::vector<Candidate> heap;
    std::vector<std::int32_t> cached_ids;
    std::unordered_map<std::string, CachedIds, StringHash, std::equal_to<>> cache;
  };

  /// Appends the ids of a word, valid UTF-8 for characters. Throws (data) for a byte without a
  /// token.
  void encode(std::string_view word, Scratch& scratch, std::vector<std::int32_t>& ids) const;
  /// The token of a byte; throws (data) where there is none.
  std::int32_t byte_id(unsigned char byte) const;
  /// With characters: those that merges may join.
  const CharacterJoins& joins() const { return joins_; }

 private:
  void encode_cached(std::string_view word, Scratch& scratch, std::vector<std::int32_t>& ids) const;
  void start(std::string_view word, Scratch& scratch) const;
  void push(Scratch& scratch, std::int32_t left, std::int32_t right) const;
  void merge_all(Scratch& scratch) const;
  void note_join(std::string_view left, std::string_view right);

  BpeUnit unit_;
  MergeTable merges_;
  std::array<std::int32_t, 256> byte_ids_;
  std::unordered_map<std::uint32_t, std::int32_t> character_ids_;
  CharacterJoins joins_;
};

}  // namespace arcus
