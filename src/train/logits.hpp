#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "src/train/model_instance.hpp"

namespace arcus {

/// Sees the logits of one text: those of tokens first_token, first_token + 1, ... as [tokens, V]
/// fp32.
using TextLogitsConsumer =
    std::function<void(std::size_t text, std::int64_t first_token, ConstTensorView logits)>;

/// The loss of `next` after a token with these logits [V], in fp64.
double next_token_loss(std::span<const float> logits, std::int32_t next);

/// Logits of every token of every text (1 to seq_len ids each), text after text. `instance` is in
/// evaluation form with micro-batches of one sequence. Rank 0 has the texts and sees the logits;
/// the others' experts take part. `observer` sees the routing. Collective; every rank gives the
/// same texts.
void evaluate_logits(ModelInstance& instance, std::span<const std::vector<std::int32_t>> texts,
                     const TextLogitsConsumer& consume, const RoutingObserver& observer = {});

}  // namespace arcus
