#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "checkpoints/interop/output_file.hpp"
#include "checkpoints/interop/tensor_file.hpp"

namespace arcus {

/// A value of a GGUF key. Integers and floats of the file keep their width: readers of the format
/// insist on u32 counts and f32 factors. Arrays of narrow integers are read as arrays of 32 bits.
using GgufValue =
    std::variant<std::uint8_t, std::int8_t, std::uint16_t, std::int16_t, std::uint32_t,
                 std::int32_t, std::uint64_t, std::int64_t, float, double, bool, std::string,
                 std::vector<std::uint32_t>, std::vector<std::int32_t>, std::vector<float>,
                 std::vector<bool>, std::vector<std::string>, std::vector<std::int64_t>,
                 std::vector<double>>;

/// A GGUF file, version 2 or 3, little-endian. Dimensions are reversed into shapes: {in, out} is
/// [out, in]. Tensors of types other than FileType's are refused by name.
class GgufFile final : public TensorFile {
 public:
  explicit GgufFile(const std::filesystem::path& path);

  const std::map<std::string, GgufValue>& keys() const { return keys_; }
  bool has(const std::string& key) const { return keys_.contains(key); }
  /// The value of a key; numbers of any width convert where they fit. Without `otherwise` a missing
  /// key is an error (data), and so is one of another kind.
  std::string text(const std::string& key, std::optional<std::string> otherwise = {}) const;
  std::int64_t integer(const std::string& key, std::optional<std::int64_t> otherwise = {}) const;
  double number(const std::string& key, std::optional<double> otherwise = {}) const;
  bool flag(const std::string& key, std::optional<bool> otherwise = {}) const;
  /// Arrays of integers of any width; a single integer is an array of one.
  std::vector<std::int64_t> integers(const std::string& key) const;
  /// Arrays of floats of any width; a single float is an array of one.
  std::vector<float> numbers(const std::string& key) const;
  std::vector<std::string> texts(const std::string& key) const;

 private:
  const GgufValue* find_key(const std::string& key, bool may_be_absent) const;

  std::map<std::string, GgufValue> keys_;
};

/// Writes a GGUF version 3 file, alignment 32, tensor after tensor.
class GgufWriter {
 public:
  /// `keys` in this order; `tensors`: name (< 64 bytes), type and shape of all that will be
  /// written, in the order of the data. The shape {} becomes {1}: GGML has no other scalars.
  GgufWriter(const std::filesystem::path& path,
             const std::vector<std::pair<std::string, GgufValue>>& keys,
             std::vector<FileTensor> tensors);
  /// The next bytes of the current tensor, in pieces of any size; padding between tensors is added
  /// here. Throws (data) on a full disk.
  void write(std::string_view bytes);
  /// After all bytes: fsync. Throws (internal) where bytes are missing.
  void finish();

 private:
  void finish_full_tensors();

  std::vector<FileTensor> tensors_;
  std::size_t tensor_idx_ = 0;
  std::int64_t written_bytes_ = 0;  ///< of the current tensor
  std::string description_;         ///< until it is written
  OutputFile file_;
};

}  // namespace arcus
