#include <algorithm>
#include <limits>

#include "kernels/cpu/top.hpp"
#include "kernels/select.hpp"

namespace arcus::cpu {
namespace {

/// Fills expert_of_slot with what is wanted, counts demand; with `limit`, a slot behind the
/// limit-th of its expert, in the order choice rank, then token, is dropped.
void take_by_position(const ApplyCapacity& args, std::int64_t limit) {
  auto* demand = args.demand.as<std::int64_t>();
  const std::int64_t topk = args.wanted.cols;
  for (std::int64_t j = 0; j < topk; ++j) {
    for (std::int64_t t = 0; t < args.wanted.rows; ++t) {
      const std::int32_t expert = args.wanted.row<std::int32_t>(t)[j];
      const bool taken = expert >= 0 && demand[expert]++ < limit;
      args.expert_of_slot.row<std::int32_t>(t)[j] = taken ? expert : -1;
    }
  }
}

/// Drops from every expert that more than `capacity` want all but its largest scores, ties by
/// token.
template <class A>
void keep_best_scores(const ApplyCapacity& args) {
  const std::int64_t topk = args.wanted.cols;
  const std::int64_t num_slots = args.wanted.rows * topk;
  const auto* demand = args.demand.as<std::int64_t>();
  // Slots sorted by expert; slot = token * topk + choice rank. end[e] walks from the begin of the
  // expert's part to its end.
  auto* slots = args.scratch.as<std::int64_t>();
  auto* end = slots + std::max(num_slots, args.num_experts);
  std::int64_t begin = 0;
  for (std::int64_t e = 0; e < args.num_experts; ++e) {
    end[e] = begin;
    begin += demand[e];
  }
  for (std::int64_t slot = 0; slot < num_slots; ++slot) {
    const std::int32_t e = args.wanted.row<std::int32_t>(slot / topk)[slot % topk];
    if (e >= 0) slots[end[e]++] = slot;
  }
  for (std::int64_t e = 0; e < args.num_experts; ++e) {
    if (demand[e] <= args.capacity) continue;
    const auto score = [&](std::int64_t slot) { return ordered(args.s.row<A>(slot / topk)[e]); };
    std::int64_t* const last = slots + end[e];
    std::int64_t* const cut = last - demand[e] + args.capacity;
    std::nth_element(last - demand[e], cut, last, [&](std::int64_t a, std::int64_t b) {
      const A sa = score(a);
      const A sb = score(b);
      return sa > sb || (sa == sb && a < b);
    });
    for (const std::int64_t* slot = cut; slot != last; ++slot) {
      args.expert_of_slot.row<std::int32_t>(*slot / topk)[*slot % topk] = -1;
    }
  }
}

}  // namespace

void apply_capacity(Stream&, const ApplyCapacity& args) {
  auto* demand = args.demand.as<std::int64_t>();
  std::fill_n(demand, args.num_experts, 0);
  const bool by_position = args.capacity > 0 && args.policy == DropPolicy::position;
  take_by_position(args, by_position ? args.capacity : std::numeric_limits<std::int64_t>::max());
  if (args.capacity == 0 || by_position) return;
  ARCUS_CHECK(args.scratch.cols >= 2 * std::max(args.wanted.size(), args.num_experts),
              "apply_capacity: scratch of {} for {} slots and {} experts", args.scratch.cols,
              args.wanted.size(), args.num_experts);
  dispatch_accumulate(args.s.dtype, [&]<class A>() { keep_best_scores<A>(args); });
}

}  // namespace arcus::cpu
