// Laws of adapters in a run: at first they change nothing; merged into the weights they compute the
// same; what they are added to stays as it is, without gradients or optimizer state.

#include "src/model/lora.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "src/train/evaluation.hpp"
#include "tests/support/training_fixture.hpp"

namespace arcus::testing {
namespace {

class Lora : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = std::make_unique<TemporaryFolder>("arcus_lora");
    dataset_ = std::make_unique<TokenDataset>(small_dataset(folder_->path()));
  }
  static void TearDownTestSuite() {
    dataset_.reset();
    folder_.reset();
  }

  /// Every kind of weight that takes adapters.
  static TrainerOptions with_adapters() {
    TrainerOptions o = small_training();
    o.model.num_shared_experts = 1;
    o.model.first_k_dense = 1;
    o.model.dense_ff_size = 40;
    o.model.qkv_bias = true;
    o.lora = {.rank = 4, .alpha = 8, .match = "_proj"};
    return o;
  }
  /// Losses of a run's first step, and of held-out text before it.
  static std::vector<double> first_losses(const TrainerOptions& options) {
    TrainingRun run(*self_, 1, options, *dataset_);
    run.trainer().initialize();
    const EvalMetrics eval = evaluate(run.instance(), *dataset_, {}, {}, 4, 0);
    StepRequests requests;
    const StepMetrics metrics = run.trainer().step(run.sampler(), requests);
    return {eval.domains[0].loss, eval.domains[1].loss, metrics.ce, metrics.aux_loss,
            metrics.z_loss};
  }
  /// Bits of every tensor of the state that is f32.
  static std::map<std::string, std::vector<float>> values_of(Trainer& trainer) {
    std::map<std::string, std::vector<float>> values;
    for (const StateView& view : trainer.state()) {
      if (view.spec.dtype != DType::f32) continue;
      for (const StateSlice& slice : view.slices) {
        const auto* first = static_cast<const float*>(slice.data);
        auto& all = values[view.spec.name];
        all.insert(all.end(), first,
                   first + (slice.rows.end - slice.rows.begin) * view.spec.cols());
      }
    }
    return values;
  }

  static inline std::unique_ptr<TemporaryFolder> folder_;
  static inline std::unique_ptr<TokenDataset> dataset_;
  static inline std::unique_ptr<Communicator> self_ = make_self_communicator();
};

TEST_F(Lora, NamesLeadBackToTheWeight) {
  EXPECT_EQ(lora_a_name("m.q_proj.weight"), "m.q_proj.lora_A");
  EXPECT_EQ(lora_b_name("m.q_proj.weight"), "m.q_proj.lora_B");
  EXPECT_EQ(lora_base_name("m.q_proj.lora_A"), "m.q_proj.weight");
  EXPECT_EQ(lora_base_name("m.q_proj.lora_B"), "m.q_proj.weight");
  EXPECT_EQ(lora_base_name("m.q_proj.weight"), std::nullopt);
}

TEST_F(Lora, MergingRoundsOnce) {
  // 1 + 2^-24 (1 + 2^-26): a first rounding to f32 of the product would lose the last bit, and the
  // sum would be a tie to even.
  const std::vector<float> w = {1, 1}, a = {0x1p-12F, 0, 0, 0x1p-20F};
  const std::vector<float> b = {0x1p-12F, 0x1p-30F};
  std::vector<float> merged(2);
  merge_lora(merged, w, a, b, 1, 2, 2, 1);
  EXPECT_EQ(merged[0], 1);  // exactly a tie
  EXPECT_EQ(merged[1], 1);
  const std::vector<float> both = {0x1p-12F, 0, 0x1p-20F, 0};
  merge_lora(merged, w, both, b, 1, 2, 2, 1);
  EXPECT_EQ(merged[0], 1 + 0x1p-23F) << "just above the tie";
  merge_lora(merged, w, a, b, 1, 2, 2, -4096);
  EXPECT_EQ(merged[0], 1 - 0x1p-12F);
}

TEST_F(Lora, AtFirstAdaptersChangeNoBit) {
  for (const char* dtype : compute_dtypes()) {
    TrainerOptions options = with_adapters();
    options.train.dtype = dtype;
    const std::vector<double> adapted = first_losses(options);
    options.lora.rank = 0;
    EXPECT_EQ(adapted, first_losses(options)) << dtype;
  }
}

TEST_F(Lora, MergedWeightsComputeTheSame) {
  TrainerOptions options = with_adapters();
  TrainingRun run(*self_, 1, options, *dataset_);
  run.trainer().initialize();
  std::vector<std::string> lines;
  run.steps(20, lines);
  const EvalMetrics adapted = evaluate(run.instance(), *dataset_, {}, {}, 0, 0);
  auto values = values_of(run.trainer());

  const double scale = options.lora.scale();
  options.lora.rank = 0;
  InstanceOptions alone = instance_options(options);
  alone.training = false;
  ModelInstance merged(make_process_groups(*self_, 1), run.stream(), alone);
  double largest = 0;
  for (const StateView& view : merged.parameter_views()) {
    std::vector<float> weight = values.at(view.spec.name);
    if (view.spec.name.ends_with("_proj.weight")) {
      const auto& a = values.at(lora_a_name(view.spec.name));
      const auto& b = values.at(lora_b_name(view.spec.name));
      const std::int64_t out = view.spec.unit_rows(), in = view.spec.cols();
      const auto part = [](auto& all, std::int64_t unit, std::int64_t size) {
        return std::span(all).subspan(static_cast<std::size_t>(unit * size),
                                      static_cast<std::size_t>(size));
      };
      for (std::int64_t e = 0; e < view.spec.num_units; ++e) {
        const std::span<float> w = part(weight, e, out * in);
        merge_lora(w, w, part(a, e, 4 * in), part(b, e, out * 4), out, in, 4, scale);
      }
    }
    std::size_t next = 0;
    for (const StateSlice& slice : view.slices) {
      auto* to = static_cast<float*>(slice.data);
      const std::int64_t count = (slice.rows.end - slice.rows.begin) * view.spec.cols();
      for (std::int64_t i = 0; i < count; ++i) {
        largest = std::max(largest, std::abs(static_cast<double>(weight[next]) -
                                             static_cast<double>(values.at(view.spec.name)[next])));
        to[i] = weight[next++];
      }
    }
  }
  EXPECT_GT(largest, 1e-3) << "the adapters have learned nothing to be compared";
  const EvalMetrics plain = evaluate(merged, *dataset_, {}, {}, 0, 0);
  for (std::size_t d = 0; d < plain.domains.size(); ++d) {
    EXPECT_NEAR(plain.domains[d].loss, adapted.domains[d].loss, 1e-4);
  }
  // Without the adapters the model is another one.
  const EvalMetrics base = [&] {
    ModelInstance start(make_process_groups(*self_, 1), run.stream(), alone);
    start.initialize_parameters();
    return evaluate(start, *dataset_, {}, {}, 0, 0);
  }();
  EXPECT_GT(std::abs(base.domains[0].loss - adapted.domains[0].loss), 1e-2);
}

TEST_F(Lora, WhatAdaptersAreAddedToStaysAsItIs) {
  for (const char* dtype : compute_dtypes()) {
    TrainerOptions options = with_adapters();
    options.train.dtype = dtype;
    options.groups = {{.match = "layers.1", .part = "router", .lr_scale = 2}};
    TrainingRun run(*self_, 1, options, *dataset_);
    run.trainer().initialize();
    const auto before = values_of(run.trainer());
    std::vector<std::string> lines;
    run.steps(3, lines);
    const auto after = values_of(run.trainer());
    int adapters = 0, gates = 0;
    for (const auto& [name, values] : before) {
      if (name.starts_with("optimizer/")) {
        EXPECT_TRUE(name.find("lora_") != std::string::npos ||
                    name.find("layers.1.mlp.gate.weight") != std::string::npos)
            << name << " has moments";
        continue;
      }
      const bool adapter = lora_base_name(name).has_value();
      const bool gate = name == "model.layers.1.mlp.gate.weight";
      EXPECT_EQ(values != after.at(name), adapter || gate) << name;
      adapters += adapter ? 1 : 0;
      gates += gate ? 1 : 0;
      // Every adapter of every expert learns.
      if (name.find("experts.down_proj.lora_B") == std::string::npos) continue;
      const std::size_t size = values.size() / 8;
      for (std::size_t e = 0; e < 8; ++e) {
        EXPECT_FALSE(std::equal(values.begin() + static_cast<std::ptrdiff_t>(e * size),
                                values.begin() + static_cast<std::ptrdiff_t>((e + 1) * size),
                                after.at(name).begin() + static_cast<std::ptrdiff_t>(e * size)))
            << name << ", expert " << e;
      }
    }
    EXPECT_EQ(gates, 1);
    // Four of attention in both layers, three each of dense, experts and shared experts.
    EXPECT_EQ(adapters, 2 * (2 * 4 + 3 * 3));
  }
}

// A flat of which nothing is trained costs neither sums nor moments.
TEST_F(Lora, FrozenWeightsNeedNoMemoryBeside) {
  TrainerOptions options = with_adapters();
  options.model.expert_ff_size = 512;
  const auto bytes = [](const TrainerOptions& o) {
    TrainingRun run(*self_, 1, o, *dataset_);
    return run.instance().params().sum_bytes() + run.trainer().optimizer_bytes();
  };
  const std::int64_t adapted = bytes(options);
  options.lora.rank = 0;
  EXPECT_LT(5 * adapted, bytes(options));
  options.groups = {{.part = "experts", .frozen = true}};
  const std::int64_t without_experts = bytes(options);
  options.groups.clear();
  EXPECT_LT(2 * without_experts, bytes(options));
}

TEST_F(Lora, PartsCoverTheModelAndEachIsFrozenByItsName) {
  TrainerOptions options = with_adapters();
  options.routing.noise = 1;
  options.routing.gate_bias = true;
  options.routing.stream = "weighted";
  options.groups = {{.match = "."}};
  std::map<std::string, std::vector<std::string>> names;
  {
    TrainingRun run(*self_, 1, options, *dataset_);
    for (const ParamRow& row : run.instance().registry().rows()) {
      names[kParamParts[static_cast<std::size_t>(part_of(row))]].push_back(row.name);
    }
  }
  const auto has = [&](const char* part, const std::string& name) {
    const auto& all = names.at(part);
    return std::find(all.begin(), all.end(), name) != all.end();
  };
  const std::string layer = "model.layers.1.";
  EXPECT_TRUE(has("router", layer + "mlp.gate.weight"));
  EXPECT_TRUE(has("router", layer + "mlp.gate.bias"));
  EXPECT_TRUE(has("router", layer + "mlp.gate.noise_weight"));
  EXPECT_TRUE(has("router", layer + "stream_gate.weight"));
  EXPECT_TRUE(has("experts", layer + "mlp.experts.gate_proj.weight"));
  EXPECT_TRUE(has("dense", layer + "mlp.shared_experts.up_proj.weight"));
  EXPECT_TRUE(has("dense", "model.layers.0.mlp.gate_proj.weight"));
  EXPECT_TRUE(has("dense", layer + "self_attn.q_proj.weight"));
  EXPECT_TRUE(has("dense", layer + "self_attn.q_proj.bias"));
  EXPECT_TRUE(has("norms", layer + "input_layernorm.weight"));
  EXPECT_TRUE(has("norms", layer + "self_attn.q_norm.weight"));
  EXPECT_TRUE(has("norms", "model.norm.weight"));
  EXPECT_TRUE(has("embeddings", "model.embed_tokens.weight"));
  EXPECT_TRUE(has("embeddings", "lm_head.weight"));
  EXPECT_TRUE(has("adapters", layer + "mlp.experts.gate_proj.lora_A"));
  for (const char* part : kParamParts) {
    options.groups = {{.match = "."}, {.part = part, .frozen = true}};
    TrainingRun run(*self_, 1, options, *dataset_);
    for (const ParamRow& row : run.instance().registry().rows()) {
      const auto& frozen = names.at(part);
      EXPECT_EQ(row.trainable, std::find(frozen.begin(), frozen.end(), row.name) == frozen.end())
          << row.name << ", part " << part;
    }
  }
}

// The first update of a part moves by its share of the learning rate; other parts do not notice.
TEST_F(Lora, PartsHaveLearningRatesOfTheirOwn) {
  TrainerOptions options = small_training();
  options.train.weight_decay = 0;
  options.train.warmup_steps = 0;
  const auto first_update = [&](const std::vector<ParamGroupConfig>& groups) {
    options.groups = groups;
    TrainingRun run(*self_, 1, options, *dataset_);
    run.trainer().initialize();
    auto update = values_of(run.trainer());
    std::vector<std::string> lines;
    run.steps(1, lines);
    const auto after = values_of(run.trainer());
    for (auto& [name, values] : update) {
      for (std::size_t i = 0; i < values.size(); ++i) values[i] = after.at(name)[i] - values[i];
    }
    return update;
  };
  const auto usual = first_update({});
  const auto scaled = first_update({{.part = "experts", .lr_scale = 0.25},
                                    {.part = "router", .lr_scale = 3, .weight_decay = 0}});
  for (const auto& [name, values] : usual) {
    if (name.find('/') != std::string::npos) continue;
    const double scale = name.find(".experts.") != std::string::npos    ? 0.25
                         : name.find(".mlp.gate.") != std::string::npos ? 3
                                                                        : 1;
    double worst = 0;
    for (std::size_t i = 0; i < values.size(); ++i) {
      worst = std::max(worst, std::abs(scale * static_cast<double>(values[i]) -
                                       static_cast<double>(scaled.at(name)[i])));
    }
    // Updates are differences of weights below 1.2, rounded to 2^-24.
    EXPECT_LT(worst, 1e-6) << name;
  }
}

TEST_F(Lora, AMatchThatFindsNothingIsRefused) {
  TrainerOptions options = small_training();
  options.lora = {.rank = 4, .match = "norm"};
  EXPECT_THROW(TrainingRun(*self_, 1, options, *dataset_), Error);
  options.lora.match = "shared_experts";
  EXPECT_THROW(TrainingRun(*self_, 1, options, *dataset_), Error) << "the model has none";
  options.lora = {};
  options.groups = {{.match = "q_proj", .part = "experts", .frozen = true}};
  EXPECT_THROW(TrainingRun(*self_, 1, options, *dataset_), Error);
  options.groups = {{.match = ".", .frozen = true}};
  EXPECT_THROW(TrainingRun(*self_, 1, options, *dataset_), Error) << "nothing is left to train";
}

}  // namespace
}  // namespace arcus::testing
