#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "src/data/mapped_file.hpp"

namespace arcus {

/// How numbers stand in files of other programs. The last three are GGUF's blocks of 32 numbers.
enum class FileType { f32, f16, bf16, q8_0, q4_0, q4_1 };
std::string_view name_of(FileType type);
/// Bytes of `elements` numbers, a multiple of 32 for blocks; throws (data) where that is not so or
/// the bytes pass 2^62.
std::int64_t bytes_of(FileType type, std::int64_t elements);

/// IEEE binary16 and back; to nearest, ties to even, infinities beyond the largest finite number,
/// NaN stays NaN.
std::uint16_t f16_from_float(float value);
float float_from_f16(std::uint16_t bits);

/// Whether none is infinite or not a number.
bool all_finite(std::span<const float> values);

/// A tensor of a file.
struct FileTensor {
  std::string name;
  FileType type = FileType::f32;
  std::vector<std::int64_t> shape;  ///< outermost dimension first; {} is one number
  std::int64_t offset = 0;          ///< of its first byte in the file
  std::int64_t bytes = 0;

  std::int64_t num_elements() const;
};

/// A file of named tensors, mapped into memory, its description checked in full: every tensor lies
/// inside the file, none overlap, names are unique. Failures are Errors with ExitCode::data that
/// name the file.
class TensorFile {
 public:
  virtual ~TensorFile() = default;
  TensorFile(const TensorFile&) = delete;
  TensorFile& operator=(const TensorFile&) = delete;

  const std::filesystem::path& path() const { return path_; }
  /// In the file's order.
  const std::vector<FileTensor>& tensors() const { return tensors_; }
  const FileTensor* find(std::string_view name) const;
  /// The bytes of a tensor as they stand in the file.
  std::string_view bytes(const FileTensor& tensor) const;
  /// Elements [begin, begin + out.size()) as fp32, exact for f32, f16 and bf16; blocks dequantised
  /// as GGML does. `begin` and the count are multiples of 32 for blocks.
  void read(const FileTensor& tensor, std::int64_t begin, std::span<float> out) const;

 protected:
  explicit TensorFile(const std::filesystem::path& path);
  /// Takes over the description; throws where tensors overlap, repeat a name or leave the file.
  void set_tensors(std::vector<FileTensor> tensors);
  std::string_view contents() const { return file_.bytes(); }

 private:
  std::filesystem::path path_;
  MappedFile file_;
  std::vector<FileTensor> tensors_;
  std::unordered_map<std::string_view, std::size_t> by_name_;
};

/// `values` as the file's bytes: rounded to nearest, ties to even, for f16 and bf16. Not for
/// blocks. A finite value that a 16-bit type cannot hold throws (data), `what` names it.
std::string encode(FileType type, std::span<const float> values, std::string_view what);
/// The other way: `bytes` hold out.size() numbers, whole blocks of them where the type has blocks.
void decode(FileType type, std::string_view bytes, std::span<float> out);

}  // namespace arcus
