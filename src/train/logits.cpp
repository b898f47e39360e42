#include "src/train/logits.hpp"

#include <algorithm>
#include <cmath>

#include "src/train/batch.hpp"

namespace arcus {
namespace {

/// The first `num_tokens` tokens of a micro-batch of one padded sequence are text.
struct PaddedText {
  std::vector<std::int32_t> ids, targets;
  std::vector<std::int64_t> sequence_offsets{0, 0};

  explicit PaddedText(std::int64_t seq_len)
      : ids(static_cast<std::size_t>(seq_len)), targets(static_cast<std::size_t>(seq_len), -1) {}

  MicroBatch fill(BatchBuffers& buffers, const std::vector<std::int32_t>& text) {
    std::ranges::fill(std::ranges::copy(text, ids.begin()).out, ids.end(), 0);
    MicroBatch batch = buffers.fill(ids, targets, 0);
    batch.num_padding_tokens = std::ssize(ids) - std::ssize(text);
    sequence_offsets[1] = std::ssize(text);
    batch.sequence_offsets = sequence_offsets;
    return batch;
  }
};

}  // namespace

double next_token_loss(std::span<const float> logits, std::int32_t next) {
  const double most = *std::ranges::max_element(logits);
  double sum = 0;
  for (const float x : logits) sum += std::exp(static_cast<double>(x) - most);
  return most + std::log(sum) - static_cast<double>(logits[static_cast<std::size_t>(next)]);
}

void evaluate_logits(ModelInstance& instance, std::span<const std::vector<std::int32_t>> texts,
                     const TextLogitsConsumer& consume, const RoutingObserver& observer) {
  const std::int64_t seq_len = instance.options().seq_len;
  ARCUS_CHECK(instance.options().micro_batch_seqs == 1, "micro-batches of {} sequences, not 1",
              instance.options().micro_batch_seqs);
  const bool holds_texts = instance.world().rank() == 0;
  BatchBuffers buffers(1, seq_len);
  PaddedText padded(seq_len);
  MicroBatchStats stats = instance.transformer().make_stats();
  for (std::size_t i = 0; i < texts.size(); ++i) {
    const std::int64_t tokens = std::ssize(texts[i]);
    ARCUS_CHECK(tokens >= 1 && tokens <= seq_len, "a text of {} tokens, for 1 to {}", tokens,
                seq_len);
    const MicroBatch batch = holds_texts ? padded.fill(buffers, texts[i]) : buffers.idle();
    const ArenaScope scope(instance.saved());
    PassContext ctx = instance.pass(batch, stats);
    ctx.training = false;
    if (observer) ctx.observer = &observer;
    instance.transformer().evaluate_logits(ctx, instance.params(), instance.dispatcher(),
                                           [&](std::int64_t first_row, ConstTensorView logits) {
                                             const std::int64_t rows =
                                                 std::min(logits.rows, tokens - first_row);
                                             if (rows > 0)
                                               consume(i, first_row, logits.row_range(0, rows));
                                           });
  }
}

}  // namespace arcus
