#include "launch/checks.hpp"

#include <fmt/format.h>

#include <charconv>
#include <optional>
#include <string>

namespace arcus {
namespace {

template <class T>
std::optional<T> parse(const std::string& text) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

/// A check that lets `fits(value)` pass and else says what the value must be.
template <class T, class Fits>
CLI::Validator check(const std::string& allowed, Fits fits) {
  const auto test = [allowed, fits](const std::string& text) -> std::string {
    const std::optional<T> value = parse<T>(text);
    return value && fits(*value) ? "" : fmt::format("{} must be {}", text, allowed);
  };
  return {test, ""};
}

}  // namespace

CLI::Validator whole_number(std::int64_t min, std::int64_t max) {
  const std::string allowed = max == std::numeric_limits<std::int64_t>::max()
                                  ? fmt::format("a whole number of at least {}", min)
                                  : fmt::format("a whole number from {} to {}", min, max);
  return check<std::int64_t>(allowed, [=](std::int64_t v) { return v >= min && v <= max; });
}

CLI::Validator number_of_at_least(double min) {
  return check<double>(fmt::format("a number of at least {}", min), [=](double v) {
    return v >= min && v <= std::numeric_limits<double>::max();
  });
}

CLI::Validator share_up_to(double max) {
  return check<double>(fmt::format("a number above 0, at most {}", max),
                       [=](double v) { return v > 0 && v <= max; });
}

}  // namespace arcus
