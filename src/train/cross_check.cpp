#include "src/train/cross_check.hpp"

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "src/base/hash.hpp"

namespace arcus {
namespace {

/// Every rank's hash, in rank order.
std::vector<std::uint64_t> gather_hashes(Communicator& world, Stream& stream, std::uint64_t mine) {
  const auto ranks = static_cast<std::size_t>(world.size());
  std::vector<std::int64_t> all(ranks), counts(ranks, 1), offsets(ranks);
  for (std::size_t r = 0; r < ranks; ++r) offsets[r] = static_cast<std::int64_t>(r);
  all[static_cast<std::size_t>(world.rank())] = static_cast<std::int64_t>(mine);
  stream.wait(world.all_gather_v(
      stream, {TensorView(all.data(), DType::i64, 1, world.size()), counts, offsets}));
  return {all.begin(), all.end()};
}

/// Who computed what of one micro-batch.
struct Opinion {
  std::int64_t rank = 0;
  std::uint64_t hash = 0;
};

/// Ranks whose hash is not that of the most opinions; all of them where no hash has two.
void add_suspects(const std::vector<Opinion>& opinions, CrossCheckResult& result,
                  std::set<std::int64_t>& suspects) {
  std::map<std::uint64_t, int> votes;
  for (const Opinion& opinion : opinions) ++votes[opinion.hash];
  if (votes.size() == 1) return;
  const auto most = std::max_element(
      votes.begin(), votes.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
  const bool decided = most->second > 1;
  result.majority = decided && (suspects.empty() || result.majority);
  for (const Opinion& opinion : opinions) {
    if (!decided || opinion.hash != most->first) suspects.insert(opinion.rank);
  }
}

}  // namespace

CrossCheck::CrossCheck(ModelInstance& instance, const TrainerOptions& options,
                       std::function<void(std::int64_t, const char*)> heartbeat)
    : instance_(&instance),
      options_(options),
      schedule_{instance.options().num_micro_batches, instance.world().size()},
      workspace_(instance.transformer().make_workspace()),
      buffers_(options.train.micro_batch_seqs, options.train.seq_len),
      stats_(instance.transformer().make_stats()),
      heartbeat_(std::move(heartbeat)) {}

/// Hash of what a pass over micro-batch `number` (-1: none) leaves on this rank.
std::uint64_t CrossCheck::digest_of_pass(const BatchSampler& sampler, std::int64_t steps_done,
                                         std::int64_t number) {
  const TrainConfig& train = options_.train;
  Stream& stream = instance_->stream();
  instance_->params().start_sums(stream);
  MicroBatch batch = buffers_.idle();
  if (number >= 0) {
    batch = buffers_.fill(sampler, number, train.micro_batch_seqs,
                          steps_done * train.global_batch_seqs + number * train.micro_batch_seqs);
    batch.loss_scale =
        1.0 /
        static_cast<double>(std::max<std::int64_t>(
            1, sampler.num_targets(steps_done * train.global_batch_seqs, train.global_batch_seqs)));
    batch.weight = 1.0 / static_cast<double>(schedule_.num_micro_batches);
  }
  PassContext ctx = instance_->pass(batch, stats_);
  ctx.step = steps_done;
  if (heartbeat_) ctx.heartbeat = &heartbeat_;
  instance_->transformer().train(ctx, instance_->params(), instance_->dispatcher(), workspace_,
                                 train.recompute);
  instance_->params().complete_sums(stream);
  if (heartbeat_) heartbeat_(0, "cross-check");
  const bool experts = instance_->groups().edp->size() > 1;
  StreamHash hash;
  for (const FlatId flat : kFlatIds) {
    if (is_by_expert(flat) && !experts) continue;
    const TensorView sums = instance_->params().flat_sums(flat);
    hash.update(sums.data, static_cast<std::size_t>(sums.size()) * size_of(sums.dtype));
  }
  if (number >= 0) hash.update(&stats_.token_loss_sum, sizeof stats_.token_loss_sum);
  return hash.digest();
}

CrossCheckResult CrossCheck::run(const BatchSampler& sampler, std::int64_t steps_done) {
  Communicator& world = instance_->world();
  const std::int64_t ranks = world.size();
  CrossCheckResult result{.round = steps_done % schedule_.rounds(),
                          .experts_too = instance_->groups().edp->size() > 1};
  if (ranks == 1) return result;
  result.compared = true;
  // To another EP group where there is one: then nobody computes the same rows again.
  const std::int64_t shift = result.experts_too ? instance_->groups().ep->size() : 1;
  const std::int64_t passes = ranks / shift >= 3 ? 3 : 2;
  std::vector<std::vector<Opinion>> opinions(static_cast<std::size_t>(ranks));
  for (std::int64_t pass = 0; pass < passes; ++pass) {
    const auto place_of = [&](std::int64_t rank) { return (rank + pass * shift) % ranks; };
    const std::uint64_t mine =
        digest_of_pass(sampler, steps_done, schedule_.number(result.round, place_of(world.rank())));
    const std::vector<std::uint64_t> all = gather_hashes(world, instance_->stream(), mine);
    for (std::int64_t rank = 0; rank < ranks; ++rank) {
      opinions[static_cast<std::size_t>(place_of(rank))].push_back(
          {rank, all[static_cast<std::size_t>(rank)]});
    }
  }
  std::set<std::int64_t> suspects;
  for (const auto& of_micro_batch : opinions) add_suspects(of_micro_batch, result, suspects);
  result.suspects.assign(suspects.begin(), suspects.end());
  return result;
}

std::string to_text(const CrossCheckResult& result, std::int64_t step) {
  const bool one = result.suspects.size() == 1;
  return fmt::format(
      "before step {}: {}{} {} computed other gradients of the same micro-batch than {}{}; {} may "
      "be "
      "faulty: go on without {}",
      step, one ? "rank " : "ranks ", fmt::join(result.suspects, ", "), one ? "" : "each",
      result.majority ? "two other ranks that agree" : "another",
      result.experts_too ? "" : " (dense part; experts were not cross-checked, EDP is 1)",
      one ? "its machine" : "one of their machines", one ? "it" : "that one");
}

}  // namespace arcus
