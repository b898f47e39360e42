#include "src/train/memory_fit.hpp"

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "src/base/error.hpp"
#include "src/model/routing_rules.hpp"

namespace arcus {
namespace {

/// Settings that need less memory than those of a run.
struct Leaner {
  std::string settings;
  TrainerOptions options;
  int num_ranks = 1;
  std::int64_t even = 0, worst = 0;
};

std::vector<Leaner> leaner_settings(const TrainerOptions& options, int num_ranks) {
  std::vector<Leaner> leaner;
  const bool recompute = options.train.recompute;
  if (!recompute) {
    leaner.push_back({"train.recompute = true", options, num_ranks});
    leaner.back().options.train.recompute = true;
  }
  const RoutingConfig& routing = options.routing;
  // Training and evaluation share their memory: it is bounded where both are. Layers of their own
  // may be dropless still.
  if ((routing.capacity_factor == 0 || routing.eval_capacity_factor == 0) &&
      options.overrides.empty()) {
    std::string settings;
    TrainerOptions bounded = options;
    for (const auto& [key, factor] :
         {std::pair{"capacity_factor", &bounded.routing.capacity_factor},
          std::pair{"eval_capacity_factor", &bounded.routing.eval_capacity_factor}}) {
      if (*factor > 0) continue;
      *factor = 1.25;
      settings += fmt::format("{}routing.{} = 1.25", settings.empty() ? "" : ", ", key);
    }
    leaner.push_back({settings, std::move(bounded), num_ranks});
  }
  for (std::int64_t seqs = options.train.micro_batch_seqs / 2; seqs >= 1; seqs /= 2) {
    if (options.train.global_batch_seqs % seqs != 0) continue;
    for (const bool again : {false, true}) {
      if (again && recompute) continue;
      leaner.push_back({fmt::format("train.micro_batch_seqs = {}{}", seqs,
                                    again ? ", train.recompute = true" : ""),
                        options, num_ranks});
      leaner.back().options.train.micro_batch_seqs = seqs;
      leaner.back().options.train.recompute = recompute || again;
    }
  }
  return leaner;
}

/// Finds out what settings need on a layout; false where they cannot run, or need no less.
class Planner {
 public:
  Planner(const TrainPlan& plan, int ranks_per_node, std::int64_t ep_size)
      : plan_(&plan), ranks_per_node_(ranks_per_node), ep_size_(ep_size) {}

  bool operator()(Leaner& leaner) const {
    try {
      check_routing(leaner.options.model, leaner.options.routing);
      const TrainPlan needs = make_plan(leaner.options, leaner.num_ranks, ranks_per_node_, ep_size_,
                                        plan_->threads_per_rank);
      leaner.even = needs.even_bytes();
      leaner.worst = needs.worst_bytes();
    } catch (const Error&) {
      return false;
    }
    return leaner.worst < plan_->worst_bytes();
  }

 private:
  const TrainPlan* plan_;
  int ranks_per_node_;
  std::int64_t ep_size_;
};

/// The least number of ranks that would do, or the nearest.
void add_more_ranks(const TrainerOptions& options, int num_ranks, std::int64_t available,
                    const Planner& plan, std::vector<Leaner>& all) {
  constexpr int kMostTimes = 256;
  std::optional<Leaner> best;
  for (int times = 2; times <= kMostTimes; times *= 2) {
    Leaner more{fmt::format("{} ranks, on {} times as many nodes", num_ranks * times, times),
                options, num_ranks * times};
    if (!plan(more) || (best && more.worst >= best->worst)) continue;
    best = std::move(more);
    if (best->worst <= available) break;
  }
  if (best) all.push_back(std::move(*best));
}

constexpr std::size_t kMostRows = 6;

std::string table(const std::vector<Leaner>& rows) {
  std::string text;
  for (std::size_t i = 0; i < std::min(rows.size(), kMostRows); ++i) {
    text += fmt::format("\n  {:<66} {:>12} {:>12}", rows[i].settings, bytes_text(rows[i].even),
                        bytes_text(rows[i].worst));
  }
  return text;
}

}  // namespace

MemoryFit memory_fit(const TrainerOptions& options, const TrainPlan& plan, int ranks_per_node,
                     std::int64_t ep_size, std::int64_t available) {
  MemoryFit fit{.fits_even = plan.even_bytes() <= available,
                .fits_worst = plan.worst_bytes() <= available};
  if (fit.fits_worst) return fit;
  std::vector<Leaner> all = leaner_settings(options, plan.num_ranks);
  const Planner planner(plan, ranks_per_node, ep_size);
  std::erase_if(all, [&](Leaner& each) { return !planner(each); });
  add_more_ranks(options, plan.num_ranks, available, planner, all);
  // Those that change least first: they need most.
  std::stable_sort(all.begin(), all.end(),
                   [](const Leaner& a, const Leaner& b) { return a.worst > b.worst; });
  std::vector<Leaner> fitting = all;
  std::erase_if(fitting, [&](const Leaner& each) { return each.worst > available; });
  if (fitting.empty()) std::reverse(all.begin(), all.end());
  fit.text = fmt::format(
      "a rank needs {} with evenly loaded experts and {} at worst, but {} are available to it; "
      "{} (evenly loaded, at worst; run.check_memory = false goes on regardless):{}",
      bytes_text(plan.even_bytes()), bytes_text(plan.worst_bytes()), bytes_text(available),
      !fitting.empty() ? "what would fit" : "nothing tried fits at worst, the nearest are",
      table(fitting.empty() ? all : fitting));
  return fit;
}

}  // namespace arcus
