// Laws of the decision layer, the first of two levels: who goes through the experts, and that the
// two ends, all and none, are the models without it.

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "tests/support/one_layer.hpp"
#include "tests/support/routing_reference.hpp"

namespace arcus::testing {
namespace {

RoutingCase stream_case(const std::string& stream, double capacity_factor = 0.5) {
  return {stream, [=](ModelConfig& m, RoutingConfig& r) {
            if (stream != "none") use_stream(find_stream(stream), r);
            r.stream_capacity_factor = capacity_factor;
            m.num_shared_experts = 1;
          }};
}

/// d_t = bias for every token.
void decide_alike(OneLayer& layer, float bias) {
  std::ranges::fill(layer.values_of("stream_gate.weight"), 0.0F);
  std::ranges::fill(layer.values_of("stream_gate.bias"), bias);
  std::ranges::fill(layer.values_of("stream_gate.predictor.weight"), 0.0F);
  std::ranges::fill(layer.values_of("stream_gate.predictor.bias"), bias);
}

/// What one pass shows of the decision.
struct Decision {
  std::vector<std::int32_t> tokens;
  std::vector<float> gate;
};
Decision decision_of(OneLayer& layer, bool training) {
  Decision decision;
  layer.run(training, [&](const MicroBatch& seen, const Routing& r) {
    const auto* tokens = seen.token_idx.as<std::int32_t>();
    decision.tokens.assign(tokens, tokens + seen.token_idx.size());
    const auto gate = r.stream_gate.span<float>();
    decision.gate.assign(gate.begin(), gate.end());
    EXPECT_EQ(r.topk_idx.rows, seen.token_idx.size());
  });
  return decision;
}

const auto nothing = [](const MicroBatch&, const Routing&) {};

TEST(StreamGate, GateValuesOfOneAreTheModelWithoutIt) {
  OneLayer plain(stream_case("none"), 3, 16);
  const auto expected = plain.run(false, nothing);
  for (const char* stream : {"threshold", "weighted", "capacity"}) {
    OneLayer layer(stream_case(stream), 3, 16);
    decide_alike(layer, 40);  // sigmoid(40) = 1 in f32
    EXPECT_EQ(layer.run(false, nothing), expected) << stream;
    EXPECT_EQ(layer.stats().routed[0], 48) << stream;
  }
}

TEST(StreamGate, NobodyGoesIsTheModelWithoutExperts) {
  OneLayer plain(stream_case("none"), 3, 16);
  std::ranges::fill(plain.values_of("shared_experts.down_proj.weight"), 0.0F);
  const TensorView down = plain.rows_of("mlp.experts.down_proj.weight");
  for (std::int64_t e = 0; e < down.rows; ++e) std::fill_n(down.row<float>(e), down.cols, 0.0F);
  const auto expected = plain.run(false, nothing);
  for (const char* stream : {"threshold", "capacity"}) {
    OneLayer layer(stream_case(stream), 3, 16);
    decide_alike(layer, -1);
    EXPECT_EQ(layer.run(false, nothing), expected) << stream;
    EXPECT_EQ(layer.stats().routed[0], 0) << stream;
  }
}

TEST(StreamGate, ThresholdTakesWhoIsAboveIt) {
  for (const bool training : {true, false}) {
    OneLayer layer(stream_case("threshold"), 3, 16);
    for (float& w : layer.values_of("stream_gate.weight")) w *= 50;
    const Decision decision = decision_of(layer, training);
    std::vector<std::int32_t> expected;
    for (std::int32_t t = 0; t < 48; ++t) {
      if (decision.gate[static_cast<std::size_t>(t)] > 0.5F) expected.push_back(t);
    }
    EXPECT_EQ(decision.tokens, expected);
    EXPECT_GT(expected.size(), 0U);
    EXPECT_LT(expected.size(), 48U);
  }
}

TEST(StreamGate, CapacityTakesTheLargest) {
  for (const double factor : {0.01, 0.3, 0.5, 1.0}) {
    OneLayer layer(stream_case("capacity", factor), 3, 16);
    const Decision decision = decision_of(layer, true);
    std::vector<std::int32_t> order(48);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
      return decision.gate[static_cast<std::size_t>(a)] >
             decision.gate[static_cast<std::size_t>(b)];
    });
    order.resize(static_cast<std::size_t>(std::ceil(factor * 48)));
    std::sort(order.begin(), order.end());
    EXPECT_EQ(decision.tokens, order) << factor;
  }
}

TEST(StreamGate, EqualGateValuesGoToTheFirstTokens) {
  OneLayer layer(stream_case("capacity"), 2, 8);
  decide_alike(layer, 0);
  EXPECT_EQ(decision_of(layer, true).tokens, (std::vector<std::int32_t>{0, 1, 2, 3, 4, 5, 6, 7}));
}

// g = sigmoid(<w, [x0; x1]> + b) with the first half of w alone sees x0, the embeddings.
TEST(StreamGate, SeesTheStreamBeforeAttention) {
  OneLayer layer(stream_case("weighted"), 2, 8);
  const auto weight = layer.values_of("stream_gate.weight");
  std::fill(weight.begin() + 16, weight.end(), 0.0F);
  const auto table = layer.values_of("embed_tokens.weight");
  std::vector<std::int32_t> ids;
  std::vector<float> gate;
  layer.run(false, [&](const MicroBatch& seen, const Routing& r) {
    ids.assign(seen.ids.as<std::int32_t>(), seen.ids.as<std::int32_t>() + seen.ids.size());
    gate.assign(r.stream_gate.span<float>().begin(), r.stream_gate.span<float>().end());
  });
  ASSERT_EQ(ids.size(), 16U);
  for (std::size_t t = 0; t < ids.size(); ++t) {
    double d = 0;
    for (std::size_t h = 0; h < 16; ++h) {
      d += static_cast<double>(weight[h]) *
           static_cast<double>(table[static_cast<std::size_t>(ids[t]) * 16 + h]);
    }
    // 16 products and sums in f32, |d| < 1: some 1e-6, times sigmoid' <= 1/4.
    EXPECT_NEAR(gate[t], 1 / (1 + std::exp(-d)), 1e-6) << t;
  }
}

RoutingCase with_target(const std::string& stream, double share) {
  const RoutingCase plain = stream_case(stream);
  return {stream, [=](ModelConfig& m, RoutingConfig& r) {
            plain.apply(m, r);
            r.aux_loss = 0;
            r.stream_target_loss = 3;
            r.stream_target_share = share;
          }};
}

TEST(StreamGate, TargetOfTheMeanIsASquaredDistance) {
  for (const char* stream : {"weighted", "capacity"}) {
    OneLayer layer(with_target(stream, 0.2), 3, 16);
    const Decision decision = decision_of(layer, true);
    double mean = 0;
    for (const float g : decision.gate) mean += static_cast<double>(g) / 48;
    EXPECT_NEAR(layer.stats().aux_loss[0], 3 * (mean - 0.2) * (mean - 0.2), 1e-12);
    EXPECT_NEAR(layer.stats().stream_gate[0], mean, 1e-12);
  }
}

TEST(StreamGate, TargetOfTheSharePushesAllLogits) {
  OneLayer layer(with_target("threshold", 0.2), 3, 16);
  const Decision decision = decision_of(layer, true);
  const double share = static_cast<double>(decision.tokens.size()) / 48;
  double mean = 0;
  for (const float g : decision.gate) mean -= std::log(1 / static_cast<double>(g) - 1) / 48;
  EXPECT_NE(share, 0.2);
  EXPECT_NEAR(layer.stats().aux_loss[0], 3 * (share - 0.2) * mean, 1e-6);
}

// Against slow and obvious numbers: with d the same for all, every token's experts count g times;
// so do experts whose last products are g times as large.
TEST(StreamGate, TheGateValueWeighsTheExperts) {
  const float bias = 0.4F;
  const float g = 1 / (1 + std::exp(-bias));
  OneLayer plain(stream_case("none"), 3, 16);
  for (float& w : plain.values_of("shared_experts.down_proj.weight")) w *= g;
  const TensorView down = plain.rows_of("mlp.experts.down_proj.weight");
  for (std::int64_t e = 0; e < down.rows; ++e) {
    std::for_each_n(down.row<float>(e), down.cols, [=](float& w) { w *= g; });
  }
  const auto expected = plain.run(false, nothing);
  OneLayer layer(stream_case("weighted"), 3, 16);
  decide_alike(layer, bias);
  const auto got = layer.run(false, nothing);
  // Sums of some 30 products rounded at other places, then a norm and a head of 11 logits.
  for (std::size_t t = 0; t < got.size(); ++t) EXPECT_NEAR(got[t], expected[t], 1e-5) << t;
}

// The tokens that pass by leave the others' routing as if they had been alone, and the losses too:
// sums of the second level are over T' tokens, the weights of sequences over all.
TEST(StreamGate, SequenceLossesAreMeansOfThoseWhoGo) {
  RoutingCase with = stream_case("threshold");
  const auto plain = with.apply;
  with.apply = [=](ModelConfig& m, RoutingConfig& r) {
    plain(m, r);
    r.aux_loss = 1;
    r.aux_scope = "sequence";
  };
  OneLayer layer(with, 3, 16);
  for (float& w : layer.values_of("stream_gate.weight")) w *= 50;
  double expected = 0;
  layer.run(true, [&](const MicroBatch& seen, const Routing& r) {
    for (int sequence = 0; sequence < 3; ++sequence) {
      reference::Table s;
      for (std::int64_t i = 0; i < r.s.rows; ++i) {
        if (seen.token_idx.as<std::int32_t>()[i] / 16 != sequence) continue;
        s.emplace_back(r.s.row<float>(i), r.s.row<float>(i) + r.s.cols);
      }
      if (s.empty()) continue;
      expected += reference::aux(s, reference::fractions(s, 8, 2)) / 3;
    }
  });
  EXPECT_NEAR(layer.stats().aux_loss[0], expected, 1e-6);
}

}  // namespace
}  // namespace arcus::testing
