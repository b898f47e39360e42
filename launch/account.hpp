#pragma once

#include <array>
#include <string>
#include <vector>

#include "kernels/profile.hpp"
#include "launch/session.hpp"

namespace arcus {

/// Where the time of a training step goes on one rank: rows that add up to the step.
struct StepAccount {
  static constexpr std::size_t kNumRows = 17;
  static const std::array<const char*, kNumRows>& names();
  std::array<double, kNumRows> ms{};  ///< a step
  double step_ms = 0;
  double sum() const;
};

/// The account of `steps` steps that took `seconds` in all. `peak_gflops` is this rank's measured
/// peak with all its threads.
StepAccount account_of(const Profile& profile, double seconds, std::int64_t steps,
                       double peak_gflops, int num_threads);

/// Every rank's account, in rank order, on all ranks. Collective.
std::vector<StepAccount> gather_accounts(Session& session, const StepAccount& account);
StepAccount mean_account(const std::vector<StepAccount>& ranks);
/// Prints one column a rank, their mean and its share of the step.
void print_accounts(const std::vector<StepAccount>& ranks);
/// Writes the spans of all ranks as a trace (JSON of the trace event format, one track a rank) that
/// Perfetto and chrome://tracing open. Collective.
void write_trace(Session& session, const Profile& profile, const std::string& file);

}  // namespace arcus
