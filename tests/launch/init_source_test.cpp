// Law: a run that starts from a checkpoint has its weights and expert biases, bit for bit, on any
// layout, and nothing else of it; what fits on neither side is refused by name.

#include "launch/init_source.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <map>

#include "src/model/lora.hpp"
#include "tests/support/training_fixture.hpp"

namespace arcus {
namespace {

using testing::compute_dtypes;
using testing::small_dataset;
using testing::small_training;
using testing::TrainingRun;

using Values = std::map<std::string, std::string>;

class Init : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = std::make_unique<testing::TemporaryFolder>("arcus_init");
    dataset_ = std::make_unique<TokenDataset>(small_dataset(folder_->path()));
    // Three steps, so that biases are not 0.
    TrainingRun run(*self_, 1, options(), *dataset_);
    run.trainer().initialize();
    std::vector<std::string> lines;
    run.steps(3, lines);
    save_checkpoint(*self_, run.stream(), folder_->path(), {.step = 3}, run.trainer().state());
    base_ = bytes_of(run.trainer().state());
  }
  static void TearDownTestSuite() {
    dataset_.reset();
    folder_.reset();
  }

  static TrainerOptions options() {
    TrainerOptions o = small_training();
    o.routing.score = "sigmoid";
    o.routing.expert_bias_rate = 0.01;
    o.routing.aux_loss_global = 0.01;
    return o;
  }
  /// The bytes of every tensor, of a rank that holds all of it.
  static Values bytes_of(const std::vector<StateView>& state) {
    Values values;
    for (const StateView& view : state) {
      for (const StateSlice& slice : view.slices) {
        values[view.spec.name] += std::string(
            static_cast<const char*>(slice.data),
            static_cast<std::size_t>((slice.rows.end - slice.rows.begin) * view.spec.cols()) *
                size_of(view.spec.dtype));
      }
    }
    return values;
  }
  static InitSource::Choice choose(const TrainerOptions& o, const std::vector<std::string>& fresh) {
    TrainingRun run(*self_, 1, o, *dataset_);
    return InitSource({folder_->path().string(), fresh}).choose(run.trainer().state());
  }
  /// What a run on these ranks holds at its start, through a checkpoint of its own.
  static Values start(int ranks, int ep, const TrainerOptions& o,
                      const std::vector<std::string>& fresh) {
    const testing::TemporaryFolder own("arcus_init_own");
    run_on_threads(ranks, {}, [&](Communicator& world) {
      TrainingRun run(world, ep, o, *dataset_);
      run.trainer().initialize();
      const InitSource source({folder_->path().string(), fresh});
      const InitSource::Choice choice = source.choose(run.trainer().state());
      load_checkpoint(world, run.stream(), source.checkpoint().path, choice.read, Match::subset);
      run.trainer().finish_reading();
      save_checkpoint(world, run.stream(), own.path(), {.step = 0}, run.trainer().state());
    });
    TrainingRun whole(*self_, 1, o, *dataset_);
    const auto state = whole.trainer().state();
    load_checkpoint(*self_, whole.stream(), checkpoint_path(own.path(), 0), state);
    return bytes_of(state);
  }
  static std::string refusal(const TrainerOptions& o, const std::vector<std::string>& fresh = {}) {
    try {
      choose(o, fresh);
    } catch (const Error& error) {
      return error.what();
    }
    ADD_FAILURE() << "not refused";
    return {};
  }
  static bool is_zero(const std::string& bytes) {
    return bytes.find_first_not_of('\0') == std::string::npos;
  }

  static inline std::unique_ptr<testing::TemporaryFolder> folder_;
  static inline std::unique_ptr<TokenDataset> dataset_;
  static inline std::unique_ptr<Communicator> self_ = make_self_communicator();
  static inline Values base_;
};

TEST_F(Init, WeightsAndBiasesAndNothingElseOnAnyLayout) {
  for (const char* dtype : compute_dtypes()) {
    TrainerOptions o = options();
    o.train.dtype = dtype;
    for (const auto& [ranks, ep] : {std::pair{1, 1}, {2, 1}, {3, 3}, {4, 2}}) {
      int weights = 0, biases = 0;
      for (const auto& [name, bytes] : start(ranks, ep, o, {})) {
        if (name.find('/') != std::string::npos) {
          EXPECT_TRUE(is_zero(bytes)) << name;
          continue;
        }
        EXPECT_EQ(bytes, base_.at(name)) << name << ", " << ranks << " ranks, " << dtype;
        ++weights;
        if (!name.ends_with("e_score_correction_bias")) continue;
        ++biases;
        EXPECT_FALSE(is_zero(bytes)) << "the base run has no bias to be taken";
      }
      EXPECT_EQ(biases, 2);
      EXPECT_GT(weights, 20);
    }
  }
}

TEST_F(Init, FreshTensorsKeepTheSeedsValues) {
  TrainerOptions o = options();
  o.seed = 5;
  TrainingRun run(*self_, 1, o, *dataset_);
  run.trainer().initialize();
  const Values initial = bytes_of(run.trainer().state());
  int fresh = 0;
  for (const auto& [name, bytes] : start(3, 3, o, {"mlp\\.gate\\.", "layers.1.*up_proj"})) {
    if (name.find('/') != std::string::npos) continue;
    const bool kept = name.find("mlp.gate.") != std::string::npos ||
                      name == "model.layers.1.mlp.experts.up_proj.weight";
    EXPECT_EQ(bytes, (kept ? initial : base_).at(name)) << name;
    fresh += kept ? 1 : 0;
  }
  EXPECT_EQ(fresh, 2 * 2 + 1);
}

TEST_F(Init, AdaptersAreAddedToTheWeightsOfTheCheckpoint) {
  TrainerOptions o = options();
  o.lora = {.rank = 4, .match = "_proj"};
  const InitSource::Choice choice = choose(o, {});
  EXPECT_EQ(choice.added.size(), 2U * 2 * (4 + 3));
  TrainingRun run(*self_, 1, o, *dataset_);
  run.trainer().initialize();
  const Values initial = bytes_of(run.trainer().state());
  for (const auto& [name, bytes] : start(2, 2, o, {})) {
    if (name.find('/') != std::string::npos) continue;
    EXPECT_EQ(bytes, (lora_base_name(name) ? initial : base_).at(name)) << name;
  }
}

TEST_F(Init, WhatFitsOnNeitherSideIsRefusedByName) {
  const auto contains = [](const std::string& text, const char* part) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  TrainerOptions o = options();
  o.model.num_shared_experts = 1;
  contains(refusal(o), "it lacks model.layers.0.mlp.shared_experts.gate_proj.weight");
  EXPECT_EQ(choose(o, {"shared_experts"}).fresh.size(), 6U);
  o = options();
  o.model.tie_embeddings = true;
  contains(refusal(o), "holds lm_head.weight, for which the model has no use");
  EXPECT_EQ(choose(o, {"lm_head"}).left_out, std::vector<std::string>{"lm_head.weight"});
  o = options();
  o.model.expert_ff_size = 16;
  contains(refusal(o), "experts.gate_proj.weight ([8, 24, 32] there, [8, 16, 32] here)");
  contains(refusal(options(), {"mlp.gates"}), "--fresh mlp.gates is found in no tensor's name");
  contains(refusal(options(), {"["}), "no regular expression");
  o = options();
  o.routing.expert_bias_rate = 0;
  EXPECT_TRUE(choose(o, {}).bias_left_out);
  EXPECT_FALSE(choose(options(), {}).bias_left_out);
}

}  // namespace
}  // namespace arcus
