#pragma once

#include <cstdint>
#include <string>

#include "launch/run_config.hpp"
#include "src/data/dataset.hpp"
#include "src/train/trainer.hpp"

namespace arcus {

/// What a run of `config` on `num_ranks` ranks will do and need, as seen by its first rank:
/// parameters, experts over ranks, rows per segment, bytes per rank by purpose, tokens per step. No
/// memory of that size is touched and no other rank is needed. `model` is resolved; `dataset` may
/// be null. Throws (usage) where the layout is impossible.
std::string describe_plan(const Config& config, const ModelConfig& model,
                          const TokenDataset* dataset, int num_ranks, int threads_per_rank);

}  // namespace arcus
