#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "checkpoints/interop/gguf.hpp"

/// The numbers of the GGUF format that reader and writer share.
namespace arcus {

inline constexpr std::string_view kGgufMagic = "GGUF";
inline constexpr std::uint32_t kGgufAlignment = 32;  ///< where no key says otherwise

/// Types of keys.
enum class GgufType : std::uint32_t {
  u8,
  i8,
  u16,
  i16,
  u32,
  i32,
  f32,
  boolean,
  text,
  array,
  u64,
  i64,
  f64
};

/// Type of a value, of an array's items.
GgufType type_of(const GgufValue& value);
bool is_array(const GgufValue& value);
/// "u32", "a text", "an array of f32".
std::string kind_of(const GgufValue& value);

std::uint32_t ggml_type_of(FileType type);
std::optional<FileType> file_type_of_ggml(std::uint32_t number);
/// "Q4_K"; "number 99" for an unknown one.
std::string ggml_type_name(std::uint32_t number);

}  // namespace arcus
