#include "src/base/error.hpp"

#include <new>
#include <system_error>

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
  // Files, and output that cannot be written.
  if (dynamic_cast<const std::system_error*>(&exception) != nullptr) {
    return {ExitCode::usage, exception.what(), "", 0};
  }
  return {ExitCode::internal, fmt::format("unexpected exception: {}", exception.what()), "", 0};
}

}  // namespace arcus
