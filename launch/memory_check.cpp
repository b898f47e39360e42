#include "launch/memory_check.hpp"

#include <limits>

#include "src/base/error.hpp"
#include "src/base/hdf5.hpp"
#include "src/base/memory.hpp"

namespace arcus {

std::int64_t memory_per_rank(int ranks_here) { return available_memory() / ranks_here; }

bool plan_background_saves(TrainPlan& plan, const Config& config, std::int64_t memory) {
  const std::int64_t copy = plan.state_bytes;
  const bool fits = memory == 0 || plan.worst_bytes() + copy <= memory;
  if (!config.checkpoint.background || config.checkpoint.every == 0 || !fits ||
      !h5::is_thread_safe()) {
    return false;
  }
  plan.bytes.push_back({"copy of the state for checkpoints", copy, copy});
  return true;
}

CheckedPlan checked_plan(Session& session, const Config& config, const TrainerOptions& options,
                         int num_threads) {
  constexpr std::int64_t kUnknown = std::numeric_limits<std::int64_t>::max();
  const int ranks_here = session.comm().node_size();
  const std::int64_t own = memory_per_rank(ranks_here);
  std::int64_t least = own == 0 ? kUnknown : own;
  session.stream().wait(session.comm().all_reduce(
      session.stream(), {TensorView(&least, DType::i64, 1, 1), ReduceOp::min}));
  CheckedPlan checked;
  session.together([&] {
    if (!session.is_root()) return;
    const std::int64_t ep_size = config.parallel.ep_size;
    checked.plan = make_plan(options, session.comm().size(), ranks_here, ep_size, num_threads);
    if (least != kUnknown) {
      const MemoryFit fit = memory_fit(options, checked.plan, ranks_here, ep_size, least);
      ARCUS_REQUIRE(fit.fits_even || !config.run.check_memory, ExitCode::usage, "{}", fit.text);
      checked.tight = fit.text;
    }
    checked.background_saves =
        plan_background_saves(checked.plan, config, least == kUnknown ? 0 : least);
  });
  checked.background_saves =
      broadcast_text(session.comm(), session.stream(), checked.background_saves ? "1" : "") == "1";
  return checked;
}

}  // namespace arcus
