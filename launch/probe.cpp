#include "launch/probe.hpp"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <numeric>

#include "launch/run_setup.hpp"
#include "src/base/rng.hpp"
#include "src/data/sampler.hpp"
#include "src/train/logits.hpp"

namespace arcus {
namespace {

constexpr std::int64_t kMostTokens = 4096;
constexpr std::int64_t kMostLogits = std::int64_t{1} << 26;  // 256 MiB
constexpr std::int64_t kMostTextLength = 512;

std::int64_t token_budget(std::int64_t vocab_size) {
  return std::clamp<std::int64_t>(kMostLogits / vocab_size, 64, kMostTokens);
}

std::vector<std::vector<std::int32_t>> random_texts(std::int64_t vocab_size, std::int64_t length,
                                                    std::int64_t count) {
  const Rng rng(1, "probe", "");
  std::vector<std::vector<std::int32_t>> texts(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < texts.size(); ++i) {
    for (std::int64_t t = 0; t < length; ++t) {
      const double u = rng.uniform(i, static_cast<std::uint64_t>(t));
      const auto id = static_cast<std::int64_t>(u * static_cast<double>(vocab_size));
      texts[i].push_back(static_cast<std::int32_t>(std::min(id, vocab_size - 1)));
    }
  }
  return texts;
}

/// Windows of every domain in turn, spread over its held-out text.
std::vector<std::vector<std::int32_t>> held_out_texts(const TokenDataset& dataset,
                                                      std::int64_t length, std::int64_t count) {
  std::vector<std::vector<std::int32_t>> texts;
  const auto domains = static_cast<std::int64_t>(dataset.domains().size());
  for (std::int64_t d = 0; d < domains; ++d) {
    const EvalSampler sampler(dataset, static_cast<std::size_t>(d), {}, length);
    const std::int64_t mine = std::min(sampler.num_windows(), (count + d) / domains);
    std::vector<std::int32_t> ids(static_cast<std::size_t>(length)), targets(ids), keys(ids);
    for (std::int64_t i = 0; i < mine; ++i) {
      const std::int64_t window = i * sampler.num_windows() / mine;
      sampler.sample(window, ids, targets, keys);
      texts.emplace_back(ids.begin(), ids.begin() + sampler.num_real_tokens(window));
    }
  }
  return texts;
}

}  // namespace

std::int64_t ProbeTexts::num_tokens() const {
  return std::accumulate(ids.begin(), ids.end(), std::int64_t{0},
                         [](std::int64_t n, const auto& text) { return n + std::ssize(text); });
}

std::int64_t ProbeTexts::longest() const {
  std::int64_t most = 1;
  for (const auto& text : ids) most = std::max(most, std::ssize(text));
  return most;
}

ProbeTexts choose_probe_texts(Session& session, const std::string& data, const Config& config,
                              std::int64_t vocab_size) {
  ProbeTexts texts;
  const std::int64_t budget = token_budget(vocab_size);
  const std::int64_t length =
      std::max<std::int64_t>(2, std::min({config.train.seq_len, kMostTextLength, budget}));
  const std::int64_t count = std::max<std::int64_t>(1, budget / length);
  session.together([&] {
    if (!data.empty() && std::filesystem::exists(data)) {
      const TokenDataset dataset = TokenDataset::open(data);
      ARCUS_REQUIRE(dataset.vocab_size() <= vocab_size, ExitCode::data,
                    "{} has a vocabulary of {}, the model of {}; --data names text of the model's "
                    "tokenizer",
                    data, dataset.vocab_size(), vocab_size);
      texts.ids = held_out_texts(dataset, length, count);
      texts.source = "held-out text of " + data;
    }
    if (!texts.ids.empty()) return;
    texts.ids = random_texts(vocab_size, length, count);
    texts.source = "random token ids (no data set with held-out text was given)";
  });
  return texts;
}

double ProbeResult::mean_loss() const {
  return std::accumulate(token_loss.begin(), token_loss.end(), 0.0) /
         static_cast<double>(std::max<std::size_t>(1, token_loss.size()));
}

ProbeResult probe(ModelInstance& instance, const ProbeTexts& texts) {
  ProbeResult result;
  const std::int64_t vocab = result.vocab_size = instance.options().model.vocab_size;
  const auto consume = [&](std::size_t text, std::int64_t first, ConstTensorView logits) {
    const auto& ids = texts.ids[text];
    for (std::int64_t row = 0; row < logits.rows; ++row) {
      const std::span<const float> values(logits.row<float>(row), static_cast<std::size_t>(vocab));
      result.logits.insert(result.logits.end(), values.begin(), values.end());
      result.begins_text.push_back(first + row == 0);
      const auto next = static_cast<std::size_t>(first + row + 1);
      if (next >= ids.size()) continue;
      result.token_loss.push_back(next_token_loss(values, ids[next]));
    }
  };
  const auto observe = [&](std::int64_t, const MicroBatch& batch, const Routing& routing) {
    const ConstTensorView& topk = routing.topk_idx;
    result.slots = topk.cols;
    for (std::int64_t t = 0; t < std::min(batch.num_real_tokens(), topk.rows); ++t) {
      std::vector<std::int32_t> experts(topk.row<std::int32_t>(t),
                                        topk.row<std::int32_t>(t) + topk.cols);
      std::ranges::sort(experts);
      result.topk.insert(result.topk.end(), experts.begin(), experts.end());
      // Logits of all texts before are there.
      result.token_of_choice.push_back(result.begins_text.size() + static_cast<std::size_t>(t));
    }
  };
  evaluate_logits(instance, texts.ids, consume, observe);
  return result;
}

namespace {

/// Which tokens another choice of experts was made for, in any layer.
std::vector<bool> count_moved(const ProbeResult& before, const ProbeResult& after,
                              ProbeDifference& d) {
  std::vector<bool> moved(before.begins_text.size());
  if (before.slots != after.slots || before.topk.size() != after.topk.size()) return moved;
  auto own = before.topk.begin();
  auto other = after.topk.begin();
  for (const std::size_t token : before.token_of_choice) {
    const bool same = std::equal(own, own + before.slots, other);
    if (!same) moved[token] = true;
    d.moved += same ? 0 : 1;
    own += before.slots;
    other += before.slots;
  }
  d.choices = std::ssize(before.token_of_choice);
  return moved;
}

/// Bits, largest difference and spread of all logits.
void compare_logits(const ProbeResult& before, const ProbeResult& after,
                    const std::vector<bool>& moved, ProbeDifference& d) {
  d.logits_equal = true;
  double sum = 0;
  double squares = 0;
  bool settled = true;
  const auto vocab = static_cast<std::size_t>(before.vocab_size);
  for (std::size_t i = 0; i < before.logits.size(); ++i) {
    if (i % vocab == 0) {
      const std::size_t token = i / vocab;
      settled = (settled || before.begins_text[token]) && !moved[token];
    }
    const auto x = static_cast<double>(before.logits[i]);
    double difference = std::abs(x - static_cast<double>(after.logits[i]));
    if (std::isnan(difference)) difference = std::numeric_limits<double>::infinity();
    d.logits_equal &= std::bit_cast<std::uint32_t>(before.logits[i]) ==
                      std::bit_cast<std::uint32_t>(after.logits[i]);
    d.max_logit = std::max(d.max_logit, difference);
    if (settled) d.max_settled_logit = std::max(d.max_settled_logit, difference);
    sum += x;
    squares += x * x;
  }
  const auto n = static_cast<double>(std::max<std::size_t>(1, before.logits.size()));
  d.logit_std = std::sqrt(std::max(0.0, squares / n - sum / n * (sum / n)));
}

}  // namespace

ProbeDifference compare(const ProbeResult& before, const ProbeResult& after) {
  ProbeDifference d{.tokens = std::ssize(before.token_loss),
                    .loss_before = before.mean_loss(),
                    .loss_after = after.mean_loss()};
  ARCUS_CHECK(before.logits.size() == after.logits.size(), "{} logits and {}", before.logits.size(),
              after.logits.size());
  compare_logits(before, after, count_moved(before, after, d), d);
  for (std::size_t t = 0; t < before.token_loss.size(); ++t) {
    d.mean_token_loss += std::abs(before.token_loss[t] - after.token_loss[t]);
  }
  d.mean_token_loss /= static_cast<double>(std::max<std::size_t>(1, before.token_loss.size()));
  return d;
}

InstanceOptions probe_options(const ModelConfig& model, const RoutingConfig& routing,
                              const std::vector<RoutingOverride>& overrides, std::int64_t seq_len) {
  return dropless_outside_training({.model = model,
                                    .routing = routing,
                                    .overrides = overrides,
                                    .training = false,
                                    .seq_len = seq_len});
}

}  // namespace arcus
