#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string_view>

namespace arcus {

/// Philox4x32-10 [SC'11]: four random words from a 128-bit counter and a 64-bit key. Stateless, so
/// every random number of a run is addressed, never drawn in sequence.
std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter, std::uint64_t key);

/// One addressed stream of random numbers.
class Rng {
 public:
  /// Key = 64-bit xxh3 of (seed, purpose, name); purpose e.g. "init", name a tensor or layer.
  Rng(std::uint64_t seed, std::string_view purpose, std::string_view name);
  explicit Rng(std::uint64_t key) : key_(key) {}

  std::array<std::uint32_t, 4> words(std::uint64_t high, std::uint64_t low) const;
  /// In [0, 1), 24 bits, word 0 of call (high, low).
  float uniform(std::uint64_t high, std::uint64_t low) const;
  /// out[i] = uniform(high, low + i).
  void uniforms(std::uint64_t high, std::uint64_t low, std::span<float> out) const;
  /// Standard normal number `element` of call space `high`: number element mod 4 of call (high,
  /// element div 4), Box-Muller on words (0, 1) and (2, 3).
  float normal(std::uint64_t high, std::uint64_t element) const;
  float normal(std::uint64_t element) const { return normal(0, element); }
  /// The four normals of call (high, call).
  std::array<float, 4> normals(std::uint64_t high, std::uint64_t call) const;
  std::array<float, 4> normals(std::uint64_t call) const { return normals(0, call); }
  std::uint64_t key() const { return key_; }

 private:
  std::uint64_t key_;
};

/// A permutation of 0..size-1 without memory: a Feistel network on the next even number of bits
/// with cycle walking [Black and Rogaway 2002].
class KeyedPermutation {
 public:
  KeyedPermutation(std::uint64_t size, std::uint64_t key);
  std::uint64_t operator()(std::uint64_t index) const;
  std::uint64_t size() const { return size_; }

 private:
  std::uint64_t round_trip(std::uint64_t value) const;
  std::uint64_t size_;
  std::uint64_t key_;
  int half_bits_;
};

}  // namespace arcus
