#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace arcus {

/// Keys of [train].
struct TrainConfig {
  std::int64_t steps = 1000;
  std::int64_t seq_len = 256;
  std::int64_t micro_batch_seqs = 2;
  std::int64_t global_batch_seqs = 8;
  double lr = 3e-4;
  double min_lr_ratio = 0.1;  ///< the schedule ends at lr * min_lr_ratio
  double beta1 = 0.9;
  double beta2 = 0.95;
  double eps = 1e-8;
  std::int64_t warmup_steps = 100;
  std::string schedule = "cosine";  ///< "cosine" | "wsd" | "constant"
  double decay_fraction = 0.2;      ///< wsd: the last part of the steps, linear to the end
  double weight_decay = 0.1;
  double grad_clip = 1.0;     ///< 0 = off
  double max_grad_norm = 0;   ///< steps with a larger gradient are skipped; 0 = none
  std::string dtype = "f32";  ///< "f32" | "bf16" (f32 master weights)
  bool recompute = false;     ///< keep layer inputs only, run layers again in backward
};

/// ParamGroupConfig::part of parameters of every part.
inline constexpr const char* kAnyPart = "any";

/// One [[train.group]]: overrides for parameters of a part whose name matches; the last match wins.
/// With adapters ([train.lora]) everything else is frozen unless a group takes it in.
struct ParamGroupConfig {
  std::string match;            ///< ECMAScript regular expression, searched in the name
  std::string part = kAnyPart;  ///< a name of kParamParts, or "any"
  double lr_scale = 1;
  double weight_decay = -1;  ///< < 0: [train] weight_decay
  bool frozen = false;
};

/// Keys of [run].
struct RunConfig {
  std::string dir;   ///< run folder: checkpoints, metrics.jsonl, run.log
  std::string data;  ///< folder made by `arcus prepare`
  std::uint64_t seed = 1;
  std::string device = "auto";  ///< "auto" | "cpu" | "cuda"
  bool reproducible = true;     ///< same bits at any layout
  double max_minutes =
      0;  ///< stop (checkpoint, exit 0) after this much wall-clock time; 0 = no limit
  std::int64_t trace_routing_every = 0;  ///< write a routing trace every n steps; 0 = never
  std::int64_t digest_every = 0;         ///< log hashes of the state every n steps; 0 = never
  std::int64_t verify_every = 0;         ///< compare ranks' arithmetic every n steps; 0 = never
  double stuck_after_s = 0;              ///< the watchdog's patience; 0 = 10 steps, at least 60 s
  std::int64_t max_bad_steps = 10;       ///< bad steps in a row before the run stops
  double spike_factor = 0;               ///< go back where the loss is so many times its average
  bool check_memory = true;              ///< refuse a run that does not fit into memory
};

/// Keys of [eval].
struct EvalConfig {
  std::int64_t every = 0;    ///< steps between evaluations; 0 = only at the end
  std::int64_t batches = 8;  ///< micro-batches per domain; 0 = all held-out text
};

/// Keys of [checkpoint].
struct CheckpointConfig {
  std::int64_t every = 500;     ///< steps; 0 = only at the end
  std::int64_t keep = 2;        ///< newest complete checkpoints kept
  std::int64_t keep_every = 0;  ///< also keep those at multiples of n steps; 0 = none
  bool background = true;       ///< written while training goes on, from a copy of the state
};

}  // namespace arcus
