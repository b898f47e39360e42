#include "src/train/memory_fit.hpp"

#include <algorithm>
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
  if (options.routing.capacity_factor == 0) {
    leaner.push_back({"routing.capacity_factor = 1.25 (drops tokens)", options, num_ranks});
    leaner.back().options.routing.capacity_factor = 1.25;
    leaner.back().options.routing.eval_capacity_factor = 1.25;
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
  for (int factor = 2; factor <= 8; factor *= 2) {
    leaner.push_back(
        {fmt::format("{} ranks, on {} times as many nodes", num_ranks * factor, factor), options,
         num_ranks * factor});
  }
  return leaner;
}

/// Fills in what each needs; those that cannot run, or need no less, are left out.
void plan_all(std::vector<Leaner>& all, const TrainPlan& plan, int ranks_per_node) {
  std::erase_if(all, [&](Leaner& each) {
    try {
      check_routing(each.options.model, each.options.routing);
      const int ep_size = each.num_ranks == plan.num_ranks ? plan.ep_size : 0;
      const TrainPlan leaner =
          make_plan(each.options, each.num_ranks, ranks_per_node, ep_size, plan.threads_per_rank);
      each.even = leaner.even_bytes();
      each.worst = leaner.worst_bytes();
    } catch (const Error&) {
      return true;
    }
    return each.worst >= plan.worst_bytes();
  });
}

constexpr std::size_t kMostRows = 6;

std::string table(const std::vector<Leaner>& rows) {
  std::string text;
  for (std::size_t i = 0; i < std::min(rows.size(), kMostRows); ++i) {
    text += fmt::format("\n  {:<54} {:>12} {:>12}", rows[i].settings, bytes_text(rows[i].even),
                        bytes_text(rows[i].worst));
  }
  return text;
}

}  // namespace

MemoryFit memory_fit(const TrainerOptions& options, const TrainPlan& plan, int ranks_per_node,
                     std::int64_t available) {
  MemoryFit fit{.fits_even = plan.even_bytes() <= available,
                .fits_worst = plan.worst_bytes() <= available};
  if (fit.fits_worst) return fit;
  std::vector<Leaner> all = leaner_settings(options, plan.num_ranks);
  plan_all(all, plan, ranks_per_node);
  // Those that change least first: they need most.
  std::stable_sort(all.begin(), all.end(),
                   [](const Leaner& a, const Leaner& b) { return a.worst > b.worst; });
  std::vector<Leaner> fitting = all;
  std::erase_if(fitting, [&](const Leaner& each) { return each.worst > available; });
  if (fitting.empty()) std::reverse(all.begin(), all.end());
  fit.text = fmt::format(
      "a rank needs {} with evenly loaded experts and {} at worst, but {} are available to it; "
      "{} (evenly loaded, at worst):{}",
      bytes_text(plan.even_bytes()), bytes_text(plan.worst_bytes()), bytes_text(available),
      !fitting.empty() ? "what would fit" : "nothing tried fits at worst, the nearest are",
      table(fitting.empty() ? all : fitting));
  return fit;
}

}  // namespace arcus
