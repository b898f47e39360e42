#pragma once

#include <chrono>
#include <cstdint>
#include <vector>

#include "kernels/stream.hpp"

namespace arcus {

/// Where the time of a stream goes: nested spans of the thread that issues its ops, and what the
/// threads of an op do inside them. A stream has none unless it is being measured; then every op,
/// every collective and every wait is a span.
class Profile {
 public:
  /// With `separate_waits` ranks meet at a barrier before every exchange, so that waiting for
  /// others and the exchange itself can be told apart; what overlaps otherwise then overlaps less.
  Profile(int num_threads, bool separate_waits)
      : separate_waits_(separate_waits), work_(static_cast<std::size_t>(num_threads)) {}

  /// Seconds that threads spent on one thing, added over the threads.
  struct Work {
    double busy = 0;           ///< inside tasks
    double gemm = 0;           ///< inside matrix products
    double sums = 0;           ///< inside order-independent sums
    double gemm_flops = 0;     ///< rows that fill up a tile included
    double padding_flops = 0;  ///< of those rows
    Work& operator+=(const Work& other);
    Work& operator-=(const Work& other);
  };
  /// All spans of one name inside the same outer span.
  struct Total {
    const char* name = nullptr;
    const char* outer = nullptr;  ///< null: none
    std::int64_t calls = 0;
    double seconds = 0;  ///< without those of inner spans
    Work work;           ///< likewise
  };
  struct Event {
    const char* name = nullptr;
    double begin = 0, end = 0;  ///< seconds since start()
  };

  /// Forgets everything; `with_events` keeps single spans too.
  void start(bool with_events = false);
  void begin(const char* name);
  void end();
  const std::vector<Total>& totals() const { return totals_; }
  const std::vector<Event>& events() const { return events_; }
  bool separates_waits() const { return separate_waits_; }
  /// What `thread` of the stream's team has done; written by that thread alone.
  Work& work(int thread) { return work_[static_cast<std::size_t>(thread)].of_thread; }

 private:
  using Clock = std::chrono::steady_clock;
  struct Open {
    const char* name;
    double begin;
    double inner = 0;  ///< seconds of inner spans
    Work work_before, inner_work;
  };
  struct alignas(64) ThreadWork {
    Work of_thread;
  };
  double now() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }
  Work work_so_far() const;
  Total& total_of(const char* name, const char* outer);

  bool separate_waits_;
  bool with_events_ = false;
  Clock::time_point start_ = Clock::now();
  std::vector<Open> open_;
  std::vector<Total> totals_;
  std::vector<Event> events_;
  std::vector<ThreadWork> work_;
};

/// A span of the stream's profile, if it has one, until the end of the scope. `name` is a literal.
class Span {
 public:
  Span(const Stream& stream, const char* name) : profile_(stream.profile()) {
    if (profile_ != nullptr) profile_->begin(name);
  }
  ~Span() {
    if (profile_ != nullptr) profile_->end();
  }
  Span(const Span&) = delete;
  Span& operator=(const Span&) = delete;

 private:
  Profile* profile_;
};

/// Adds the time until the end of the scope to `seconds`, unless that is null.
class ThreadTimer {
 public:
  explicit ThreadTimer(double* seconds) : seconds_(seconds) {
    if (seconds_ != nullptr) begin_ = std::chrono::steady_clock::now();
  }
  ~ThreadTimer() {
    if (seconds_ == nullptr) return;
    *seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
  }
  ThreadTimer(const ThreadTimer&) = delete;
  ThreadTimer& operator=(const ThreadTimer&) = delete;

 private:
  double* seconds_;
  std::chrono::steady_clock::time_point begin_;
};

}  // namespace arcus
