#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <set>

#include "checkpoints/interop/safetensors.hpp"
#include "src/base/error.hpp"
#include "src/data/utf8.hpp"

namespace arcus {
namespace {

/// Bytes of all tensors; their offsets, from the end of the header, are filled in.
std::int64_t lay_out(std::vector<FileTensor>& tensors) {
  std::int64_t end = 0;
  std::set<std::string_view> names{"__metadata__"};
  for (FileTensor& tensor : tensors) {
    ARCUS_CHECK(!tensor.name.empty() && find_invalid_utf8(tensor.name) == std::string_view::npos &&
                    names.insert(tensor.name).second,
                "\"{}\" is to name a tensor: empty, not UTF-8 or taken", tensor.name);
    const std::int64_t width = bytes_of(tensor.type, 1);
    ARCUS_CHECK(tensor.num_elements() == 0 || end % width == 0,
                "tensor {} ({}) would begin at byte {}: put wider types in front", tensor.name,
                name_of(tensor.type), end);
    tensor.offset = end;
    tensor.bytes = bytes_of(tensor.type, tensor.num_elements());
    end += tensor.bytes;
  }
  return end;
}

/// Length and JSON, padded with blanks so that the data begin at a multiple of 8.
std::string header_of(const std::vector<FileTensor>& tensors,
                      const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  if (!metadata.empty()) json["__metadata__"] = metadata;
  for (const FileTensor& tensor : tensors) {
    json[tensor.name] = {{"dtype", name_of(tensor.type)},
                         {"shape", tensor.shape},
                         {"data_offsets", {tensor.offset, tensor.offset + tensor.bytes}}};
  }
  std::string text = json.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  const auto bytes = static_cast<std::uint64_t>(text.size());
  return std::string(reinterpret_cast<const char*>(&bytes), sizeof bytes) + text;
}

}  // namespace

SafetensorsWriter::SafetensorsWriter(const std::filesystem::path& path,
                                     std::vector<FileTensor> tensors,
                                     const std::map<std::string, std::string>& metadata)
    : remaining_bytes_(lay_out(tensors)), file_(path) {
  file_.write(header_of(tensors, metadata));
}

void SafetensorsWriter::write(std::string_view bytes) {
  ARCUS_CHECK(std::ssize(bytes) <= remaining_bytes_, "{}: {} bytes are too many, {} are missing",
              file_.path().string(), bytes.size(), remaining_bytes_);
  file_.write(bytes);
  remaining_bytes_ -= std::ssize(bytes);
}

void SafetensorsWriter::finish() {
  ARCUS_CHECK(remaining_bytes_ == 0, "{}: {} bytes are missing", file_.path().string(),
              remaining_bytes_);
  file_.finish();
}

}  // namespace arcus
