#include "src/base/error.hpp"

#include <filesystem>
#include <new>

namespace arcus {

std::string Error::report() const {
  if (code_ != ExitCode::internal || line_ == 0) return what();
  return fmt::format("{} (a defect of Arcus, {}:{})", what(), file_, line_);
}

Error as_error(const std::exception& exception) {
  if (const auto* known = dynamic_cast<const Error*>(&exception)) return *known;
  if (dynamic_cast<const std::bad_alloc*>(&exception) != nullptr) {
    return {ExitCode::internal,
            "out of memory; `arcus train --plan` shows what a run needs per rank", "", 0};
  }
  if (dynamic_cast<const std::filesystem::filesystem_error*>(&exception) != nullptr) {
    return {ExitCode::usage, exception.what(), "", 0};
  }
  return {ExitCode::internal, fmt::format("unexpected exception: {}", exception.what()), "", 0};
}

}  // namespace arcus
