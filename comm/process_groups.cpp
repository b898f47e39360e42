#include "comm/process_groups.hpp"

#include <algorithm>

namespace arcus {

ExpertPartition::ExpertPartition(std::int64_t num_experts, int num_ranks)
    : num_experts_(num_experts), num_ranks_(num_ranks) {
  ARCUS_CHECK(num_experts > 0 && num_ranks > 0, "{} experts on {} ranks", num_experts, num_ranks);
}

std::int64_t ExpertPartition::begin(int rank) const {
  const std::int64_t base = num_experts_ / num_ranks_, extra = num_experts_ % num_ranks_;
  return rank * base + std::min<std::int64_t>(rank, extra);
}

int resolve_ep_size(std::int64_t ep_size, int num_ranks, std::int64_t num_experts) {
  std::int64_t best = 1;
  for (std::int64_t d = 1; d <= std::min<std::int64_t>(num_ranks, num_experts); ++d) {
    if (num_ranks % d == 0) best = d;
  }
  if (ep_size == 0) return static_cast<int>(best);
  ARCUS_REQUIRE(
      ep_size > 0 && num_ranks % ep_size == 0, ExitCode::usage,
      "parallel.ep_size ({}) must divide the number of ranks ({}); set it to {} or \"auto\"",
      ep_size, num_ranks, best);
  ARCUS_REQUIRE(ep_size <= num_experts, ExitCode::usage,
                "parallel.ep_size ({}) must not exceed model.num_experts ({}); set it to {} or "
                "\"auto\"",
                ep_size, num_experts, best);
  return static_cast<int>(ep_size);
}

ProcessGroups make_process_groups(Communicator& world, int ep_size) {
  ARCUS_CHECK(ep_size > 0 && world.size() % ep_size == 0, "EP groups of {} out of {} ranks",
              ep_size, world.size());
  ProcessGroups groups;
  groups.world = &world;
  groups.ep = world.split(world.rank() / ep_size, world.rank());
  groups.edp = world.split(world.rank() % ep_size, world.rank());
  return groups;
}

}  // namespace arcus
