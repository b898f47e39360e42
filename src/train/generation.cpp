#include "src/train/generation.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "src/base/rng.hpp"

namespace arcus {

std::int32_t sample_token(std::span<const float> logits, const SamplingOptions& options,
                          double uniform) {
  const auto vocab = static_cast<std::int64_t>(logits.size());
  if (options.temperature <= 0) {
    return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) -
                                     logits.begin());
  }
  const auto logit = [&](std::int32_t id) {
    return static_cast<double>(logits[static_cast<std::size_t>(id)]);
  };
  std::vector<std::int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const std::int64_t most = options.top_k > 0 ? std::min(options.top_k, vocab) : vocab;
  const auto more_likely = [&](std::int32_t a, std::int32_t b) {
    return logit(a) != logit(b) ? logit(a) > logit(b) : a < b;
  };
  if (most < vocab) {
    std::partial_sort(order.begin(), order.begin() + most, order.end(), more_likely);
  } else {
    std::sort(order.begin(), order.end(), more_likely);
  }
  order.resize(static_cast<std::size_t>(most));
  std::vector<double> weight;
  double total = 0;
  for (const std::int32_t id : order) {
    weight.push_back(std::exp((logit(id) - logit(order[0])) / options.temperature));
    total += weight.back();
  }
  std::size_t kept = 0;
  double mass = 0;
  while (kept < weight.size() && (kept == 0 || mass < options.top_p * total))
    mass += weight[kept++];
  double target = uniform * mass;
  for (std::size_t i = 0; i < kept; ++i) {
    target -= weight[i];
    if (target < 0) return order[i];
  }
  return order[kept - 1];
}

namespace {

/// The sequences of one call of generate.
class Decoder {
 public:
  Decoder(ModelInstance& instance, const std::vector<std::vector<std::int32_t>>& prompts,
          const SamplingOptions& options)
      : instance_(instance),
        options_(options),
        rng_(options.seed, "sample", ""),
        holds_sequences_(instance.world().rank() == 0),
        sequences_(prompts),
        stats_(instance.transformer().make_stats()) {
    std::size_t longest = 1;
    for (auto& sequence : sequences_) {
      ARCUS_REQUIRE(!sequence.empty(), ExitCode::usage,
                    "a prompt is empty; give at least one token");
      prompt_sizes_.push_back(sequence.size());
      longest = std::max(longest, sequence.size());
      sequence.reserve(sequence.size() + static_cast<std::size_t>(options.max_new_tokens));
    }
    max_len_ = static_cast<std::int64_t>(longest) + options.max_new_tokens;
    check_length(static_cast<std::int64_t>(longest));
    done_.assign(sequences_.size(), false);
    const auto n = static_cast<std::int64_t>(sequences_.size());
    const DType compute = instance.options().compute;
    Arena counting = Arena::counting("KV cache");
    instance.transformer().make_caches(counting, n, max_len_, compute);
    memory_ = std::make_unique<Arena>("KV cache", counting.used());
    caches_ = instance.transformer().make_caches(*memory_, n, max_len_, compute);
    ids_.resize(sequences_.size());
    position_.resize(sequences_.size());
  }

  std::vector<std::vector<std::int32_t>> run(
      const std::function<void(std::size_t, std::int32_t)>& on_token) {
    const std::int64_t vocab = instance_.options().model.vocab_size;
    const auto n = static_cast<std::int64_t>(sequences_.size());
    std::vector<float> logits(static_cast<std::size_t>(n * vocab));
    for (std::int64_t position = 0; position + 1 < max_len_; ++position) {
      if (all_done()) break;
      step(position, {logits.data(), DType::f32, n, vocab});
      if (holds_sequences_) append(position, logits, on_token);
    }
    return sequences_;
  }

 private:
  /// The last token is not read again, so it needs no position.
  void check_length(std::int64_t longest) const {
    const ModelConfig& model = instance_.options().model;
    if (model.position != "learned") return;
    const std::int64_t left = model.max_positions + 1 - longest;
    ARCUS_REQUIRE(left > 0, ExitCode::usage,
                  "a prompt of {} tokens exceeds the {} positions that the model knows "
                  "(model.max_positions); shorten it",
                  longest, model.max_positions);
    ARCUS_REQUIRE(options_.max_new_tokens <= left, ExitCode::usage,
                  "{} tokens after a prompt of {} exceed the {} positions that the model knows "
                  "(model.max_positions); ask for at most {} (--max-tokens)",
                  options_.max_new_tokens, longest, model.max_positions, left);
  }
  /// Rank 0 decides; the others follow.
  bool all_done() {
    std::int64_t done = std::all_of(done_.begin(), done_.end(), [](bool d) { return d; }) ? 1 : 0;
    Stream& stream = instance_.stream();
    stream.wait(instance_.world().broadcast(stream, {.buffer = {&done, DType::i64, 1, 1}}));
    return done != 0;
  }

  void step(std::int64_t position, TensorView logits) {
    const auto n = static_cast<std::int64_t>(sequences_.size());
    auto* length = caches_[0].length.as<std::int32_t>();
    for (std::size_t b = 0; b < sequences_.size(); ++b) {
      const auto& sequence = sequences_[b];
      const auto at = std::min(static_cast<std::size_t>(position), sequence.size() - 1);
      ids_[b] = sequence[at];
      position_[b] = static_cast<std::int32_t>(position);
      length[b] = static_cast<std::int32_t>(position) + 1;
    }
    const std::int64_t rows = holds_sequences_ ? n : 0;
    const MicroBatch batch{.number = holds_sequences_ ? 0 : -1,
                           .num_seqs = rows,
                           .seq_len = 1,
                           .ids = {ids_.data(), DType::i32, 1, rows},
                           .position = {position_.data(), DType::i32, 1, rows}};
    PassContext ctx = instance_.pass(batch, stats_);
    ctx.training = false;
    ctx.step = position;
    instance_.transformer().decode(ctx, instance_.params(), instance_.dispatcher(), caches_,
                                   logits.row_range(0, rows));
  }

  void append(std::int64_t position, const std::vector<float>& logits,
              const std::function<void(std::size_t, std::int32_t)>& on_token) {
    const auto vocab = static_cast<std::size_t>(instance_.options().model.vocab_size);
    for (std::size_t b = 0; b < sequences_.size(); ++b) {
      auto& sequence = sequences_[b];
      const auto new_tokens = static_cast<std::int64_t>(sequence.size() - prompt_sizes_[b]);
      if (done_[b] || static_cast<std::int64_t>(sequence.size()) != position + 1) continue;
      const auto id =
          sample_token(std::span(logits).subspan(b * vocab, vocab), options_,
                       static_cast<double>(rng_.uniform(b, static_cast<std::uint64_t>(position))));
      done_[b] = id == options_.eos_id || new_tokens + 1 >= options_.max_new_tokens;
      sequence.push_back(id);
      if (on_token) on_token(b, id);
    }
  }

  ModelInstance& instance_;
  SamplingOptions options_;
  Rng rng_;
  bool holds_sequences_;
  std::vector<std::vector<std::int32_t>> sequences_;
  std::vector<std::size_t> prompt_sizes_;
  std::vector<bool> done_;
  std::int64_t max_len_ = 0;
  MicroBatchStats stats_;
  std::unique_ptr<Arena> memory_;
  std::vector<KvCache> caches_;
  std::vector<std::int32_t> ids_, position_;
};

}  // namespace

std::vector<std::vector<std::int32_t>> generate(
    ModelInstance& instance, const std::vector<std::vector<std::int32_t>>& prompts,
    const SamplingOptions& options,
    const std::function<void(std::size_t prompt, std::int32_t id)>& on_token) {
  const auto n = static_cast<std::int64_t>(prompts.size());
  ARCUS_REQUIRE(n > 0, ExitCode::usage, "no prompt was given");
  ARCUS_CHECK(n <= instance.options().micro_batch_seqs && instance.options().seq_len == 1,
              "{} prompts for an instance of {} x {} tokens", n,
              instance.options().micro_batch_seqs, instance.options().seq_len);
  for (std::int64_t l = 0; l < instance.options().model.num_layers; ++l) {
    const InstanceOptions& o = instance.options();
    const double factor =
        routing_of_layer(o.model, o.routing, o.overrides, l).routing.eval_capacity_factor;
    ARCUS_CHECK(factor == 0, "generation is dropless, eval_capacity_factor of layer {} is {}", l,
                factor);
  }
  return Decoder(instance, prompts, options).run(on_token);
}

}  // namespace arcus
