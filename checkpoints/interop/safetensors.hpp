#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoints/interop/output_file.hpp"
#include "checkpoints/interop/tensor_file.hpp"

namespace arcus {

/// A .safetensors file: u64 header length, JSON header, data (F32, F16 and BF16 tensors). Other
/// types are refused by name.
class SafetensorsFile final : public TensorFile {
 public:
  /// Tensors whose names `ignored` accepts (masks and counters that models carry along) may be of
  /// any type; they are checked like the others, but not among tensors().
  using Ignored = std::function<bool(std::string_view name)>;
  explicit SafetensorsFile(const std::filesystem::path& path, const Ignored& ignored = {});
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

 private:
  std::map<std::string, std::string> metadata_;
};

/// Writes one .safetensors file, tensor after tensor, without holding more than what it is given.
class SafetensorsWriter {
 public:
  /// `tensors`: name, type and shape of all that will be written, in the order of the data; their
  /// offsets are filled in here. Throws (data) where the file cannot be made, (internal) where a
  /// tensor would not start at a multiple of its numbers' width, which some readers ask for.
  SafetensorsWriter(const std::filesystem::path& path, std::vector<FileTensor> tensors,
                    const std::map<std::string, std::string>& metadata = {{"format", "pt"}});
  /// The next bytes of the data, in pieces of any size. Throws (data) on a full disk.
  void write(std::string_view bytes);
  /// After all bytes: fsync. Throws (internal) where bytes are missing or too many.
  void finish();

 private:
  std::int64_t remaining_bytes_ = 0;
  OutputFile file_;
};

}  // namespace arcus
