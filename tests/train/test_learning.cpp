// A run learns: it memorises one micro-batch, follows a stored loss curve, and skips a step that is
// not finite on all ranks together.

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "src/train/run_loop.hpp"
#include "tests/support/gpt2_blocks.hpp"
#include "tests/support/training_fixture.hpp"

namespace arcus::testing {
namespace {

class Learning : public ::testing::Test {
 protected:
  TemporaryFolder folder_{"arcus_learning"};
  TokenDataset dataset_ = small_dataset(folder_.path());
  std::unique_ptr<Communicator> self_ = make_self_communicator();
};

TEST_F(Learning, MemorisesOneMicroBatch) {
  TrainerOptions options = small_training();
  options.model.hidden_size = 64;
  options.model.head_dim = 16;
  options.model.expert_ff_size = 64;
  options.train.seq_len = 32;
  options.train.global_batch_seqs = options.train.micro_batch_seqs;
  options.train.steps = 60;
  options.train.schedule = "constant";
  options.train.lr = 1e-2;
  options.train.weight_decay = 0;
  // A corpus of exactly two windows, so that every step sees the same micro-batch.
  const std::filesystem::path text = folder_.path() / "two_windows.txt";
  std::ofstream(text) << "Order is heaven's first law; and this confest, some are, and mus";
  PrepareOptions prepared{.out = folder_.path() / "two_windows", .valid_fraction = 0};
  prepared.domains = {{"text", {text.string()}, {}}};
  prepare(prepared, {});
  const TokenDataset two_windows = TokenDataset::open(prepared.out);
  ASSERT_EQ(two_windows.file(0, Split::train).num_tokens(), 2 * options.train.seq_len + 1);
  for (const bool gpt2 : {false, true}) {
    if (gpt2) use_gpt2_blocks(options.model, options.train.seq_len);
    TrainingRun run(*self_, 1, options, two_windows);
    run.trainer().initialize();
    double loss = 0;
    for (int step = 0; step < 60; ++step) {
      StepRequests requests;
      loss = run.trainer().step(run.sampler(), requests).ce;
    }
    EXPECT_LT(loss, 0.1) << (gpt2 ? "blocks of GPT-2" : "plain blocks");
  }
}

TEST_F(Learning, FollowsTheStoredCurve) {
  const TrainerOptions options = small_training();
  TrainingRun run(*self_, 1, options, dataset_);
  run.trainer().initialize();
  // Losses of steps 1, 10, 20, 30, 40 on a machine with AVX-512. Other instruction sets round
  // differently; a wrong formula moves them by far more than this tolerance.
  const std::map<std::int64_t, double> curve = {
      {1, 5.561}, {10, 4.680}, {20, 3.779}, {30, 3.641}, {40, 3.463}};
  for (std::int64_t step = 1; step <= 40; ++step) {
    StepRequests requests;
    const double loss = run.trainer().step(run.sampler(), requests).loss;
    if (const auto stored = curve.find(step); stored != curve.end()) {
      EXPECT_NEAR(loss, stored->second, 0.02) << "step " << step;
    }
  }
}

TEST_F(Learning, ANonFiniteStepIsSkippedOnAllRanksAndNamed) {
  const TrainerOptions options = small_training();
  run_on_threads(3, {}, [&](Communicator& world) {
    TrainingRun run(world, 3, options, dataset_);
    run.trainer().initialize();
    std::vector<std::string> lines;
    run.steps(2, lines);
    const std::string before = run.digest();
    // Rank 1 holds experts 3..5; a weight of expert 4 is damaged, so what it returns is not finite.
    ParamStore& params = run.instance().params();
    float* weight = nullptr;
    for (std::size_t i = 0; i < params.registry().rows().size(); ++i) {
      const ParamRow& row = params.registry().rows()[i];
      if (row.name == "model.layers.1.mlp.experts.up_proj.weight" && world.rank() == 1) {
        weight = params.values({static_cast<int>(i)}, 1).as<float>();
      }
    }
    const float saved = weight != nullptr ? *weight : 0;
    if (weight != nullptr) *weight = std::numeric_limits<float>::infinity();
    StepRequests requests;
    const StepMetrics metrics = run.trainer().step(run.sampler(), requests);
    EXPECT_FALSE(metrics.applied);
    EXPECT_FALSE(metrics.bad_tensor.empty());
    EXPECT_EQ(run.trainer().bad_steps_in_a_row(), 1);
    const auto json = nlohmann::json::parse(to_json_line(metrics));
    EXPECT_EQ(json["grad_norm"], "nan");
    EXPECT_EQ(json["skipped"], true);
    if (weight != nullptr) *weight = saved;
    // Weights and moments are as they were; the step number went on.
    EXPECT_EQ(run.trainer().steps_done(), 3);
    run.steps(1, lines);
    EXPECT_EQ(run.trainer().bad_steps_in_a_row(), 0);
    EXPECT_NE(run.digest(), before);
  });
}

TEST_F(Learning, ARunThatDivergesStopsWithEverythingSaved) {
  TrainerOptions options = small_training();
  options.train.lr = 1e30;
  options.train.warmup_steps = 0;
  options.train.grad_clip = 0;
  TrainingRun run(*self_, 1, options, dataset_);
  run.trainer().initialize();
  struct CountingSaver final : RunSaver {
    int saves = 0;
    void save() override { ++saves; }
    bool start() override { return false; }
    bool busy() override { return false; }
    bool advance() override { return true; }
    void finish() override {}
    bool restore(const std::function<bool(std::int64_t)>&) override { return false; }
    void keep(std::int64_t) override {}
  } saver;
  const RunOptions run_options{.max_bad_steps = 3, .run_dir = folder_.path()};
  const RunHooks hooks{.saver = &saver};
  EXPECT_EQ(run_training(run.trainer(), run.sampler(), dataset_, {}, run_options, hooks),
            RunEnd::diverged);
  EXPECT_EQ(saver.saves, 1);
  EXPECT_LT(run.trainer().steps_done(), 40);
}

TEST_F(Learning, MetricsReadBackToTheSameBitsAndAreCutOnResume) {
  const std::string file = (folder_.path() / "metrics.jsonl").string();
  std::vector<double> losses;
  {
    std::ofstream out(file);
    for (int step = 1; step <= 5; ++step) {
      losses.push_back(std::sqrt(2.0) / step);
      out << to_json_line(StepMetrics{.step = step, .loss = losses.back()}) << '\n';
    }
    out << R"({"step":3,"eval":{}})"
        << "\n{\"step\":\n";
    out << R"({"step":6,"lo)";  // a line that a crash cut off
  }
  const KeptMetrics kept = cut_metrics(file, 3);
  EXPECT_EQ(kept.last_eval_step, 3);
  EXPECT_EQ(kept.damaged_lines, 2);
  std::ifstream in(file);
  std::string line;
  std::size_t count = 0;
  while (std::getline(in, line)) {
    const auto json = nlohmann::json::parse(line);
    if (json.contains("eval")) continue;
    EXPECT_EQ(json["loss"].get<double>(), losses[count++]);
  }
  EXPECT_EQ(count, 3U);
}

// The last line of a file that lost its end is a line all the same; what comes after begins anew.
TEST_F(Learning, MetricsAreCutInPlaceAndTellWhereTheEndIsMissing) {
  const std::string file = (folder_.path() / "metrics.jsonl").string();
  const auto write = [&](const std::string& text) { std::ofstream(file) << text; };
  const auto read = [&] {
    std::ostringstream text;
    text << std::ifstream(file).rdbuf();
    return text.str();
  };
  write("{\"step\":1}\n{\"step\":2}");
  EXPECT_TRUE(cut_metrics(file, 2).unterminated);
  EXPECT_EQ(read(), "{\"step\":1}\n{\"step\":2}");
  EXPECT_FALSE(cut_metrics(file, 1).unterminated);
  EXPECT_EQ(read(), "{\"step\":1}\n");
  write("{\"step\":1}\n{\"step\":2}\n{\"st");
  const KeptMetrics kept = cut_metrics(file, 2);
  EXPECT_EQ(kept.damaged_lines, 1);
  EXPECT_FALSE(kept.unterminated);
  EXPECT_EQ(read(), "{\"step\":1}\n{\"step\":2}\n");
}

// Evaluation in an instance of its own plans its own memory, without the slack of a training one.
TEST_F(Learning, EvaluationAloneFitsItsMemoryPlan) {
  const auto evaluate_alone = [&](const TrainerOptions& options) {
    InstanceOptions alone = instance_options(options);
    alone.training = false;
    Stream stream(1);
    ModelInstance instance(make_process_groups(*self_, 1), stream, alone);
    instance.initialize_parameters();
    const EvalMetrics metrics = evaluate(instance, dataset_, {}, {}, 0, 0);
    EXPECT_EQ(metrics.domains.size(), 2U);
    EXPECT_NEAR(metrics.domains[0].loss, std::log(256.0), 0.5);
  };
  for (const char* dtype : compute_dtypes()) {
    for (const std::int64_t seq_len : {16, 24, 32}) {
      TrainerOptions options = small_training();
      options.train.dtype = dtype;
      options.train.seq_len = seq_len;
      evaluate_alone(options);
      options.routing.eval_capacity_factor = 1.0;
      evaluate_alone(options);
      options.routing.eval_capacity_factor = 0;
      options.model.topk = options.model.num_experts;
      evaluate_alone(options);
      options.model.first_k_dense = options.model.num_layers;
      options.model.dense_ff_size = 40;
      evaluate_alone(options);
      options = small_training();
      options.train.dtype = dtype;
      options.model.num_experts = options.model.topk = 1;
      options.model.num_shared_experts = 1;
      options.model.shared_expert_gate = true;
      options.routing.renormalize = false;
      evaluate_alone(options);
      options = small_training();
      options.train.dtype = dtype;
      options.train.seq_len = seq_len;
      use_gpt2_blocks(options.model, seq_len);
      options.model.num_shared_experts = 1;
      options.model.first_k_dense = 1;
      evaluate_alone(options);
    }
  }
}

TEST_F(Learning, EvaluationIsTheSameOnAnyLayout) {
  const TrainerOptions options = small_training();
  const auto evaluate_on = [&](int ranks, int ep) {
    std::string line;
    run_on_threads(ranks, {}, [&](Communicator& world) {
      TrainingRun run(world, ep, options, dataset_);
      run.trainer().initialize();
      const EvalMetrics metrics = evaluate(run.instance(), dataset_, {}, {}, 0, 0);
      if (world.rank() == 0) line = to_json_line(metrics);
    });
    return line;
  };
  const std::string reference = evaluate_on(1, 1);
  EXPECT_EQ(evaluate_on(2, 2), reference);
  EXPECT_EQ(evaluate_on(3, 1), reference);
  EXPECT_EQ(evaluate_on(4, 2), reference);
}

// A decision layer's share of the tokens comes to where its loss holds it, whatever it was at
// first.
TEST_F(Learning, TheShareOfAStreamComesToItsTarget) {
  for (const double target : {0.3, 0.7}) {
    TrainerOptions options = small_training();
    options.routing.stream = "threshold";
    options.routing.stream_target_share = target;
    options.routing.stream_target_loss = 0.1;
    options.train.steps = 160;
    TrainingRun run(*self_, 1, options, dataset_);
    run.trainer().initialize();
    double share = 0;
    for (int step = 0; step < 160; ++step) {
      StepRequests requests;
      const StepMetrics& metrics = run.trainer().step(run.sampler(), requests);
      if (step < 100) continue;
      for (const LayerMetrics& layer : metrics.layers) share += layer.stream_share / 120;
    }
    EXPECT_NEAR(share, target, 0.1);
  }
}

}  // namespace
}  // namespace arcus::testing
