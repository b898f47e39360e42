#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace arcus {

/// One MoE layer's routing in one step.
struct LayerMetrics {
  std::vector<std::int64_t> tokens_per_expert;  ///< demand before drops, [E]
  std::int64_t dropped = 0;                     ///< assignments
  double entropy = 0;                           ///< mean over tokens of the scores' entropy
  double max_mean_load = 0;                     ///< largest / mean of tokens_per_expert
  double predictor_loss = 0;                    ///< 0 where the layer has no predictor
  double stream_gate = 0;   ///< mean gate value of a decision layer; 0 where there is none
  double stream_share = 1;  ///< share of the tokens that went through the experts
};

/// What may differ between layouts and machines.
struct StepTiming {
  double step_ms = 0;
  double tokens_per_s = 0;
  double comm_ms = 0;           ///< of the slowest rank: communication not hidden behind work
  std::int64_t comm_bytes = 0;  ///< sent by all ranks
  double rank_load = 0;         ///< largest / mean of rows processed by a rank's experts
  std::int64_t straggler = 0;   ///< the rank that waited least: the others waited for it
  double straggler_ms = 0;      ///< how much longer than it the one that waited most did
};

/// One training step. Everything but `timing` has the same bits at any layout.
struct StepMetrics {
  std::int64_t step = 0;  ///< steps done, this one included
  double loss = 0, ce = 0, aux_loss = 0, z_loss = 0;
  double grad_norm = 0;
  double lr = 0;
  std::int64_t tokens = 0;
  std::int64_t targets = 0;          ///< tokens that are learned: what `ce` is the mean over
  bool applied = true;               ///< false: a non-finite step, skipped
  std::string bad_tensor;            ///< where it was found, else empty
  std::vector<LayerMetrics> layers;  ///< dense layers have no experts listed
  StepTiming timing;
};

struct DomainEval {
  std::string domain;
  double loss = 0;  ///< mean over target tokens, nats
  double ppl = 0;
  double bits_per_byte = 0;
  std::int64_t tokens = 0, bytes = 0;
  /// One entry a layer, [E] tokens before drops; empty for a dense layer.
  std::vector<std::vector<std::int64_t>> tokens_per_expert;
  std::vector<double>
      stream_share;  ///< [L] share of the tokens that went through the layer's experts
};
/// Largest / mean of tokens per expert; 0 where there are none.
double max_mean_load(std::span<const std::int64_t> tokens_per_expert);

struct EvalMetrics {
  std::int64_t step = 0;
  std::vector<DomainEval> domains;
  /// All bytes counted, byte-weighted over domains.
  double bits_per_byte() const;
};

/// One line of metrics.jsonl, without the line break. Numbers read back to the same bits;
/// non-finite ones are the strings "nan", "inf", "-inf".
std::string to_json_line(const StepMetrics& metrics);
/// `routing`: tokens per expert and shares of the streams too.
std::string to_json_line(const EvalMetrics& metrics, bool routing = false);

struct KeptMetrics {
  std::int64_t last_eval_step = -1;  ///< of the evaluations kept
  std::int64_t damaged_lines = 0;    ///< dropped: cut off by a crash or a full disk
  bool unterminated = false;         ///< the last line lacks its end: write one before the next
};
/// Drops the lines of steps after `step` from metrics.jsonl (resuming), and those that cannot be
/// read. Needs no space on the disk; damage between sound lines stays where there is none.
KeptMetrics cut_metrics(const std::string& file, std::int64_t step);

}  // namespace arcus
