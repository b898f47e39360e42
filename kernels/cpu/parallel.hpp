#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

#include "kernels/profile.hpp"

namespace arcus::cpu {

/// Where the time of `thread`'s tasks is added; null unless the stream is being measured.
inline double* busy_seconds(Stream& stream, int thread) {
  return stream.profile() == nullptr ? nullptr : &stream.profile()->work(thread).busy;
}

/// Calls fn(task, thread) for task = 0..num_tasks-1 on the stream's threads, tasks taken in order
/// as threads come free. Thread 0 (the caller) polls the stream's pending exchange between tasks.
/// After an exception no further task starts; it is thrown again on the calling thread.
template <class Fn>
void parallel_tasks(Stream& stream, std::int64_t num_tasks, Fn&& fn) {
  if (num_tasks <= 0) return;
  if (stream.num_threads() == 1 || num_tasks == 1) {
    for (std::int64_t task = 0; task < num_tasks; ++task) {
      {
        const ThreadTimer busy(busy_seconds(stream, 0));
        fn(task, 0);
      }
      stream.poll();
    }
    return;
  }
  std::exception_ptr error;
  std::atomic<bool> failed{false};
  // Always the whole team, even for two tasks: OpenMP rebuilds its team when the size changes.
#pragma omp parallel for schedule(dynamic, 1) num_threads(stream.num_threads())
  for (std::int64_t task = 0; task < num_tasks; ++task) {
    if (failed.load(std::memory_order_relaxed)) continue;
    try {
      const int thread = omp_get_thread_num();
      {
        const ThreadTimer busy(busy_seconds(stream, thread));
        fn(task, thread);
      }
      if (thread == 0) stream.poll();
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

/// Rows cut into pieces of at least `grain` rows: fn(begin, end, thread).
template <class Fn>
void parallel_rows(Stream& stream, std::int64_t rows, std::int64_t grain, Fn&& fn) {
  const std::int64_t most = std::max<std::int64_t>(1, rows / std::max<std::int64_t>(1, grain));
  const std::int64_t pieces = std::min<std::int64_t>(most, 4L * stream.num_threads());
  parallel_tasks(stream, rows > 0 ? pieces : 0, [&](std::int64_t piece, int thread) {
    fn(rows * piece / pieces, rows * (piece + 1) / pieces, thread);
  });
}

}  // namespace arcus::cpu
