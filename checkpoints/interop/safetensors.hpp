#pragma once

#include <fstream>
#include <map>

#include "checkpoints/interop/tensor_file.hpp"

namespace arcus {

/// A .safetensors file: u64 header length, JSON header, data (F32, F16 and BF16 tensors).
class SafetensorsFile final : public TensorFile {
 public:
  explicit SafetensorsFile(const std::filesystem::path& path);
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

 private:
  std::map<std::string, std::string> metadata_;
};

/// Writes one .safetensors file, tensor after tensor, without holding more than what it is given.
class SafetensorsWriter {
 public:
  /// `tensors`: name, type and shape of all that will be written, in the order of the data; their
  /// offsets are filled in here. Throws (data) where the file cannot be made.
  SafetensorsWriter(const std::filesystem::path& path, std::vector<FileTensor> tensors,
                    const std::map<std::string, std::string>& metadata = {{"format", "pt"}});
  ~SafetensorsWriter();
  /// The next bytes of the data, in pieces of any size. Throws (data) on a full disk.
  void write(std::string_view bytes);
  /// After all bytes: fsync. Throws (internal) where bytes are missing or too many.
  void finish();

 private:
  std::filesystem::path path_;
  int descriptor_ = -1;
  std::int64_t remaining_bytes_ = 0;
};

}  // namespace arcus
