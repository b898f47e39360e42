#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <limits>

namespace arcus {

/// Checks of numbers on the command line, whose messages name what is allowed; NaN never is.

/// A whole number from `min` to `max`.
CLI::Validator whole_number(std::int64_t min,
                            std::int64_t max = std::numeric_limits<std::int64_t>::max());
/// A number of at least `min`.
CLI::Validator number_of_at_least(double min);
/// A number above 0, at most `max`.
CLI::Validator share_up_to(double max);

}  // namespace arcus
