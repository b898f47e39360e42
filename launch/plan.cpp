#include "launch/plan.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "launch/progress.hpp"
#include "launch/run_setup.hpp"
#include "src/base/error.hpp"

namespace arcus {
namespace {

/// Stands for `size` ranks of which only the first exists: enough to lay a model out, never to run
/// it.
class PlanningComm : public Communicator {
 public:
  explicit PlanningComm(int size) : Communicator(0, size, {}) {}
  [[noreturn]] void abort(ExitCode code, std::string_view message) override {
    ARCUS_FAIL(code, "{}", message);
  }

 private:
  Event do_all_to_all_v(const AllToAllV&) override { return refuse(); }
  Event do_all_reduce(const AllReduce&) override { return refuse(); }
  Event do_all_gather_v(const AllGatherV&) override { return refuse(); }
  Event do_reduce_scatter_v(const ReduceScatterV&) override { return refuse(); }
  Event do_broadcast(const Broadcast&) override { return refuse(); }
  void do_barrier() override { refuse(); }
  std::unique_ptr<Communicator> do_split(int, int) override {
    ARCUS_FAIL(ExitCode::internal, "a planned rank cannot be split");
  }
  [[noreturn]] static Event refuse() {
    ARCUS_FAIL(ExitCode::internal, "a planned rank cannot communicate");
  }
};

std::string megabytes(std::int64_t bytes) {
  return fmt::format("{:.1f} MB", static_cast<double>(bytes) / 1e6);
}

/// "0-3 | 4-7", shortened in the middle for many ranks.
std::string expert_blocks(std::int64_t num_experts, int ep_size) {
  const ExpertPartition experts(num_experts, ep_size);
  std::string text;
  for (int rank = 0; rank < ep_size; ++rank) {
    if (ep_size > 8 && rank == 3) {
      text += " | ...";
      rank = ep_size - 2;
      continue;
    }
    if (!text.empty()) text += " | ";
    const std::int64_t first = experts.begin(rank);
    const std::int64_t last = first + experts.count(rank) - 1;
    text += first == last ? fmt::format("{}", first) : fmt::format("{}-{}", first, last);
  }
  return text;
}

/// Measured share of a step that order-independent sums cost at c rows per segment, in percent
/// (see MATH: accumulation moves 24 bytes per weight and segment against 6 c operations).
double expected_sum_share(double rows, bool bf16) {
  struct Point {
    double rows, f32, bf16;
  };
  constexpr std::array<Point, 4> kMeasured{
      {{64, 24, 37}, {128, 14, 25}, {256, 6, 21}, {512, 3, 9}}};
  const auto value = [&](const Point& p) { return bf16 ? p.bf16 : p.f32; };
  if (rows >= kMeasured.back().rows) return value(kMeasured.back()) * 512 / rows;
  if (rows <= kMeasured.front().rows) return value(kMeasured.front());
  std::size_t i = 0;
  while (rows > kMeasured[i + 1].rows) ++i;
  const double t = std::log2(rows / kMeasured[i].rows);
  return value(kMeasured[i]) + t * (value(kMeasured[i + 1]) - value(kMeasured[i]));
}

std::string describe_segments(const Config& config, const ModelConfig& model) {
  const std::int64_t tokens = config.train.micro_batch_seqs * config.train.seq_len;
  const double even =
      static_cast<double>(tokens * model.topk) / static_cast<double>(model.num_experts);
  const std::int64_t capacity =
      expert_capacity(config.routing.capacity_factor, config.routing.min_capacity, model.topk,
                      tokens, model.num_experts);
  std::string text =
      fmt::format("{} tokens, {:.0f} rows per expert if evenly loaded", tokens, even);
  text += capacity > 0 ? fmt::format(", at most {} (capacity factor {})", capacity,
                                     config.routing.capacity_factor)
                       : ", no limit (dropless)";
  if (config.run.reproducible) {
    text += fmt::format("; order-independent sums cost about {:.0f} %",
                        expected_sum_share(even, config.train.dtype == "bf16"));
  }
  return text;
}

std::string describe_steps(const Config& config, const TokenDataset* dataset) {
  const double per_step =
      static_cast<double>(config.train.global_batch_seqs * config.train.seq_len);
  const double total = per_step * static_cast<double>(config.train.steps);
  std::string text = fmt::format("{} steps, {} tokens", config.train.steps, format_count(total));
  if (dataset != nullptr) {
    double available = 0;
    for (const DomainRecord& domain : dataset->manifest().domains) {
      available += static_cast<double>(domain.train.num_tokens);
    }
    text += fmt::format(" ({:.2f} times the {} tokens of the training text)", total / available,
                        format_count(available));
  }
  if (config.run.max_minutes > 0) text += fmt::format(", at most {} min", config.run.max_minutes);
  return text;
}

std::string describe_memory(const std::vector<ByteRow>& rows) {
  std::string text =
      fmt::format("{:<24}{:>14}{:>14}\n", "bytes per rank", "evenly loaded", "at worst");
  ByteRow sum{"together"};
  for (const ByteRow& row : rows) {
    text += fmt::format("  {:<22}{:>14}{:>14}\n", row.purpose, megabytes(row.balanced),
                        megabytes(row.worst));
    sum.balanced += row.balanced;
    sum.worst += row.worst;
  }
  return text + fmt::format("  {:<22}{:>14}{:>14}\n", sum.purpose, megabytes(sum.balanced),
                            megabytes(sum.worst));
}

}  // namespace

std::string describe_plan(const Config& config, const ModelConfig& model,
                          const TokenDataset* dataset, int num_ranks, int threads_per_rank) {
  const int ep_size = resolve_ep_size(config.parallel.ep_size, num_ranks, model.num_experts);
  PlanningComm world(num_ranks);
  ProcessGroups groups;
  groups.world = &world;
  groups.ep = std::make_unique<PlanningComm>(ep_size);
  groups.edp = std::make_unique<PlanningComm>(num_ranks / ep_size);
  Stream stream(1);
  const TrainerOptions options = trainer_options(config, model);
  // Arenas reserve addresses only; nothing is written to them here.
  ModelInstance instance(std::move(groups), stream, instance_options(options));
  const Trainer trainer(instance, options);
  std::vector<ByteRow> rows = instance.byte_rows();
  rows.push_back({"optimizer", trainer.optimizer_bytes(), trainer.optimizer_bytes()});

  const ParamRegistry& registry = instance.registry();
  const std::int64_t micro_batches = config.train.global_batch_seqs / config.train.micro_batch_seqs;
  const MicroBatchSchedule schedule{micro_batches, num_ranks};
  std::string text;
  text += fmt::format(
      "model        {} parameters, {} active per token; {} layers, {} experts, "
      "{} per token, {}\n",
      format_count(static_cast<double>(registry.total_parameters())),
      format_count(static_cast<double>(registry.active_parameters(model.topk))), model.num_layers,
      model.num_experts, model.topk, config.train.dtype);
  text += fmt::format("ranks        {} = EP {} x EDP {}, {} thread{} each; experts {}\n", num_ranks,
                      ep_size, num_ranks / ep_size, threads_per_rank,
                      threads_per_rank == 1 ? "" : "s", expert_blocks(model.num_experts, ep_size));
  text += fmt::format(
      "step         {} sequences of {} tokens = {} tokens, {} micro-batches in {} "
      "round{}\n",
      config.train.global_batch_seqs, config.train.seq_len,
      config.train.global_batch_seqs * config.train.seq_len, micro_batches, schedule.rounds(),
      schedule.rounds() == 1 ? "" : "s");
  text += fmt::format("micro-batch  {}\n", describe_segments(config, model));
  text += fmt::format("run          {}\n", describe_steps(config, dataset));
  return text + describe_memory(rows);
}

}  // namespace arcus
