#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "comm/communicator.hpp"

namespace arcus {

/// Where a rank stands; names in the message of a stuck run.
struct Heartbeat {
  std::int64_t step = 0;
  std::int64_t layer = 0;
  std::int64_t sequence = 0;  ///< collectives so far
  char collective[24] = {};   ///< the one entered last, empty outside
};

/// A thread with a communicator of its own that collects every rank's heartbeat.
/// - A rank whose process is gone or stopped (no word for 5 s) is named with host, step, layer and
///   collective, and every watchdog ends its own process (exit code 69). No launcher is relied on.
/// - When no rank has moved for 3 times the median step, the rank that the others wait for is
///   reported as slow, once.
/// - When no rank has moved for `stuck_after_s` seconds the job ends as above.
/// A machine or job that was suspended as a whole (its watchdogs too) goes on afterwards.
///
/// Destroying it is collective: every rank waits until all have come to that point (or are stuck).
/// Only while an exception passes through does it return at once.
class Watchdog {
 public:
  virtual ~Watchdog() = default;
  /// Called by the trainer as it goes; cheap, callable from the training thread only. Between two
  /// calls no more than stuck_after_s seconds may pass on all ranks together. Steps, whose lengths
  /// tell what is slow, are told apart by `step`.
  virtual void beat(std::int64_t step, std::int64_t layer, const char* what) = 0;
};
/// `stuck_after_s` 0: 10 times the median step, and at least 60 s. `world` must be an MPI
/// communicator of several ranks (else: a watchdog that does nothing). Collective.
std::unique_ptr<Watchdog> make_watchdog(Communicator& world, double stuck_after_s);

}  // namespace arcus
