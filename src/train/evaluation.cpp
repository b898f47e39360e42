#include "src/train/evaluation.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numbers>

#include "src/base/log.hpp"
#include "src/train/batch.hpp"
#include "src/train/schedule.hpp"

namespace arcus {
namespace {

using Heartbeat = std::function<void(std::int64_t layer, const char* what)>;

/// Evaluates one domain; scratch buffers live as long as the evaluation.
class DomainEvaluator {
 public:
  DomainEvaluator(ModelInstance& instance, const EvalSampler& sampler,
                  std::int64_t max_micro_batches, const Heartbeat& heartbeat)
      : instance_(instance),
        sampler_(sampler),
        heartbeat_(heartbeat),
        buffers_(instance.options().micro_batch_seqs, instance.options().seq_len),
        stats_(instance.transformer().make_stats()),
        counts_(stats_.demand.size() + stats_.routed.size()) {
    const std::int64_t seqs = instance.options().micro_batch_seqs;
    const std::int64_t all = (sampler.num_windows() + seqs - 1) / seqs;
    schedule_ = {max_micro_batches > 0 ? std::min(all, max_micro_batches) : all,
                 instance.world().size()};
  }

  DomainEval run(const std::string& name) {
    DomainEval result{.domain = name};
    double loss = 0;
    for (std::int64_t round = 0; round < schedule_.rounds(); ++round) {
      for (const double part : gather(run_round(round))) loss += part;
    }
    // Tokens per expert and tokens routed of every layer; targets, bytes and tokens.
    const std::size_t scalars = counts_.size();
    counts_.insert(counts_.end(), {targets_, bytes_, tokens_});
    Stream& stream = instance_.stream();
    stream.wait(instance_.world().all_reduce(
        stream,
        {.buffer = {counts_.data(), DType::i64, 1, static_cast<std::int64_t>(counts_.size())}}));
    result.tokens = counts_[scalars];
    result.bytes = counts_[scalars + 1];
    const auto all = static_cast<double>(std::max<std::int64_t>(1, counts_[scalars + 2]));
    const ModelConfig& model = instance_.options().model;
    for (std::int64_t l = 0; l < model.num_layers; ++l) {
      auto& experts = result.tokens_per_expert.emplace_back();
      auto& share = result.stream_share.emplace_back(1);
      if (l < model.first_k_dense) continue;
      const auto routed = stats_.demand.size() + static_cast<std::size_t>(l);
      share = static_cast<double>(counts_[routed]) / all;
      const auto begin = counts_.begin() + l * model.num_experts;
      experts.assign(begin, begin + model.num_experts);
    }
    result.loss = loss / static_cast<double>(std::max<std::int64_t>(1, result.tokens));
    result.ppl = std::exp(result.loss);
    result.bits_per_byte =
        loss / std::numbers::ln2 / static_cast<double>(std::max<std::int64_t>(1, result.bytes));
    return result;
  }

 private:
  double run_round(std::int64_t round) {
    const std::int64_t seqs = instance_.options().micro_batch_seqs;
    const std::int64_t number = schedule_.number(round, instance_.world().rank());
    MicroBatch batch = buffers_.idle();
    if (number >= 0) {
      const std::int64_t first = number * seqs;
      batch = buffers_.fill(sampler_, number, std::min(seqs, sampler_.num_windows() - first), first,
                            targets_, bytes_);
    }
    const ArenaScope scope(instance_.saved());
    PassContext ctx = instance_.pass(batch, stats_);
    ctx.training = false;
    if (heartbeat_) ctx.heartbeat = &heartbeat_;
    const DType acc = accumulate_dtype(instance_.options().compute);
    instance_.transformer().evaluate(ctx, instance_.params(), instance_.dispatcher(),
                                     instance_.saved().allocate(acc, 1, batch.num_tokens()));
    if (number < 0) return 0;
    tokens_ += batch.num_real_tokens();
    const auto add = [](auto counts, const std::vector<std::int64_t>& values) {
      for (const std::int64_t value : values) *counts++ += value;
    };
    add(counts_.begin(), stats_.demand);
    add(counts_.begin() + std::ssize(stats_.demand), stats_.routed);
    return stats_.token_loss_sum;
  }

  /// One number of every rank, in rank order: the round's micro-batches in ascending order.
  std::vector<double> gather(double value) {
    const auto ranks = static_cast<std::size_t>(instance_.world().size());
    std::vector<double> values(ranks);
    std::vector<std::int64_t> counts(ranks, 1);
    std::vector<std::int64_t> offsets(ranks);
    for (std::size_t r = 0; r < ranks; ++r) offsets[r] = static_cast<std::int64_t>(r);
    values[static_cast<std::size_t>(instance_.world().rank())] = value;
    Stream& stream = instance_.stream();
    stream.wait(instance_.world().all_gather_v(
        stream, {.buffer = {values.data(), DType::f64, 1, static_cast<std::int64_t>(ranks)},
                 .counts = counts,
                 .offsets = offsets}));
    return values;
  }

  ModelInstance& instance_;
  const EvalSampler& sampler_;
  const Heartbeat& heartbeat_;
  BatchBuffers buffers_;
  MicroBatchStats stats_;
  MicroBatchSchedule schedule_;
  std::int64_t targets_ = 0;
  std::int64_t bytes_ = 0;
  std::int64_t tokens_ = 0;
  std::vector<std::int64_t> counts_;  ///< [L * E], then [L]
};

}  // namespace

EvalMetrics evaluate(ModelInstance& instance, const TokenDataset& dataset, const DataConfig& data,
                     const std::vector<std::string>& domains, std::int64_t max_micro_batches,
                     std::int64_t step, const Heartbeat& heartbeat) {
  EvalMetrics metrics{.step = step};
  for (const std::string& name : domains.empty() ? dataset.domains() : domains) {
    const EvalSampler sampler(dataset, dataset.domain_idx(name), data, instance.options().seq_len);
    if (sampler.num_windows() == 0) {
      if (instance.world().rank() == 0) {
        spdlog::warn("domain {} has no held-out text; prepare it with --valid-fraction", name);
      }
      continue;
    }
    metrics.domains.push_back(
        DomainEvaluator(instance, sampler, max_micro_batches, heartbeat).run(name));
  }
  return metrics;
}

}  // namespace arcus
