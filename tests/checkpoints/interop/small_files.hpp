#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "checkpoints/interop/gguf.hpp"
#include "checkpoints/interop/safetensors.hpp"

/// Small files of the containers, for tests and as seeds of the fuzzers.
namespace arcus::test {

struct TensorContent {
  FileTensor tensor;
  std::string bytes;
};
using GgufKeys = std::vector<std::pair<std::string, GgufValue>>;

/// Some tensors with random types (`blocks`: those of GGUF as well), shapes (up to four dimensions,
/// some of them 0), names and bytes, wider types first; equal for equal seeds.
std::vector<TensorContent> random_tensors(std::uint64_t seed, bool blocks);
/// A key of every type, some of them with random values.
GgufKeys random_keys(std::uint64_t seed);

void write_safetensors(const std::filesystem::path& path, const std::vector<TensorContent>& tensors,
                       const std::map<std::string, std::string>& metadata);
void write_gguf(const std::filesystem::path& path, const GgufKeys& keys,
                const std::vector<TensorContent>& tensors);

std::string read_file(const std::filesystem::path& path);
void write_file(const std::filesystem::path& path, std::string_view bytes);

/// A .safetensors file from its header and data.
std::string safetensors_bytes(std::string_view header, std::string_view data);

/// Builds a GGUF file number by number, so that it can be wrong anywhere.
class GgufBytes {
 public:
  template <class T>
  GgufBytes& number(T value) {
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof value);
    return *this;
  }
  GgufBytes& u32(std::uint32_t value) { return number(value); }
  GgufBytes& u64(std::uint64_t value) { return number(value); }
  GgufBytes& text(std::string_view text) { return u64(text.size()).raw(text); }
  GgufBytes& raw(std::string_view bytes) {
    bytes_ += bytes;
    return *this;
  }
  /// Magic, version 3 and the counts.
  static GgufBytes begin(std::uint64_t num_tensors, std::uint64_t num_keys) {
    return GgufBytes().raw("GGUF").u32(3).u64(num_tensors).u64(num_keys);
  }
  /// A description of a tensor; `dims`: fastest first.
  GgufBytes& tensor(std::string_view name, const std::vector<std::uint64_t>& dims,
                    std::uint32_t type, std::uint64_t offset) {
    text(name).u32(static_cast<std::uint32_t>(dims.size()));
    for (const std::uint64_t dim : dims) u64(dim);
    return u32(type).u64(offset);
  }
  GgufBytes& pad(std::size_t alignment = 32) {
    bytes_.append((alignment - bytes_.size() % alignment) % alignment, '\0');
    return *this;
  }
  const std::string& bytes() const { return bytes_; }

 private:
  std::string bytes_;
};

/// Valid files of a few hundred bytes each, by name.
std::vector<std::pair<std::string, std::string>> small_safetensors();
std::vector<std::pair<std::string, std::string>> small_gguf();

}  // namespace arcus::test
