#include "launch/progress.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>

namespace arcus {
namespace {

using Seconds = std::chrono::duration<double>;
constexpr Seconds kTerminalInterval{0.1};
constexpr Seconds kPlainInterval{60};

}  // namespace

std::string format_duration(double seconds) {
  const auto total = static_cast<std::int64_t>(std::llround(std::max(0.0, seconds)));
  if (total < 60) return fmt::format("{} s", total);
  if (total < 3600) return fmt::format("{}:{:02}", total / 60, total % 60);
  return fmt::format("{}:{:02}:{:02}", total / 3600, total / 60 % 60, total % 60);
}

std::string format_count(double count) {
  if (count < 1e3) return fmt::format("{:.0f}", count);
  if (count < 1e6) return fmt::format("{:.1f}k", count / 1e3);
  if (count < 1e9) return fmt::format("{:.2f}M", count / 1e6);
  return fmt::format("{:.2f}G", count / 1e9);
}

ProgressLine::ProgressLine(std::FILE* stream, std::int64_t first_step, std::int64_t total_steps,
                           double max_minutes)
    : stream_(stream),
      terminal_(isatty(fileno(stream)) != 0),
      first_step_(first_step),
      total_steps_(total_steps),
      max_seconds_(max_minutes * 60),
      start_(Clock::now()),
      last_draw_(start_ - std::chrono::hours(1)) {}

ProgressLine::~ProgressLine() {
  if (terminal_ && drawn_) std::fputc('\n', stream_);
}

std::string ProgressLine::format(const StepProgress& progress, double elapsed_s) const {
  const std::int64_t done = progress.step - first_step_;
  double remaining_s = 0;
  if (done > 0) {
    remaining_s =
        elapsed_s / static_cast<double>(done) * static_cast<double>(total_steps_ - progress.step);
  }
  if (max_seconds_ > 0) remaining_s = std::min(remaining_s, max_seconds_ - elapsed_s);
  const std::string step = fmt::format("{}", progress.step);
  const std::string total = fmt::format("{}", total_steps_);
  std::string text = fmt::format("step {:>{}}/{}  loss {:.4f}  {} tokens/s", step, total.size(),
                                 total, progress.loss, format_count(progress.tokens_per_s));
  if (progress.max_mean_load > 0) text += fmt::format("  load {:.2f}x", progress.max_mean_load);
  return text + fmt::format("  {} left", format_duration(remaining_s));
}

void ProgressLine::update(const StepProgress& progress) {
  const Clock::time_point now = Clock::now();
  const bool edge = progress.step == first_step_ + 1 || progress.step == total_steps_;
  if (!edge && now - last_draw_ < (terminal_ ? kTerminalInterval : kPlainInterval)) return;
  last_draw_ = now;
  draw(format(progress, Seconds(now - start_).count()));
}

void ProgressLine::draw(const std::string& text) {
  if (terminal_) {
    fmt::print(stream_, "\r\033[K{}", text);
  } else {
    fmt::print(stream_, "{}\n", text);
  }
  std::fflush(stream_);
  drawn_ = true;
}

void ProgressLine::clear() {
  if (!terminal_ || !drawn_) return;
  std::fputs("\r\033[K", stream_);
  std::fflush(stream_);
  drawn_ = false;
}

}  // namespace arcus
