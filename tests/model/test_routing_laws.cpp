// Laws of routing, for every row of the tables: weights, capacity, order of choices and drops,
// ties, small micro-batches, evaluation without traces, and experts under another numbering.

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <set>

#include "tests/support/one_layer.hpp"

namespace arcus::testing {
namespace {

class RoutingLaws : public ::testing::TestWithParam<RoutingCase> {};
INSTANTIATE_TEST_SUITE_P(Tables, RoutingLaws, ::testing::ValuesIn(routing_cases()),
                         [](const auto& param) { return param.param.name; });

void expect_sound(const OneLayer& layer, bool training, const Routing& r) {
  const ModelConfig& model = layer.small().model;
  const RoutingConfig& config = layer.small().routing;
  const std::int64_t tokens = r.topk_idx.rows;
  const std::int64_t slots = r.topk_idx.cols;
  ASSERT_EQ(slots, num_slots(model, config));
  const std::int64_t capacity =
      expert_capacity(training ? config.capacity_factor : config.eval_capacity_factor,
                      config.min_capacity, model.topk, tokens, model.num_experts);
  EXPECT_EQ(r.capacity, capacity);
  EXPECT_LE(capacity, tokens);
  std::vector<std::int64_t> kept(static_cast<std::size_t>(model.num_experts));
  for (std::int64_t t = 0; t < tokens; ++t) {
    const auto* idx = r.topk_idx.row<std::int32_t>(t);
    const auto* slot = r.expert_of_slot.row<std::int32_t>(t);
    const auto* w = r.weight.row<float>(t);
    const auto chosen = std::count_if(idx, idx + slots, [](std::int32_t e) { return e >= 0; });
    const std::set<std::int32_t> distinct(idx, idx + chosen);
    EXPECT_EQ(static_cast<std::int64_t>(distinct.size()), chosen) << "token " << t;
    EXPECT_TRUE(chosen == slots || layer.select().predicts);
    double sum = 0;
    bool all = true;
    for (std::int64_t j = 0; j < slots; ++j) {
      EXPECT_TRUE(slot[j] == idx[j] || slot[j] == -1);
      all = all && slot[j] >= 0;
      sum += static_cast<double>(w[j]);
      if (slot[j] < 0) {
        EXPECT_EQ(w[j], 0) << "a dropped choice has weight 0";
      } else {
        EXPECT_GT(w[j], 0);
        ++kept[static_cast<std::size_t>(slot[j])];
      }
      if (j > 0 && j < chosen && layer.select().ascending) {
        EXPECT_LT(idx[j - 1], idx[j]);
      }
    }
    const bool any = std::any_of(slot, slot + slots, [](std::int32_t e) { return e >= 0; });
    if (config.renormalize && any && (all || config.renormalize_after_drop)) {
      const double ulp = config.routed_scaling_factor * std::ldexp(1.0, -23);
      EXPECT_NEAR(sum, config.routed_scaling_factor, static_cast<double>(slots + 2) * ulp);
    }
  }
  for (const std::int64_t count : kept) {
    if (capacity > 0) {
      EXPECT_LE(count, capacity);
    }
    if (training && layer.select().predicts) {
      EXPECT_EQ(count, capacity) << "an expert takes all it may";
    }
  }
}

TEST_P(RoutingLaws, WeightsCapacityAndOrderInMicroBatchesOfAnySize) {
  for (const auto& [seqs, seq_len] :
       {std::pair{1, 1}, std::pair{1, 2}, std::pair{3, 5}, std::pair{4, 32}}) {
    OneLayer layer(GetParam(), seqs, seq_len);
    for (const bool training : {true, false}) {
      int seen = 0;
      layer.run(training, [&](const MicroBatch&, const Routing& r) {
        ++seen;
        expect_sound(layer, training, r);
      });
      EXPECT_EQ(seen, 1);
    }
  }
}

TEST_P(RoutingLaws, DemandCountsWhatWasAskedForAndDropsWhatWasRefused) {
  OneLayer layer(GetParam(), 4, 16);
  std::int64_t kept = 0;
  layer.run(true, [&](const MicroBatch&, const Routing& r) {
    const auto slots = r.expert_of_slot.span<std::int32_t>();
    kept = std::count_if(slots.begin(), slots.end(), [](std::int32_t e) { return e >= 0; });
  });
  const auto& demand = layer.stats().demand;
  const auto asked = std::accumulate(demand.begin(), demand.end(), std::int64_t{0});
  EXPECT_EQ(asked - layer.stats().dropped[0], kept);
  EXPECT_EQ(layer.stats().dropped[0] > 0,
            layer.small().routing.capacity_factor > 0 && !layer.select().predicts);
  const auto& counts = layer.stats().score_counts;
  EXPECT_EQ(std::accumulate(counts.begin(), counts.end(), std::int64_t{0}),
            layer.stats().routed[0] * layer.small().model.topk);
  EXPECT_GT(layer.stats().routed[0], 0);
  const StreamRow& stream = find_stream(layer.small().routing.stream);
  EXPECT_EQ(layer.stats().routed[0] < 64, !stream.passes_all);
}

TEST_P(RoutingLaws, EqualLogitsGoToTheLowestExperts) {
  OneLayer layer(GetParam(), 2, 8);
  if (layer.small().routing.select == "hash" || layer.small().routing.score == "cosine" ||
      layer.select().predicts) {
    return;
  }
  layer.clear_gate();
  layer.run(false, [&](const MicroBatch&, const Routing& r) {
    for (std::int64_t t = 0; t < r.topk_idx.rows; ++t) {
      for (std::int64_t j = 0; j < r.topk_idx.cols; ++j) {
        EXPECT_EQ(r.topk_idx.row<std::int32_t>(t)[j], j);
      }
    }
  });
}

TEST_P(RoutingLaws, EvaluationChangesNoStateAndHearsNoNoise) {
  OneLayer layer(GetParam(), 2, 8);
  const auto bits = [&] {
    std::vector<std::uint8_t> bytes;
    for (const StateView& view : layer.instance().balance().state()) {
      const auto* data = static_cast<const std::uint8_t*>(view.slices[0].data);
      bytes.insert(bytes.end(), data, data + view.spec.num_elements() * size_of(view.spec.dtype));
    }
    return bytes;
  };
  const auto before = bits();
  const auto nothing = [](const MicroBatch&, const Routing&) {};
  const auto once = layer.run(false, nothing);
  EXPECT_EQ(bits(), before);
  layer.run(true, nothing);
  EXPECT_EQ(bits(), before) << "state changes by applied steps alone";
  EXPECT_EQ(layer.run(false, nothing), once);
}

// Spare rows are computed on and never seen: the routing is the same, the gradients but for the
// order of sums over rows (each a sum of at most 64 products, all of them below 1).
TEST_P(RoutingLaws, FillingUpToCapacityChangesNoRouting) {
  RoutingCase plain = GetParam();
  ModelConfig model;
  RoutingConfig routing;
  plain.apply(model, routing);
  if (!routing.pad_to_capacity) return;
  OneLayer padded(plain, 4, 16);
  plain.apply = [](ModelConfig& m, RoutingConfig& r) {
    GetParam().apply(m, r);
    r.pad_to_capacity = false;
  };
  OneLayer other(plain, 4, 16);
  std::int64_t capacity = 0;
  const auto collect = [&](std::vector<float>& values) {
    return [&](const MicroBatch&, const Routing& r) {
      capacity = r.capacity;
      const auto w = r.weight.span<float>();
      const auto idx = r.expert_of_slot.span<std::int32_t>();
      values.assign(w.begin(), w.end());
      values.insert(values.end(), idx.begin(), idx.end());
    };
  };
  std::vector<float> with, without;
  padded.run(true, collect(with));
  other.run(true, collect(without));
  EXPECT_EQ(with, without);
  EXPECT_EQ(padded.stats().recv_rows[0], 8 * capacity);
  EXPECT_LE(other.stats().recv_rows[0], 8 * capacity);
  EXPECT_EQ(padded.stats().token_loss_sum, other.stats().token_loss_sum);
  for (const FlatId flat : kFlatIds) {
    const auto a = padded.instance().params().flat_sums(flat).span<std::int64_t>();
    const auto b = other.instance().params().flat_sums(flat).span<std::int64_t>();
    for (std::size_t i = 0; i < a.size(); ++i) {
      EXPECT_NEAR(std::ldexp(a[i], -50), std::ldexp(b[i], -50), 64 * std::ldexp(1.0, -24));
    }
  }
}

// Experts under another numbering, whole groups moved and turned inside: the same tokens go to the
// same experts, and the model's output is the same but for the order of its sums.
TEST_P(RoutingLaws, RenumberedExpertsAreTheSameExperts) {
  OneLayer plain(GetParam(), 2, 16);
  if (plain.small().routing.select == "hash") return;
  OneLayer renumbered(GetParam(), 2, 16);
  const std::vector<std::int64_t> to{5, 4, 7, 6, 1, 0, 3, 2};  // pairs stay together
  for (const char* name :
       {"mlp.gate.weight", "mlp.gate.bias", "mlp.gate.predictor.weight", "mlp.gate.predictor.bias",
        "experts.gate_proj.weight", "experts.up_proj.weight", "experts.down_proj.weight"}) {
    const TensorView from = plain.rows_of(name);
    const TensorView rows = renumbered.rows_of(name);
    for (std::int64_t e = 0; e < from.rows; ++e) {
      std::copy_n(from.row<float>(e), from.cols, rows.row<float>(to[static_cast<std::size_t>(e)]));
    }
  }
  std::vector<std::int32_t> expected;
  std::vector<std::int32_t> got;
  const auto collect = [](std::vector<std::int32_t>& idx) {
    return [&idx](const MicroBatch&, const Routing& r) {
      const auto all = r.topk_idx.span<std::int32_t>();
      idx.assign(all.begin(), all.end());
    };
  };
  const auto before = plain.run(false, collect(expected));
  const auto after = renumbered.run(false, collect(got));
  const auto slots = num_slots(plain.small().model, plain.small().routing);
  for (auto at = expected.begin(); at != expected.end(); at += slots) {
    const auto end = std::find(at, at + slots, -1);
    for (auto e = at; e != end; ++e)
      *e = static_cast<std::int32_t>(to[static_cast<std::size_t>(*e)]);
    if (plain.select().ascending) std::sort(at, end);
  }
  EXPECT_EQ(got, expected);
  // Sums of K rows in another order, then a norm, a head of 11 logits: some ulps of losses ~ 2.4.
  for (std::size_t t = 0; t < before.size(); ++t) EXPECT_NEAR(after[t], before[t], 2e-5) << t;
}

}  // namespace
}  // namespace arcus::testing
