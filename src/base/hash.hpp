#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace arcus {

/// 64-bit xxh3 of `bytes`.
std::uint64_t hash_bytes(const void* data, std::size_t bytes);
std::uint64_t hash_text(std::string_view text);
/// Hash of a list of hashes, in order: how block hashes become a tensor's hash.
std::uint64_t hash_of_hashes(std::span<const std::uint64_t> hashes);
/// 16 lower-case hexadecimal digits.
std::string hex(std::uint64_t hash);

/// The same xxh3 fed piece by piece.
class StreamHash {
 public:
  StreamHash();
  ~StreamHash();
  StreamHash(StreamHash&&) noexcept;
  StreamHash& operator=(StreamHash&&) noexcept;
  void update(const void* data, std::size_t bytes);
  std::uint64_t digest() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace arcus
