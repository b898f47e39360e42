#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>

namespace arcus {

/// What one finished step says about the run's progress.
struct StepProgress {
  std::int64_t step = 0;  ///< finished steps
  double loss = 0;
  double tokens_per_s = 0;
  double max_mean_load = 0;  ///< largest expert's share of tokens over the mean; 0 = no MoE layer
};

/// "1:02:03", "2:03" (minutes), "45 s".
std::string format_duration(double seconds);
/// 950, 12.3k, 4.56M.
std::string format_count(double count);

/// The run's progress on one line that is drawn again and again on a terminal; elsewhere a plain
/// line a minute, and one for the first and last step.
class ProgressLine {
 public:
  using Clock = std::chrono::steady_clock;

  /// Draws to `stream`, as a live line if that is a terminal. `first_step` is the number of steps
  /// already done (a resumed run); `max_minutes` > 0 bounds the estimate.
  ProgressLine(std::FILE* stream, std::int64_t first_step, std::int64_t total_steps,
               double max_minutes = 0);
  ~ProgressLine();
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;

  void update(const StepProgress& progress);
  /// Takes the live line away so that something else can be printed.
  void clear();

  /// The text of one line, without time stamps or escapes.
  std::string format(const StepProgress& progress, double elapsed_s) const;

 private:
  void draw(const std::string& text);

  std::FILE* stream_;
  bool terminal_;
  bool drawn_ = false;
  std::int64_t first_step_;
  std::int64_t total_steps_;
  double max_seconds_;
  Clock::time_point start_;
  Clock::time_point last_draw_;
};

}  // namespace arcus
