#pragma once

#include <vector>

#include "checkpoints/interop/tensor_file.hpp"
#include "src/base/error.hpp"

namespace arcus::fuzz {

/// Reads every tensor of a file and holds the file to what TensorFile promises.
inline void read_through(const TensorFile& file, std::size_t file_bytes) {
  std::int64_t bytes = 0;
  std::vector<float> values;
  for (const FileTensor& tensor : file.tensors()) {
    ARCUS_CHECK(file.find(tensor.name) == &tensor, "{} is not found", tensor.name);
    ARCUS_CHECK(bytes_of(tensor.type, tensor.num_elements()) == tensor.bytes, "wrong size");
    values.assign(static_cast<std::size_t>(tensor.num_elements()), 0.0F);
    file.read(tensor, 0, values);
    bytes += tensor.bytes;
  }
  ARCUS_CHECK(bytes <= static_cast<std::int64_t>(file_bytes), "tensors share bytes");
}

}  // namespace arcus::fuzz
