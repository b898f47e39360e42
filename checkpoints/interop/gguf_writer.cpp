#include <fmt/format.h>

#include <algorithm>
#include <set>
#include <type_traits>

#include "checkpoints/interop/gguf.hpp"
#include "checkpoints/interop/gguf_types.hpp"
#include "src/base/error.hpp"
#include "src/data/utf8.hpp"

namespace arcus {
namespace {

using Keys = std::vector<std::pair<std::string, GgufValue>>;

/// Collects a description's bytes.
class Description {
 public:
  template <class T>
  void number(T value) {
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  void text(std::string_view text) {
    number(static_cast<std::uint64_t>(text.size()));
    bytes_ += text;
  }
  void type(GgufType type) { number(static_cast<std::uint32_t>(type)); }
  void value(const GgufValue& value) {
    if (is_array(value)) type(GgufType::array);
    type(type_of(value));
    std::visit([&](const auto& held) { put(held); }, value);
  }
  const std::string& bytes() const { return bytes_; }

 private:
  void put(const std::string& held) { text(held); }
  void put(bool held) { number(static_cast<std::uint8_t>(held)); }
  template <class T>
  requires std::is_arithmetic_v<T>
  void put(T held) { number(held); }
  template <class T>
  void put(const std::vector<T>& held) {
    number(static_cast<std::uint64_t>(held.size()));
    for (const T& item : held) put(item);
  }

  std::string bytes_;
};

std::int64_t aligned(std::int64_t bytes) {
  constexpr std::int64_t kAlignment = kGgufAlignment;
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

void check_name(const char* what, std::string_view name, std::size_t most_bytes,
                std::set<std::string_view>& taken) {
  ARCUS_CHECK(!name.empty() && name.size() <= most_bytes &&
                  find_invalid_utf8(name) == std::string_view::npos && taken.insert(name).second,
              "\"{}\" is to name a {}: empty, longer than {} bytes, not UTF-8 or taken", name, what,
              most_bytes);
}

void put_keys(const Keys& keys, Description& description) {
  std::set<std::string_view> taken;
  for (const auto& [name, value] : keys) {
    check_name("key", name, 65535, taken);
    ARCUS_CHECK(name != "general.alignment" || value == GgufValue{kGgufAlignment},
                "files are written with general.alignment {}", kGgufAlignment);
    description.text(name);
    description.value(value);
  }
}

/// Fills in bytes and offsets, from the beginning of the data.
void put_tensors(std::vector<FileTensor>& tensors, Description& description) {
  constexpr std::size_t kMostNameBytes = 63;
  constexpr std::size_t kMostDims = 4;
  std::set<std::string_view> taken;
  std::int64_t end = 0;
  for (FileTensor& tensor : tensors) {
    check_name("tensor", tensor.name, kMostNameBytes, taken);
    ARCUS_CHECK(tensor.shape.size() <= kMostDims, "{} has {} dimensions, GGUF knows up to {}",
                tensor.name, tensor.shape.size(), kMostDims);
    if (tensor.shape.empty()) tensor.shape = {1};
    bytes_of(tensor.type, tensor.shape.back());  // throws where a row is not whole blocks
    tensor.bytes = bytes_of(tensor.type, tensor.num_elements());
    tensor.offset = end;
    end = aligned(end + tensor.bytes);
    description.text(tensor.name);
    description.number(static_cast<std::uint32_t>(tensor.shape.size()));
    std::for_each(tensor.shape.rbegin(), tensor.shape.rend(),
                  [&](std::int64_t dim) { description.number(static_cast<std::uint64_t>(dim)); });
    description.number(ggml_type_of(tensor.type));
    description.number(static_cast<std::uint64_t>(tensor.offset));
  }
}

std::string describe(const Keys& keys, std::vector<FileTensor>& tensors) {
  Description description;
  for (const char c : kGgufMagic) description.number(c);
  description.number(std::uint32_t{3});
  description.number(static_cast<std::uint64_t>(tensors.size()));
  description.number(static_cast<std::uint64_t>(keys.size()));
  put_keys(keys, description);
  put_tensors(tensors, description);
  return description.bytes();
}

}  // namespace

GgufWriter::GgufWriter(const std::filesystem::path& path, const Keys& keys,
                       std::vector<FileTensor> tensors)
    : tensors_(std::move(tensors)), description_(describe(keys, tensors_)), file_(path) {
  file_.write(description_);
  description_ = {};
  file_.pad(kGgufAlignment);
  finish_full_tensors();
}

void GgufWriter::finish_full_tensors() {
  while (tensor_idx_ < tensors_.size() && written_bytes_ == tensors_[tensor_idx_].bytes) {
    file_.pad(kGgufAlignment);
    written_bytes_ = 0;
    ++tensor_idx_;
  }
}

void GgufWriter::write(std::string_view bytes) {
  while (!bytes.empty()) {
    ARCUS_CHECK(tensor_idx_ < tensors_.size(), "{}: {} bytes too many", file_.path().string(),
                bytes.size());
    const std::int64_t missing = tensors_[tensor_idx_].bytes - written_bytes_;
    const std::string_view piece = bytes.substr(0, static_cast<std::size_t>(missing));
    file_.write(piece);
    written_bytes_ += std::ssize(piece);
    bytes.remove_prefix(piece.size());
    finish_full_tensors();
  }
}

void GgufWriter::finish() {
  ARCUS_CHECK(tensor_idx_ == tensors_.size(), "{}: {} of {} tensors are missing",
              file_.path().string(), tensors_.size() - tensor_idx_, tensors_.size());
  file_.finish();
}

}  // namespace arcus
