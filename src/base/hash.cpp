#include "src/base/hash.hpp"

#include <fmt/format.h>
#include <xxhash.h>

#include "src/base/error.hpp"

namespace arcus {

struct StreamHash::State {
  XXH3_state_t* xxh = XXH3_createState();
  State() {
    ARCUS_CHECK(xxh != nullptr, "out of memory for a hash state");
    XXH3_64bits_reset(xxh);
  }
  ~State() { XXH3_freeState(xxh); }
};

StreamHash::StreamHash() : state_(std::make_unique<State>()) {}
StreamHash::~StreamHash() = default;
StreamHash::StreamHash(StreamHash&&) noexcept = default;
StreamHash& StreamHash::operator=(StreamHash&&) noexcept = default;

void StreamHash::update(const void* data, std::size_t bytes) {
  XXH3_64bits_update(state_->xxh, data, bytes);
}
std::uint64_t StreamHash::digest() const { return XXH3_64bits_digest(state_->xxh); }

std::uint64_t hash_bytes(const void* data, std::size_t bytes) { return XXH3_64bits(data, bytes); }
std::uint64_t hash_text(std::string_view text) { return hash_bytes(text.data(), text.size()); }
std::uint64_t hash_of_hashes(std::span<const std::uint64_t> hashes) {
  return hash_bytes(hashes.data(), hashes.size_bytes());
}
std::string hex(std::uint64_t hash) { return fmt::format("{:016x}", hash); }

}  // namespace arcus
