#include "checkpoints/interop/tensor_file.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "checkpoints/interop/file_checks.hpp"
#include "src/base/error.hpp"
#include "src/data/utf8.hpp"

namespace arcus {

using file_checks::shown;

namespace {

void check_name(const std::filesystem::path& path, const FileTensor& tensor, std::size_t idx) {
  ARCUS_REQUIRE(!tensor.name.empty(), ExitCode::data, "{}: tensor {} has no name", path.string(),
                idx);
  ARCUS_REQUIRE(find_invalid_utf8(tensor.name) == std::string_view::npos, ExitCode::data,
                "{}: the name of tensor {} is not UTF-8: {}", path.string(), idx,
                shown(tensor.name));
}

void check_place(const std::filesystem::path& path, const FileTensor& tensor,
                 std::int64_t file_bytes) {
  const auto elements = file_checks::num_elements(tensor.shape);
  ARCUS_REQUIRE(elements && tensor.bytes == file_checks::num_bytes(tensor.type, *elements),
                ExitCode::data, "{}: tensor {} of {} numbers {} cannot have {} bytes",
                path.string(), shown(tensor.name), shown(tensor.shape), name_of(tensor.type),
                tensor.bytes);
  if (tensor.offset < 0 || tensor.offset > file_bytes - tensor.bytes) {
    file_checks::fail_short(
        path, fmt::format("tensor {} is to take {} bytes from byte {}, the file has {}",
                          shown(tensor.name), tensor.bytes, tensor.offset, file_bytes));
  }
}

/// Tensors without numbers may stand anywhere.
void check_overlaps(const std::filesystem::path& path, const std::vector<FileTensor>& tensors) {
  std::vector<const FileTensor*> by_offset;
  for (const FileTensor& tensor : tensors) {
    if (tensor.bytes > 0) by_offset.push_back(&tensor);
  }
  std::ranges::sort(by_offset, {}, &FileTensor::offset);
  for (std::size_t i = 1; i < by_offset.size(); ++i) {
    const FileTensor& left = *by_offset[i - 1];
    const FileTensor& right = *by_offset[i];
    ARCUS_REQUIRE(left.offset + left.bytes <= right.offset, ExitCode::data,
                  "{}: tensors {} (bytes {} to {} of the file) and {} (from byte {}) overlap",
                  path.string(), shown(left.name), left.offset, left.offset + left.bytes,
                  shown(right.name), right.offset);
  }
}

}  // namespace

std::int64_t FileTensor::num_elements() const {
  const auto elements = file_checks::num_elements(shape);
  ARCUS_REQUIRE(elements.has_value(), ExitCode::data, "tensor {} cannot have the shape {}",
                shown(name), shown(shape));
  return *elements;
}

TensorFile::TensorFile(const std::filesystem::path& path) : path_(path), file_(path) {}

void TensorFile::set_tensors(std::vector<FileTensor> tensors) {
  tensors_ = std::move(tensors);
  by_name_.reserve(tensors_.size());
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    check_name(path_, tensors_[i], i);
    check_place(path_, tensors_[i], static_cast<std::int64_t>(contents().size()));
    ARCUS_REQUIRE(by_name_.emplace(tensors_[i].name, i).second, ExitCode::data,
                  "{}: two tensors are called {}", path_.string(), shown(tensors_[i].name));
  }
  check_overlaps(path_, tensors_);
}

const FileTensor* TensorFile::find(std::string_view name) const {
  const auto found = by_name_.find(name);
  return found == by_name_.end() ? nullptr : &tensors_[found->second];
}

std::string_view TensorFile::bytes(const FileTensor& tensor) const {
  ARCUS_CHECK(tensor.offset >= 0 && tensor.bytes >= 0 &&
                  tensor.offset <= std::ssize(contents()) - tensor.bytes,
              "tensor {} is not of the file {}", tensor.name, path_.string());
  return contents().substr(static_cast<std::size_t>(tensor.offset),
                           static_cast<std::size_t>(tensor.bytes));
}

void TensorFile::read(const FileTensor& tensor, std::int64_t begin, std::span<float> out) const {
  const std::int64_t count = std::ssize(out);
  ARCUS_CHECK(begin >= 0 && begin <= tensor.num_elements() - count,
              "numbers {} to {} of tensor {} of {} are asked for", begin, begin + count,
              tensor.name, shown(tensor.shape));
  const auto first = static_cast<std::size_t>(bytes_of(tensor.type, begin));
  const auto size = static_cast<std::size_t>(bytes_of(tensor.type, count));
  decode(tensor.type, bytes(tensor).substr(first, size), out);
  // Pages of a large piece go back: who reads a model through holds one piece of it at a time.
  constexpr std::size_t kLarge = std::size_t{1} << 20;
  const std::size_t at = static_cast<std::size_t>(tensor.offset) + first;
  if (size >= kLarge) file_.release(at, at + size);
}

}  // namespace arcus
