#include "checkpoints/interop/file_checks.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "src/base/error.hpp"
#include "src/data/utf8.hpp"

namespace arcus::file_checks {
namespace {

constexpr std::int64_t kMost = std::int64_t{1} << 62;

bool is_control(unsigned char c) { return c < 0x20 || c == 0x7F; }

}  // namespace

std::optional<std::int64_t> num_elements(std::span<const std::int64_t> shape) {
  std::int64_t elements = 1;
  bool empty = false;
  for (const std::int64_t size : shape) {
    if (size < 0) return {};
    empty = empty || size == 0;
    if (size == 0) continue;
    if (elements > kMost / size) return {};
    elements *= size;
  }
  return empty ? 0 : elements;
}

std::string shown(std::string_view text) {
  constexpr std::size_t kShown = 80;
  const std::string_view begin = text.substr(0, utf8_boundary(text, kShown));
  std::string line;
  for (std::size_t at = 0; at < begin.size();) {
    const std::size_t good = std::min(find_invalid_utf8(begin.substr(at)), begin.size() - at);
    for (const char c : begin.substr(at, good)) {
      const auto byte = static_cast<unsigned char>(c);
      line += is_control(byte) ? fmt::format("\\x{:02x}", byte) : std::string(1, c);
    }
    at += good;
    if (at < begin.size()) {
      line += fmt::format("\\x{:02x}", static_cast<unsigned char>(begin[at++]));
    }
  }
  if (begin.size() < text.size()) line += fmt::format("... ({} bytes)", text.size());
  return line;
}

std::string shown(std::span<const std::int64_t> shape) {
  return fmt::format("[{}]", fmt::join(shape.first(std::min<std::size_t>(shape.size(), 8)), ", ")) +
         (shape.size() > 8 ? fmt::format(" and {} more dimensions", shape.size() - 8) : "");
}

void fail_short(const std::filesystem::path& path, const std::string& what) {
  ARCUS_FAIL(ExitCode::data,
             "{} is shorter than its description says: {}; half a download? fetch it again",
             path.string(), what);
}

void require_fetched(const std::filesystem::path& path, std::string_view contents) {
  ARCUS_REQUIRE(!contents.empty(), ExitCode::data, "{} is empty; fetch it again", path.string());
  ARCUS_REQUIRE(!contents.starts_with("version https://git-lfs."), ExitCode::data,
                "{} is a pointer of Git LFS, not the file itself; fetch that with git lfs pull",
                path.string());
}

}  // namespace arcus::file_checks
