// Evaluation: padding behind the last held-out token takes no part in routing.

#include "src/train/evaluation.hpp"

#include <gtest/gtest.h>

#include "tests/support/training_fixture.hpp"

namespace arcus::testing {
namespace {

constexpr std::int64_t kTokens = 13;

/// Token losses of `kTokens` tokens of text, filled up with padding to `seq_len`; `declared` of it
/// is said to be padding. Capacity is tight, so that whoever is routed takes another's place.
std::vector<float> losses_with_padding(std::int64_t seq_len, std::int64_t declared,
                                       const char* drop_policy, bool sequence_scope) {
  auto self = make_self_communicator();
  Stream stream(1);
  InstanceOptions o = instance_options(small_training());
  o.training = false;
  o.micro_batch_seqs = 1;
  o.seq_len = seq_len;
  o.routing.eval_capacity_factor = 0.5;
  o.routing.drop_policy = drop_policy;
  if (sequence_scope) o.routing.aux_scope = "sequence";
  ModelInstance instance(make_process_groups(*self, 1), stream, o);
  instance.initialize_parameters();

  std::vector<std::int32_t> ids, targets;
  for (std::int32_t i = 0; i < seq_len; ++i) {
    ids.push_back(i < kTokens ? (i * 37 + 11) % 256 : 0);
    targets.push_back(i + 1 < kTokens ? ((i + 1) * 37 + 11) % 256 : -1);
  }
  BatchBuffers buffers(1, seq_len);
  MicroBatch batch = buffers.fill(ids, targets, 0);
  batch.num_padding_tokens = declared;
  MicroBatchStats stats = instance.transformer().make_stats();
  std::vector<float> losses(static_cast<std::size_t>(seq_len));
  PassContext ctx = instance.pass(batch, stats);
  ctx.training = false;
  const RoutingObserver observer = [&](std::int64_t, const MicroBatch&, const Routing& routing) {
    EXPECT_EQ(routing.topk_idx.rows, seq_len);
    for (std::int64_t t = seq_len - declared; t < seq_len; ++t) {
      for (std::int64_t j = 0; j < routing.topk_idx.cols; ++j) {
        EXPECT_EQ(routing.topk_idx.row<std::int32_t>(t)[j], -1);
        EXPECT_EQ(routing.weight.row<float>(t)[j], 0.0F);
      }
    }
  };
  ctx.observer = &observer;
  instance.transformer().evaluate(ctx, instance.params(), instance.dispatcher(),
                                  {losses.data(), DType::f32, 1, seq_len});
  losses.resize(kTokens - 1);
  return losses;
}

double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double largest = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    largest = std::max(largest, std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i])));
  }
  return largest;
}

TEST(Evaluation, PaddingIsNotRouted) {
  for (const char* policy : {"position", "probs"}) {
    for (const bool sequence_scope : {false, true}) {
      const auto alone = losses_with_padding(kTokens, 0, policy, sequence_scope);
      const auto padded = losses_with_padding(32, 32 - kTokens, policy, sequence_scope);
      EXPECT_LT(largest_difference(alone, padded), 1e-5) << policy;
      // The law can fail: padding that is not declared takes places and raises the capacity.
      const auto routed = losses_with_padding(32, 0, policy, sequence_scope);
      EXPECT_GT(largest_difference(alone, routed), 1e-5) << policy;
    }
  }
}

TEST(Evaluation, SamplerCountsRealTokens) {
  const TemporaryFolder folder("arcus-evaluation");
  const TokenDataset dataset = small_dataset(folder.path());
  const std::int64_t tokens = dataset.file(0, Split::valid).num_tokens();
  for (const std::int64_t seq_len : {std::int64_t{24}, tokens, tokens - 1, tokens + 5}) {
    const EvalSampler sampler(dataset, 0, {}, seq_len);
    const std::int64_t last = sampler.num_windows() - 1;
    EXPECT_EQ(sampler.num_real_tokens(last), std::min(seq_len, tokens - last * seq_len));
    BatchBuffers buffers(1, seq_len);
    std::int64_t targets = 0;
    std::int64_t bytes = 0;
    const MicroBatch batch = buffers.fill(sampler, 0, 1, last, targets, bytes);
    EXPECT_EQ(batch.num_real_tokens(), sampler.num_real_tokens(last));
  }
}

}  // namespace
}  // namespace arcus::testing
