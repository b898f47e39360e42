#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "src/base/error.hpp"

/// What the fuzzers share. A reader of files from elsewhere either takes its input or throws an
/// Error that says data are wrong, in one line that is not endless; all else is a finding.
namespace arcus::fuzz {

inline std::string_view view(const std::uint8_t* data, std::size_t size) {
  return {reinterpret_cast<const char*>(data), size};
}

template <class Fn>
void takes_or_refuses(Fn&& fn) {
  try {
    fn();
  } catch (const Error& error) {
    const std::string_view message = error.what();
    const bool good = error.code() == ExitCode::data && message.size() < 1000 &&
                      message.find('\n') == std::string_view::npos;
    if (!good) {
      fmt::print(stderr, "code {}: {}\n", static_cast<int>(error.code()), message);
      std::abort();
    }
  }
}

/// The bytes that every MappedFile holds, whatever its path (see memory_file.cpp).
void set_file_contents(std::string_view contents);

}  // namespace arcus::fuzz
