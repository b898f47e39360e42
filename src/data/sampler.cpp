#include "src/data/sampler.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "src/base/error.hpp"
#include "src/base/rng.hpp"

namespace arcus {
namespace {

/// The key of one epoch or block: derived by Philox, since it is made for every sample.
std::uint64_t subkey(std::uint64_t key, std::int64_t number) {
  const auto words = Rng(key).words(static_cast<std::uint64_t>(number), 0);
  return (std::uint64_t{words[1]} << 32) | words[0];
}

/// EOS occurs at ends of documents alone, so the tokens themselves say where documents begin.
void fill_first_key(std::span<const std::int32_t> tokens, std::int32_t eos_id, bool cross_document,
                    std::span<std::int32_t> first_key) {
  first_key[0] = 0;
  for (std::size_t s = 1; s < first_key.size(); ++s) {
    const bool begins = !cross_document && tokens[s - 1] == eos_id;
    first_key[s] = begins ? static_cast<std::int32_t>(s) : first_key[s - 1];
  }
}

std::vector<DomainConfig> configured_domains(const TokenDataset& dataset,
                                             const DataConfig& config) {
  if (!config.domains.empty()) return config.domains;
  std::vector<DomainConfig> domains;
  for (std::size_t i = 0; i < dataset.domains().size(); ++i) {
    const auto tokens = static_cast<double>(dataset.file(i, Split::train).num_tokens());
    domains.push_back({dataset.domains()[i], tokens});
  }
  return domains;
}

void check_weights(const std::vector<DomainConfig>& domains) {
  double total = 0;
  for (std::size_t i = 0; i < domains.size(); ++i) {
    const DomainConfig& domain = domains[i];
    ARCUS_REQUIRE(std::isfinite(domain.weight) && domain.weight >= 0, ExitCode::usage,
                  "[[data.domain]] \"{}\": weight {} must be a number >= 0", domain.name,
                  domain.weight);
    total += domain.weight;
    const bool twice =
        std::any_of(domains.begin() + static_cast<std::ptrdiff_t>(i) + 1, domains.end(),
                    [&](const DomainConfig& d) { return d.name == domain.name; });
    ARCUS_REQUIRE(!twice, ExitCode::usage, "[[data.domain]] \"{}\" is given twice", domain.name);
  }
  ARCUS_REQUIRE(total > 0 && std::isfinite(total), ExitCode::usage,
                "the weights of [[data.domain]] add up to {}; give at least one domain a weight "
                "above 0",
                total);
}

/// Whole samples of a block in proportion to the weights, by largest remainders, ties to the
/// earlier domain; every positive weight gets at least one.
std::vector<std::int64_t> shares_of(const std::vector<DomainConfig>& domains) {
  const double total = std::accumulate(domains.begin(), domains.end(), 0.0,
                                       [](double sum, const auto& d) { return sum + d.weight; });
  std::vector<std::int64_t> shares;
  std::vector<double> rest;
  for (const DomainConfig& domain : domains) {
    const double exact = domain.weight / total * static_cast<double>(kShareBlock);
    const auto whole = static_cast<std::int64_t>(exact);
    shares.push_back(std::max<std::int64_t>(whole, domain.weight > 0 ? 1 : 0));
    rest.push_back(exact - static_cast<double>(shares.back()));
  }
  for (std::int64_t sum = std::accumulate(shares.begin(), shares.end(), std::int64_t{0});
       sum != kShareBlock;) {
    const bool grow = sum < kShareBlock;
    // The domain furthest below its exact share gains one, the one furthest above loses one.
    std::size_t best = domains.size();
    for (std::size_t i = 0; i < domains.size(); ++i) {
      if (domains[i].weight <= 0 || (!grow && shares[i] <= 1)) continue;
      if (best == domains.size() || (grow ? rest[i] > rest[best] : rest[i] < rest[best])) best = i;
    }
    ARCUS_REQUIRE(best < domains.size(), ExitCode::usage,
                  "{} domains are too many for blocks of {} samples", domains.size(), kShareBlock);
    shares[best] += grow ? 1 : -1;
    rest[best] -= grow ? 1 : -1;
    sum += grow ? 1 : -1;
  }
  return shares;
}

}  // namespace

BatchSampler::BatchSampler(const TokenDataset& dataset, const DataConfig& config,
                           std::int64_t seq_len, std::uint64_t seed)
    : dataset_(&dataset),
      seq_len_(seq_len),
      block_key_(Rng(seed, "data", "blocks").key()),
      eos_id_(dataset.tokenizer().eos_id()),
      cross_document_attention_(config.cross_document_attention) {
  ARCUS_REQUIRE(seq_len > 0, ExitCode::usage, "train.seq_len is {}, must be at least 1", seq_len);
  const std::vector<DomainConfig> domains = configured_domains(dataset, config);
  check_weights(domains);
  const std::vector<std::int64_t> shares = shares_of(domains);
  std::int64_t begin = 0;
  for (std::size_t i = 0; i < domains.size(); ++i) {
    const std::size_t idx = dataset.domain_idx(domains[i].name);
    if (shares[i] == 0) continue;
    const std::int64_t tokens = dataset.file(idx, Split::train).num_tokens();
    ARCUS_REQUIRE(
        tokens > seq_len, ExitCode::data,
        "domain \"{}\" has {} training tokens, train.seq_len = {} needs at least {}: give "
        "it more text, a shorter seq_len, or weight 0",
        domains[i].name, tokens, seq_len, seq_len + 1);
    domains_.push_back({idx, shares[i], begin, (tokens - 1) / seq_len,
                        Rng(seed, "data.windows", domains[i].name).key()});
    begin += shares[i];
    masked_ = masked_ || dataset.file(idx, Split::train).is_masked();
  }
}

BatchSampler::Place BatchSampler::place(std::int64_t global_sample) const {
  ARCUS_CHECK(global_sample >= 0, "sample {}", global_sample);
  const std::int64_t block = global_sample / kShareBlock;
  const KeyedPermutation order(kShareBlock, subkey(block_key_, block));
  const auto turn =
      static_cast<std::int64_t>(order(static_cast<std::uint64_t>(global_sample % kShareBlock)));
  const auto above =
      std::upper_bound(domains_.begin(), domains_.end(), turn,
                       [](std::int64_t t, const Domain& d) { return t < d.share_begin; });
  const Domain& domain = *(above - 1);
  const std::int64_t ordinal = block * domain.share + turn - domain.share_begin;
  const std::int64_t epoch = ordinal / domain.num_windows;
  const KeyedPermutation windows(static_cast<std::uint64_t>(domain.num_windows),
                                 subkey(domain.key, epoch));
  const std::uint64_t window = windows(static_cast<std::uint64_t>(ordinal % domain.num_windows));
  return {domain.idx, ordinal, epoch, static_cast<std::int64_t>(window)};
}

void BatchSampler::sample(std::int64_t global_sample, std::span<std::int32_t> tokens,
                          std::span<std::int32_t> first_key,
                          std::span<std::int32_t> targets) const {
  ARCUS_CHECK(std::ssize(tokens) == seq_len_ + 1 && std::ssize(first_key) == seq_len_ &&
                  (targets.empty() || std::ssize(targets) == seq_len_),
              "room for {} tokens, {} first keys and {} targets, seq_len is {}", tokens.size(),
              first_key.size(), targets.size(), seq_len_);
  const Place from = place(global_sample);
  const TokenFile& file = dataset_->file(from.domain_idx, Split::train);
  file.read(from.window * seq_len_, tokens);
  fill_first_key(tokens, eos_id_, cross_document_attention_, first_key);
  if (targets.empty()) return;
  std::copy(tokens.begin() + 1, tokens.end(), targets.begin());
  file.mask(from.window * seq_len_ + 1, targets);
}

std::int64_t BatchSampler::num_targets(std::int64_t first_sample, std::int64_t count) const {
  if (!masked_) return count * seq_len_;
  std::int64_t targets = 0;
  for (std::int64_t i = first_sample; i < first_sample + count; ++i) {
    const Place from = place(i);
    const std::int64_t begin = from.window * seq_len_ + 1;
    targets += dataset_->file(from.domain_idx, Split::train).num_targets(begin, begin + seq_len_);
  }
  return targets;
}

const BatchSampler::Domain* BatchSampler::find(std::size_t domain_idx) const {
  const auto found = std::find_if(domains_.begin(), domains_.end(),
                                  [&](const Domain& d) { return d.idx == domain_idx; });
  return found == domains_.end() ? nullptr : &*found;
}

std::int64_t BatchSampler::share(std::size_t domain_idx) const {
  const Domain* domain = find(domain_idx);
  return domain == nullptr ? 0 : domain->share;
}

std::int64_t BatchSampler::num_windows(std::size_t domain_idx) const {
  const Domain* domain = find(domain_idx);
  return domain == nullptr ? 0 : domain->num_windows;
}

EvalSampler::EvalSampler(const TokenDataset& dataset, std::size_t domain_idx,
                         const DataConfig& config, std::int64_t seq_len)
    : file_(&dataset.file(domain_idx, Split::valid)),
      dataset_(&dataset),
      seq_len_(seq_len),
      eos_id_(dataset.tokenizer().eos_id()),
      cross_document_attention_(config.cross_document_attention) {
  ARCUS_REQUIRE(seq_len > 0, ExitCode::usage, "train.seq_len is {}, must be at least 1", seq_len);
}

std::int64_t EvalSampler::num_windows() const {
  const std::int64_t targets = std::max<std::int64_t>(0, file_->num_tokens() - 1);
  return (targets + seq_len_ - 1) / seq_len_;
}

std::int64_t EvalSampler::num_real_tokens(std::int64_t window) const {
  return std::min(seq_len_, file_->num_tokens() - window * seq_len_);
}

std::int64_t EvalSampler::sample(std::int64_t window, std::span<std::int32_t> tokens,
                                 std::span<std::int32_t> targets,
                                 std::span<std::int32_t> first_key) const {
  const auto seq_len = static_cast<std::size_t>(seq_len_);
  ARCUS_CHECK(window >= 0 && window < num_windows(), "window {} of {}", window, num_windows());
  ARCUS_CHECK((tokens.size() == seq_len || tokens.size() == seq_len + 1) &&
                  targets.size() == seq_len && first_key.size() == seq_len,
              "room for {} tokens, {} targets and {} first keys, seq_len is {}", tokens.size(),
              targets.size(), first_key.size(), seq_len_);
  const std::int64_t begin = window * seq_len_;
  const std::int64_t left = file_->num_tokens() - begin;
  const auto num_tokens =
      std::min(tokens.size(), static_cast<std::size_t>(std::max<std::int64_t>(left, 0)));
  file_->read(begin, tokens.first(num_tokens));
  std::fill(tokens.begin() + static_cast<std::ptrdiff_t>(num_tokens), tokens.end(), eos_id_);
  const auto num_targets = static_cast<std::size_t>(std::min(seq_len_, left - 1));
  file_->read(begin + 1, targets.first(num_targets));
  file_->mask(begin + 1, targets.first(num_targets));
  std::fill(targets.begin() + static_cast<std::ptrdiff_t>(num_targets), targets.end(), -1);
  fill_first_key(tokens, eos_id_, cross_document_attention_, first_key);
  std::int64_t bytes = 0;
  for (const std::int32_t id : targets.first(num_targets)) {
    if (id >= 0) bytes += dataset_->token_bytes()[static_cast<std::size_t>(id)];
  }
  return bytes;
}

}  // namespace arcus
