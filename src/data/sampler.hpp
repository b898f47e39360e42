#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "src/data/config.hpp"
#include "src/data/dataset.hpp"

namespace arcus {

/// Samples in a block, inside which every domain has exactly its share.
inline constexpr std::int64_t kShareBlock = std::int64_t{1} << 16;

/// Which tokens global sample number i of a run holds: a pure function of (seed, i), whatever the
/// number of ranks. Domains take turns by weight (blocks of kShareBlock samples hold each domain in
/// proportion, in keyed order); inside a domain epochs are keyed permutations of its windows of
/// seq_len tokens, without memory.
class BatchSampler {
 public:
  /// Throws (data) when a domain has fewer than seq_len + 1 tokens, (usage) for unknown domains and
  /// impossible weights. A domain of weight 0 is left out; any other has at least one sample in a
  /// block.
  BatchSampler(const TokenDataset& dataset, const DataConfig& config, std::int64_t seq_len,
               std::uint64_t seed);

  /// tokens: [seq_len + 1]: inputs are the first seq_len, targets the last seq_len. first_key:
  /// [seq_len]: position in the window of the first token that position s may attend to (0 with
  /// cross-document attention, else its document's first in the window). `targets`, [seq_len] or
  /// empty: the token after each position, -1 where it must not be learned (prompts). Allocates
  /// nothing.
  void sample(std::int64_t global_sample, std::span<std::int32_t> tokens,
              std::span<std::int32_t> first_key, std::span<std::int32_t> targets = {}) const;
  /// Targets of `count` samples from `first_sample` on.
  std::int64_t num_targets(std::int64_t first_sample, std::int64_t count) const;

  /// Where a sample comes from.
  struct Place {
    std::size_t domain_idx;  ///< in the data set
    std::int64_t ordinal;    ///< number of the sample among its domain's
    std::int64_t epoch;      ///< ordinal / num_windows
    std::int64_t window;     ///< tokens [window * seq_len, (window + 1) * seq_len + 1)
  };
  Place place(std::int64_t global_sample) const;
  /// Samples of a domain (index in the data set) in every block of kShareBlock.
  std::int64_t share(std::size_t domain_idx) const;
  /// Windows of a domain: an epoch shows each once.
  std::int64_t num_windows(std::size_t domain_idx) const;

 private:
  struct Domain {
    std::size_t idx;
    std::int64_t share;        ///< samples per block of kShareBlock
    std::int64_t share_begin;  ///< exclusive prefix sum of shares
    std::int64_t num_windows;
    std::uint64_t key;
  };
  const Domain* find(std::size_t domain_idx) const;

  const TokenDataset* dataset_;
  std::int64_t seq_len_;
  std::uint64_t block_key_;
  std::int32_t eos_id_;
  bool cross_document_attention_;
  bool masked_ = false;  ///< some domain's targets are not all its tokens
  std::vector<Domain> domains_;
};

/// Held-out text of one domain cut into windows of seq_len tokens, in order.
class EvalSampler {
 public:
  EvalSampler(const TokenDataset& dataset, std::size_t domain_idx, const DataConfig& config,
              std::int64_t seq_len);
  /// 0 when fewer than two tokens are held out.
  std::int64_t num_windows() const;
  /// Tokens of a window that are text: seq_len, fewer in the last one.
  std::int64_t num_real_tokens(std::int64_t window) const;
  /// tokens: [seq_len] (or [seq_len + 1], whose last one is the token after the window); the last
  /// window is filled with EOS. targets: [seq_len]: the token after position s, -1 where there is
  /// none, and where it must not be learned. Every other held-out token but the first is a target
  /// once. first_key as in BatchSampler.
  /// Returns the number of UTF-8 bytes that the window's targets stand for (bits per byte).
  std::int64_t sample(std::int64_t window, std::span<std::int32_t> tokens,
                      std::span<std::int32_t> targets, std::span<std::int32_t> first_key) const;

 private:
  const TokenFile* file_;
  const TokenDataset* dataset_;
  std::int64_t seq_len_;
  std::int32_t eos_id_;
  bool cross_document_attention_;
};

}  // namespace arcus
