#include "src/base/rng.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numbers>

#include "src/base/error.hpp"
#include "src/base/hash.hpp"

namespace arcus {

namespace {

/// Inlined, so that a loop over calls vectorises.
[[gnu::always_inline]] inline std::array<std::uint32_t, 4> philox(
    std::array<std::uint32_t, 4> counter, std::uint64_t key) {
  auto k0 = static_cast<std::uint32_t>(key);
  auto k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53U} * counter[0];
    const std::uint64_t p1 = std::uint64_t{0xCD9E8D57U} * counter[2];
    counter = {
        static_cast<std::uint32_t>(p1 >> 32) ^ counter[1] ^ k0, static_cast<std::uint32_t>(p1),
        static_cast<std::uint32_t>(p0 >> 32) ^ counter[3] ^ k1, static_cast<std::uint32_t>(p0)};
    k0 += 0x9E3779B9U;
    k1 += 0xBB67AE85U;
  }
  return counter;
}

/// Counter of call (high, low).
inline std::array<std::uint32_t, 4> counter_of(std::uint64_t high, std::uint64_t low) {
  return {static_cast<std::uint32_t>(low), static_cast<std::uint32_t>(low >> 32),
          static_cast<std::uint32_t>(high), static_cast<std::uint32_t>(high >> 32)};
}

/// In [0, 1): the upper 24 bits, so that the product is exact.
inline float unit_interval(std::uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24F; }

}  // namespace

std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter, std::uint64_t key) {
  return philox(counter, key);
}

Rng::Rng(std::uint64_t seed, std::string_view purpose, std::string_view name) {
  // No memory is allocated: routings draw in every step.
  std::array<char, 256> bytes;
  const std::size_t size = sizeof seed + purpose.size() + 1 + name.size();
  ARCUS_CHECK(size <= bytes.size(), "a random stream's name of {} bytes: {} {}", size, purpose,
              name);
  char* at = std::copy_n(reinterpret_cast<const char*>(&seed), sizeof seed, bytes.data());
  at = std::copy(purpose.begin(), purpose.end(), at);
  *at++ = 0;
  std::copy(name.begin(), name.end(), at);
  key_ = hash_bytes(bytes.data(), size);
}

std::array<std::uint32_t, 4> Rng::words(std::uint64_t high, std::uint64_t low) const {
  return philox(counter_of(high, low), key_);
}

float Rng::uniform(std::uint64_t high, std::uint64_t low) const {
  return unit_interval(words(high, low)[0]);
}

void Rng::uniforms(std::uint64_t high, std::uint64_t low, std::span<float> out) const {
  for (std::size_t i = 0; i < out.size(); ++i) {
    out[i] = unit_interval(philox(counter_of(high, low + i), key_)[0]);
  }
}

std::array<float, 4> Rng::normals(std::uint64_t high, std::uint64_t call) const {
  const auto w = words(high, call);
  std::array<float, 4> result{};
  for (std::size_t pair = 0; pair < 4; pair += 2) {
    // (0, 1] so that the logarithm is finite.
    const double u = (static_cast<double>(w[pair]) + 1.0) * 0x1p-32;
    const double angle = 2.0 * std::numbers::pi * static_cast<double>(w[pair + 1]) * 0x1p-32;
    const double radius = std::sqrt(-2.0 * std::log(u));
    result[pair] = static_cast<float>(radius * std::cos(angle));
    result[pair + 1] = static_cast<float>(radius * std::sin(angle));
  }
  return result;
}

float Rng::normal(std::uint64_t high, std::uint64_t element) const {
  return normals(high, element / 4)[element % 4];
}

KeyedPermutation::KeyedPermutation(std::uint64_t size, std::uint64_t key) : size_(size), key_(key) {
  ARCUS_CHECK(size > 0, "a permutation needs at least one element");
  const int bits = size > 1 ? std::bit_width(size - 1) : 1;
  half_bits_ = (bits + 1) / 2;
}

std::uint64_t KeyedPermutation::round_trip(std::uint64_t value) const {
  const std::uint64_t mask = (std::uint64_t{1} << half_bits_) - 1;
  std::uint64_t left = value >> half_bits_;
  std::uint64_t right = value & mask;
  for (std::uint32_t round = 0; round < 6; ++round) {
    const auto w = philox4x32({static_cast<std::uint32_t>(right),
                               static_cast<std::uint32_t>(right >> 32), round, 0x50455243U},
                              key_);
    const std::uint64_t mixed = left ^ (w[0] & mask);
    left = right;
    right = mixed;
  }
  return (left << half_bits_) | right;
}

std::uint64_t KeyedPermutation::operator()(std::uint64_t index) const {
  ARCUS_DCHECK(index < size_, "index {} outside a permutation of {}", index, size_);
  std::uint64_t value = index;
  do {
    value = round_trip(value);
  } while (value >= size_);
  return value;
}

}  // namespace arcus
