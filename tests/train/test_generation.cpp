// Generation: the same text at any layout, logits of the KV cache equal to those of a full forward
// pass, and sampling that keeps to its options.

#include <gtest/gtest.h>

#include <cmath>

#include "src/base/rng.hpp"
#include "src/train/generation.hpp"
#include "tests/support/gpt2_blocks.hpp"
#include "tests/support/routing_cases.hpp"
#include "tests/support/training_fixture.hpp"

namespace arcus::testing {
namespace {

InstanceOptions decoding_options(std::int64_t prompts) {
  InstanceOptions o = instance_options(small_training());
  o.model.num_shared_experts = 1;
  o.routing.capacity_factor = 1.0;  // of training; generation is dropless
  o.training = false;
  o.micro_batch_seqs = prompts;
  o.seq_len = 1;
  return o;
}

std::vector<std::vector<std::int32_t>> generate_on(int ranks, int ep, const SamplingOptions& s) {
  const std::vector<std::vector<std::int32_t>> prompts = {
      {65, 66, 67}, {10}, {32, 97, 98, 99, 100}};
  std::vector<std::vector<std::int32_t>> texts;
  run_on_threads(ranks, {}, [&](Communicator& world) {
    Stream stream(1);
    ModelInstance instance(make_process_groups(world, ep), stream, decoding_options(3));
    instance.initialize_parameters();
    auto mine = generate(instance, prompts, s, {});
    if (world.rank() == 0) texts = std::move(mine);
  });
  return texts;
}

TEST(Generation, SameTextAtAnyLayout) {
  const SamplingOptions options{.max_new_tokens = 20, .temperature = 1.0, .top_p = 0.95, .seed = 5};
  const auto reference = generate_on(1, 1, options);
  ASSERT_EQ(reference.size(), 3U);
  EXPECT_EQ(reference[0].size(), 23U);
  EXPECT_EQ(reference[1].size(), 21U);
  EXPECT_EQ(generate_on(2, 2, options), reference);
  EXPECT_EQ(generate_on(3, 3, options), reference);
  EXPECT_EQ(generate_on(4, 2, options), reference);
  SamplingOptions other = options;
  other.seed = 6;
  EXPECT_NE(generate_on(1, 1, other), reference);
}

// What `generate` takes is the most likely token by a full forward pass over the text so far.
TEST(Generation, GreedyTextIsWhatAFullForwardPassFindsMostLikely) {
  auto self = make_self_communicator();
  Stream stream(1);
  const InstanceOptions decoding = decoding_options(2);
  ModelInstance decoder(make_process_groups(*self, 1), stream, decoding);
  decoder.initialize_parameters();
  const std::vector<std::vector<std::int32_t>> prompts = {{65, 66, 67, 68, 69}, {10, 200}};
  const auto texts = generate(decoder, prompts, {.max_new_tokens = 9, .temperature = 0}, {});

  for (std::size_t b = 0; b < texts.size(); ++b) {
    const auto length = static_cast<std::int64_t>(texts[b].size());
    InstanceOptions full = decoding;
    full.micro_batch_seqs = 1;
    full.seq_len = length;
    ModelInstance whole(make_process_groups(*self, 1), stream, full);
    whole.initialize_parameters();
    BatchBuffers buffers(1, length);
    MicroBatchStats stats = whole.transformer().make_stats();
    // The loss of every candidate at every position.
    std::vector<std::vector<float>> losses;
    for (std::int32_t candidate = 0; candidate < full.model.vocab_size; ++candidate) {
      const std::vector<std::int32_t> targets(texts[b].size(), candidate);
      const MicroBatch batch = buffers.fill(texts[b], targets, 0);
      PassContext ctx = whole.pass(batch, stats);
      ctx.training = false;
      whole.transformer().evaluate(
          ctx, whole.params(), whole.dispatcher(),
          {losses.emplace_back(texts[b].size()).data(), DType::f32, 1, length});
    }
    for (std::size_t t = prompts[b].size(); t < texts[b].size(); ++t) {
      const float taken = losses[static_cast<std::size_t>(texts[b][t])][t - 1];
      for (const auto& candidate : losses) {
        EXPECT_LE(taken, candidate[t - 1] + 1e-5F) << "text " << b << ", position " << t;
      }
    }
  }
}

/// Routings whose evaluation asks a predictor or decides who goes through the experts.
class Decoding : public ::testing::TestWithParam<RoutingCase> {};
INSTANTIATE_TEST_SUITE_P(Routings, Decoding, ::testing::ValuesIn(routing_cases()),
                         [](const auto& param) { return param.param.name; });

/// Gains and biases away from ones and zeros, where they would hide, as adapters would.
void spread(ModelInstance& instance) {
  for (const FlatId flat : {FlatId::dense_accumulate, FlatId::expert_accumulate,
                            FlatId::dense_adapter, FlatId::expert_adapter}) {
    const bool adapter = flat == FlatId::dense_adapter || flat == FlatId::expert_adapter;
    const TensorView values = instance.params().flat_values(flat);
    for (std::int64_t i = 0; i < values.size(); ++i) {
      const float noise = Rng(9, "spread", "").normal(static_cast<std::uint64_t>(i));
      const auto add = [&](auto& value) {
        value = static_cast<std::remove_reference_t<decltype(value)>>(
            adapter ? 0.1F * noise : static_cast<float>(value) + 0.3F * noise);
      };
      values.dtype == DType::bf16 ? add(values.as<bf16>()[i]) : add(values.as<float>()[i]);
    }
  }
}

/// Losses of 12 tokens, fed one by one, are those of a full forward pass within `tolerance`.
void expect_cache_agrees(const InstanceOptions& decoding, double tolerance) {
  auto self = make_self_communicator();
  Stream stream(1);
  ModelInstance decoder(make_process_groups(*self, 1), stream, decoding);
  decoder.initialize_parameters();
  spread(decoder);
  InstanceOptions full = decoding;
  full.seq_len = 12;
  ModelInstance whole(make_process_groups(*self, 1), stream, full);
  whole.initialize_parameters();
  spread(whole);

  std::vector<std::int32_t> ids, targets;
  for (std::int32_t i = 0; i < 12; ++i) {
    ids.push_back((i * 37 + 11) % 256);
    targets.push_back(((i + 1) * 37 + 11) % 256);
  }
  BatchBuffers buffers(1, 12);
  const MicroBatch batch = buffers.fill(ids, targets, 0);
  MicroBatchStats stats = whole.transformer().make_stats();
  std::vector<float> losses(12);
  PassContext ctx = whole.pass(batch, stats);
  ctx.training = false;
  whole.transformer().evaluate(ctx, whole.params(), whole.dispatcher(),
                               {losses.data(), DType::f32, 1, 12});

  Arena memory("cache", 1 << 20);
  auto caches = decoder.transformer().make_caches(memory, 1, 12, decoding.compute);
  MicroBatchStats decode_stats = decoder.transformer().make_stats();
  std::vector<float> logits(256);
  for (std::int32_t position = 0; position < 12; ++position) {
    *caches[0].length.as<std::int32_t>() = position + 1;
    const auto at = static_cast<std::size_t>(position);
    const MicroBatch token{.number = 0,
                           .num_seqs = 1,
                           .seq_len = 1,
                           .ids = {&ids[at], DType::i32, 1, 1},
                           .position = {&position, DType::i32, 1, 1}};
    PassContext step{.stream = stream,
                     .saved = decoder.saved(),
                     .scratch = decoder.scratch(),
                     .rows = decoder.rows(),
                     .batch = token,
                     .stats = decode_stats,
                     .training = false,
                     .balance = &decoder.balance()};
    decoder.transformer().decode(step, decoder.params(), decoder.dispatcher(), caches,
                                 {logits.data(), DType::f32, 1, 256});
    double sum = 0;
    for (const float z : logits) sum += std::exp(static_cast<double>(z));
    const double loss = std::log(sum) - logits[static_cast<std::size_t>(targets[at])];
    EXPECT_NEAR(loss, losses[at], tolerance) << "position " << position;
  }
}

TEST_P(Decoding, KvCacheAgreesWithAFullForwardPass) {
  InstanceOptions decoding = decoding_options(1);
  GetParam().apply(decoding.model, decoding.routing);
  expect_cache_agrees(decoding, 1e-5);
}

TEST(Generation, KvCacheAgreesWithAFullForwardPassThroughAdapters) {
  InstanceOptions decoding = decoding_options(1);
  decoding.model.first_k_dense = 1;
  decoding.lora = {.rank = 5, .alpha = 7, .match = "_proj"};
  expect_cache_agrees(decoding, 1e-5);
}

TEST(Generation, BlocksLikeGpt2sAgreeWithAFullForwardPass) {
  for (const char* activation : {"gelu_new", "gelu", "swiglu"}) {
    InstanceOptions decoding = decoding_options(1);
    use_gpt2_blocks(decoding.model, 12);
    decoding.model.activation = activation;
    decoding.model.first_k_dense = 1;
    expect_cache_agrees(decoding, 1e-5);
    // bf16 rounds activations at other places here and there; losses are about 5.5.
    decoding.compute = DType::bf16;
    if (cpu::bf16_is_native()) expect_cache_agrees(decoding, 2e-2);
  }
  InstanceOptions adapted = decoding_options(1);
  use_gpt2_blocks(adapted.model, 12);
  adapted.model.first_k_dense = 1;
  adapted.lora = {.rank = 5, .alpha = 7, .match = "_proj"};
  expect_cache_agrees(adapted, 1e-5);
  adapted.compute = DType::bf16;
  if (cpu::bf16_is_native()) expect_cache_agrees(adapted, 2e-2);
  InstanceOptions without = decoding_options(1);
  without.model.position = "none";
  expect_cache_agrees(without, 1e-5);
}

TEST(Generation, StopsAtTheLastLearnedPosition) {
  auto self = make_self_communicator();
  Stream stream(1);
  InstanceOptions decoding = decoding_options(1);
  use_gpt2_blocks(decoding.model, 8);
  ModelInstance decoder(make_process_groups(*self, 1), stream, decoding);
  decoder.initialize_parameters();
  const auto message = [&](std::size_t prompt, std::int64_t new_tokens) {
    try {
      const auto texts = generate(decoder, {std::vector<std::int32_t>(prompt, 65)},
                                  {.max_new_tokens = new_tokens}, {});
      EXPECT_EQ(texts[0].size(), prompt + static_cast<std::size_t>(new_tokens));
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::usage);
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_EQ(message(5, 4), "");
  EXPECT_EQ(message(8, 1), "");
  EXPECT_NE(message(5, 5).find("5 tokens after a prompt of 5 exceed the 8 positions that the model "
                               "knows (model.max_positions); ask for at most 4 (--max-tokens)"),
            std::string::npos);
  EXPECT_NE(message(9, 1).find("a prompt of 9 tokens exceeds the 8 positions"), std::string::npos);
}

TEST(Sampling, KeepsToItsOptions) {
  const std::vector<float> logits = {0.F, 2.F, 1.F, 2.F};
  EXPECT_EQ(sample_token(logits, {.temperature = 0}, 0.99), 1) << "ties go to the lower id";
  // Weights e^-2 : 1 : e^-1 : 1 in the order 1, 3, 2, 0.
  const double total = 2 + std::exp(-1.0) + std::exp(-2.0);
  const SamplingOptions plain{.temperature = 1};
  EXPECT_EQ(sample_token(logits, plain, 0), 1);
  EXPECT_EQ(sample_token(logits, plain, 1.001 / total), 3);
  EXPECT_EQ(sample_token(logits, plain, 2.001 / total), 2);
  EXPECT_EQ(sample_token(logits, plain, 0.999999), 0);
  EXPECT_EQ(sample_token(logits, {.temperature = 1, .top_k = 2}, 0.999999), 3);
  EXPECT_EQ(sample_token(logits, {.temperature = 1, .top_p = 0.5}, 0.999999), 3);
  EXPECT_EQ(sample_token(logits, {.temperature = 1, .top_p = 0.1}, 0.999999), 1);
}

}  // namespace
}  // namespace arcus::testing
