#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "checkpoints/interop/tensor_file.hpp"

/// What readers of files from elsewhere share: sizes that may not be what they seem, and text of a
/// file in messages.
namespace arcus::file_checks {

/// Numbers in a tensor of this shape; none where a dimension is negative or the dimensions other
/// than zero multiply to more than 2^62 (so that products of some of them are safe as well).
std::optional<std::int64_t> num_elements(std::span<const std::int64_t> shape);
/// bytes_of, or none where that throws.
std::optional<std::int64_t> num_bytes(FileType type, std::int64_t elements);

/// `text` of a file for a message: one line, printable, not long.
std::string shown(std::string_view text);
/// "[2, 3]".
std::string shown(std::span<const std::int64_t> shape);

/// The error for a file that ends too early.
[[noreturn]] void fail_short(const std::filesystem::path& path, const std::string& what);
/// Throws when the file is empty or stands for another one that was not fetched.
void require_fetched(const std::filesystem::path& path, std::string_view contents);

}  // namespace arcus::file_checks
