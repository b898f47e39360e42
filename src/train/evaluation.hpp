#pragma once

#include <functional>

#include "src/data/config.hpp"
#include "src/data/dataset.hpp"
#include "src/train/metrics.hpp"
#include "src/train/model_instance.hpp"

namespace arcus {

/// Held-out loss of the named domains (empty: all), in micro-batches cut like training ones, the
/// last one short. `max_micro_batches` per domain; 0 = all held-out text. Collective; the same bits
/// on every rank and at any layout. A domain without held-out text is left out, with a warning.
EvalMetrics evaluate(
    ModelInstance& instance, const TokenDataset& dataset, const DataConfig& data,
    const std::vector<std::string>& domains, std::int64_t max_micro_batches, std::int64_t step,
    const std::function<void(std::int64_t layer, const char* what)>& heartbeat = {});

}  // namespace arcus
