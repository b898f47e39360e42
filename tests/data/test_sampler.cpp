#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <set>

#include "src/data/sampler.hpp"
#include "tests/data/data_testing.hpp"

namespace arcus {
namespace {

using testing::expect_failure;
using testing::plain_text;
using testing::TempDir;

constexpr std::int64_t kSeqLen = 37;

/// Domains "a", "b" and "tiny" of different sizes, many documents each but the last.
class Sampler : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    for (int i = 0; i < 12; ++i) {
      const auto seed = static_cast<std::uint64_t>(i);
      dir_.write("a/" + std::to_string(i), plain_text(seed, 300 + 90 * seed));
      dir_.write("b/" + std::to_string(i), plain_text(50 + seed, 100 + 20 * seed));
    }
    dir_.write("tiny/0", "ten bytes.");
    dir_.write("tiny/1", "too few");
    PrepareOptions options;
    options.out = dir_ / "out";
    options.tokenizer = GetParam();
    options.valid_fraction = 0.3;
    for (const char* name : {"a", "b", "tiny"}) {
      options.domains.push_back({name, {(dir_ / name).string()}, {}});
    }
    prepare(options);
    data_ = TokenDataset::open(options.out);
  }

  static DataConfig config(double a, double b) {
    DataConfig result;
    result.domains = {{"a", a}, {"b", b}};
    return result;
  }
  std::vector<std::int32_t> window_tokens(std::size_t domain, std::int64_t window) const {
    std::vector<std::int32_t> tokens(kSeqLen + 1);
    data_.file(domain, Split::train).read(window * kSeqLen, tokens);
    return tokens;
  }

  TempDir dir_;
  TokenDataset data_;
};

TEST_P(Sampler, BlocksHoldEveryDomainInProportion) {
  for (const auto& [a, b] :
       std::vector<std::pair<double, double>>{{1, 1}, {3, 1}, {1, 1e6}, {2, 0}}) {
    const BatchSampler sampler(data_, config(a, b), kSeqLen, 5);
    EXPECT_EQ(sampler.share(0) + sampler.share(1), kShareBlock);
    EXPECT_EQ(sampler.share(2), 0);
    EXPECT_NEAR(static_cast<double>(sampler.share(0)), a / (a + b) * kShareBlock, 1.0);
    EXPECT_GE(sampler.share(0), 1);
    for (const std::int64_t block : {std::int64_t{0}, std::int64_t{3}}) {
      std::map<std::size_t, std::int64_t> counts;
      for (std::int64_t i = 0; i < kShareBlock; ++i) {
        ++counts[sampler.place(block * kShareBlock + i).domain_idx];
      }
      EXPECT_EQ(counts[0], sampler.share(0));
      EXPECT_EQ(counts[1], sampler.share(1));
    }
  }
}

TEST_P(Sampler, AnEpochShowsEveryWindowOnce) {
  const BatchSampler sampler(data_, config(3, 1), kSeqLen, 6);
  std::map<std::pair<std::size_t, std::int64_t>, std::vector<std::int64_t>> seen;
  for (std::int64_t i = 0; i < 2 * kShareBlock + 100; ++i) {
    const auto place = sampler.place(i);
    seen[{place.domain_idx, place.epoch}].push_back(place.window);
  }
  std::map<std::size_t, std::int64_t> whole_epochs;
  for (auto& [key, windows] : seen) {
    const std::int64_t num_windows = sampler.num_windows(key.first);
    EXPECT_EQ(num_windows, (data_.file(key.first, Split::train).num_tokens() - 1) / kSeqLen);
    std::sort(windows.begin(), windows.end());
    EXPECT_EQ(std::adjacent_find(windows.begin(), windows.end()), windows.end());
    EXPECT_TRUE(windows.front() >= 0 && windows.back() < num_windows);
    if (static_cast<std::int64_t>(windows.size()) == num_windows) ++whole_epochs[key.first];
  }
  // Only a last epoch of each domain may be unfinished. Blocks are in keyed order, so the one that
  // has begun has holes, which may reach back into any of its epochs.
  for (const std::size_t domain : {0U, 1U}) {
    EXPECT_GE(whole_epochs[domain], 2 * sampler.share(domain) / sampler.num_windows(domain));
  }
}

/// Where epochs had one order, window = f(ordinal mod num_windows).
TEST_P(Sampler, EpochsHaveOrdersOfTheirOwn) {
  const BatchSampler sampler(data_, config(1, 0), kSeqLen, 9);
  const std::int64_t num_windows = sampler.num_windows(0);
  std::vector<std::int64_t> windows(kShareBlock);
  std::vector<bool> seen(kShareBlock);
  for (std::int64_t i = 0; i < kShareBlock; ++i) {
    const auto place = sampler.place(i);
    windows[static_cast<std::size_t>(place.ordinal)] = place.window;
    seen[static_cast<std::size_t>(place.ordinal)] = true;
    EXPECT_EQ(place.epoch, place.ordinal / num_windows);
  }
  EXPECT_EQ(std::count(seen.begin(), seen.end(), true), kShareBlock);
  std::int64_t equal = 0;
  for (std::int64_t o = 0; o + num_windows < kShareBlock; ++o) {
    equal +=
        windows[static_cast<std::size_t>(o)] == windows[static_cast<std::size_t>(o + num_windows)];
  }
  // By chance one window in num_windows: about one an epoch.
  EXPECT_LT(equal, 2 * kShareBlock / num_windows);
}

TEST_P(Sampler, BlocksAndSeedsHaveOrdersOfTheirOwn) {
  const auto order = [&](std::uint64_t seed, std::int64_t block) {
    const BatchSampler sampler(data_, config(1, 1), kSeqLen, seed);
    std::vector<std::int64_t> windows;
    for (std::int64_t i = 0; i < 64; ++i) {
      const auto place = sampler.place(block * kShareBlock + i);
      windows.push_back(place.window * 2 + static_cast<std::int64_t>(place.domain_idx));
    }
    return windows;
  };
  EXPECT_EQ(order(1, 0), order(1, 0));
  EXPECT_NE(order(1, 0), order(2, 0));
  EXPECT_NE(order(1, 0), order(1, 1));
}

TEST_P(Sampler, SamplesAreTheTokensOfTheirPlace) {
  const BatchSampler sampler(data_, config(2, 1), kSeqLen, 7);
  std::vector<std::int32_t> tokens(kSeqLen + 1);
  std::vector<std::int32_t> first_key(kSeqLen);
  // In any order, again and again: a pure function of the sample's number.
  for (const std::int64_t i : {500L, 3L, 500L, 70000L, 0L, 3L, 1L << 40}) {
    sampler.sample(i, tokens, first_key);
    const auto place = sampler.place(i);
    EXPECT_EQ(tokens, window_tokens(place.domain_idx, place.window));
    EXPECT_EQ(first_key, std::vector<std::int32_t>(kSeqLen, 0));
  }
}

TEST_P(Sampler, WithoutCrossDocumentAttentionKeysBeginWithTheDocument) {
  DataConfig apart = config(1, 1);
  apart.cross_document_attention = false;
  const BatchSampler sampler(data_, apart, kSeqLen, 8);
  std::vector<std::int32_t> tokens(kSeqLen + 1);
  std::vector<std::int32_t> first_key(kSeqLen);
  int begins = 0;
  for (std::int64_t i = 0; i < 300; ++i) {
    sampler.sample(i, tokens, first_key);
    const auto place = sampler.place(i);
    const std::int64_t begin = place.window * kSeqLen;
    const TokenFile& file = data_.file(place.domain_idx, Split::train);
    for (std::int64_t s = 0; s < kSeqLen; ++s) {
      const std::int64_t expected =
          std::max<std::int64_t>(0, file.document_begin(begin + s) - begin);
      ASSERT_EQ(first_key[static_cast<std::size_t>(s)], expected);
      begins += expected > 0 ? 1 : 0;
    }
  }
  EXPECT_GT(begins, 0);
}

TEST_P(Sampler, RefusesWhatItCannotSample) {
  const auto make = [&](const DataConfig& config, std::int64_t seq_len) {
    return [this, config, seq_len] { BatchSampler(data_, config, seq_len, 1); };
  };
  DataConfig unknown = config(1, 1);
  unknown.domains.push_back({"c", 1});
  expect_failure(ExitCode::usage, {"\"c\"", "a, b, tiny"}, make(unknown, kSeqLen));
  DataConfig tiny = config(1, 1);
  tiny.domains.push_back({"tiny", 1});
  expect_failure(ExitCode::data, {"\"tiny\"", "38"}, make(tiny, kSeqLen));
  expect_failure(ExitCode::data, {"\"tiny\""}, make({}, kSeqLen));  // all domains by default
  tiny.domains.back().weight = 0;
  make(tiny, kSeqLen)();
  DataConfig twice = config(1, 1);
  twice.domains.push_back({"a", 1});
  expect_failure(ExitCode::usage, {"twice"}, make(twice, kSeqLen));
  expect_failure(ExitCode::usage, {"weight -1"}, make(config(1, -1), kSeqLen));
  expect_failure(ExitCode::usage, {"weight nan"}, make(config(1, std::nan("")), kSeqLen));
  expect_failure(ExitCode::usage, {"add up to 0"}, make(config(0, 0), kSeqLen));
  expect_failure(ExitCode::usage, {"seq_len"}, make(config(1, 1), 0));
  expect_failure(ExitCode::data, {"\"a\"", "1000001"}, make(config(1, 1), 1000000));
}

TEST_P(Sampler, ByDefaultDomainsWeighByTokens) {
  const BatchSampler sampler(data_, {}, 4, 1);
  const auto tokens = [&](std::size_t d) {
    return static_cast<double>(data_.file(d, Split::train).num_tokens());
  };
  const double total = tokens(0) + tokens(1) + tokens(2);
  std::int64_t sum = 0;
  for (const std::size_t d : {0U, 1U, 2U}) {
    EXPECT_NEAR(static_cast<double>(sampler.share(d)), tokens(d) / total * kShareBlock, 1.0);
    sum += sampler.share(d);
  }
  EXPECT_EQ(sum, kShareBlock);
}

/// Every held-out token but the first is a target once, and their bytes add up.
TEST_P(Sampler, EvaluationCoversTheHeldOutText) {
  for (const std::int64_t seq_len : {std::int64_t{1}, kSeqLen, std::int64_t{100000}}) {
    for (const std::size_t domain : {0U, 1U, 2U}) {
      const TokenFile& file = data_.file(domain, Split::valid);
      std::vector<std::int32_t> all(static_cast<std::size_t>(file.num_tokens()));
      file.read(0, all);
      const EvalSampler sampler(data_, domain, config(1, 1), seq_len);
      const auto size = static_cast<std::size_t>(seq_len);
      std::vector<std::int32_t> tokens(size);
      std::vector<std::int32_t> targets(size);
      std::vector<std::int32_t> first_key(size);
      std::vector<std::int32_t> inputs_seen;
      std::vector<std::int32_t> targets_seen;
      std::int64_t bytes = 0;
      for (std::int64_t window = 0; window < sampler.num_windows(); ++window) {
        bytes += sampler.sample(window, tokens, targets, first_key);
        for (std::size_t s = 0; s < size; ++s) {
          if (targets[s] < 0) continue;
          inputs_seen.push_back(tokens[s]);
          targets_seen.push_back(targets[s]);
        }
      }
      EXPECT_EQ(targets_seen, std::vector<std::int32_t>(all.begin() + 1, all.end()));
      EXPECT_EQ(inputs_seen, std::vector<std::int32_t>(all.begin(), all.end() - 1));
      EXPECT_EQ(bytes + data_.tokenizer().token_bytes(all[0]), file.num_bytes());
    }
  }
}

TEST_P(Sampler, TheLastEvaluationWindowIsFilledWithEndOfDocument) {
  const EvalSampler sampler(data_, 2, config(1, 1), 64);
  ASSERT_EQ(sampler.num_windows(), 1);
  std::vector<std::int32_t> tokens(65);
  std::vector<std::int32_t> targets(64);
  std::vector<std::int32_t> first_key(64);
  sampler.sample(0, tokens, targets, first_key);
  const auto held_out = static_cast<std::size_t>(data_.file(2, Split::valid).num_tokens());
  for (std::size_t s = held_out; s < tokens.size(); ++s) {
    EXPECT_EQ(tokens[s], data_.tokenizer().eos_id());
  }
  for (std::size_t s = 0; s < targets.size(); ++s) EXPECT_EQ(targets[s] < 0, s + 1 >= held_out);
}

INSTANTIATE_TEST_SUITE_P(Kinds, Sampler, ::testing::Values("bytes", "spm:290"));

}  // namespace
}  // namespace arcus
