#include "launch/memory_check.hpp"

#include <spdlog/spdlog.h>

#include <limits>

#include "src/base/error.hpp"
#include "src/base/log.hpp"
#include "src/base/memory.hpp"

namespace arcus {

std::int64_t memory_per_rank(int ranks_here) { return available_memory() / ranks_here; }

void check_memory(Session& session, const TrainerOptions& options, const TrainPlan& plan) {
  constexpr std::int64_t kUnknown = std::numeric_limits<std::int64_t>::max();
  const std::int64_t own = memory_per_rank(session.comm().node_size());
  std::int64_t least = own == 0 ? kUnknown : own;
  session.stream().wait(session.comm().all_reduce(
      session.stream(), {TensorView(&least, DType::i64, 1, 1), ReduceOp::min}));
  session.together([&] {
    if (!session.is_root() || least == kUnknown) return;
    const MemoryFit fit = memory_fit(options, plan, session.comm().node_size(), least);
    ARCUS_REQUIRE(fit.fits_even, ExitCode::usage, "{}", fit.text);
    if (!fit.fits_worst) spdlog::warn("{}", fit.text);
  });
}

}  // namespace arcus
