#pragma once

#include <string_view>

#include "src/base/error.hpp"

namespace arcus {

/// Logs `message` as the last thing this job says. Several ranks may fail together (an error that
/// all agreed on) or one because of another (a broken connection): lower ranks, and errors that are
/// not about communication, get a head start, and ending them ends this process while it waits.
/// From here on TERM ends the process at once. For world rank `rank` of `size`.
void say_last_words(int rank, int size, ExitCode code, std::string_view message);

}  // namespace arcus
