// MappedFile for the fuzzers: no file, but a block of memory of its own for the input, so that the
// address sanitizer sees a step over its end.
#include <cstdlib>
#include <cstring>
#include <utility>

#include "src/data/mapped_file.hpp"
#include "tests/fuzz/fuzz.hpp"

namespace arcus {
namespace {

std::string_view input;

}  // namespace

void fuzz::set_file_contents(std::string_view contents) { input = contents; }

MappedFile::MappedFile(const std::filesystem::path& /*path*/)
    : data_(input.empty() ? nullptr : std::malloc(input.size())), size_(input.size()) {
  if (data_ != nullptr) std::memcpy(data_, input.data(), size_);
}
MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}
MappedFile::~MappedFile() { std::free(data_); }
void MappedFile::expect_sequential() const {}
void MappedFile::release(std::size_t /*begin*/, std::size_t /*end*/) const {}

}  // namespace arcus
