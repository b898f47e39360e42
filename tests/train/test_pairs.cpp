// Laws of runs on pairs beside text: a step's loss is the mean over the tokens of answers, whose
// number every rank knows from the data; bits are those of one rank; a step of prompts is refused.

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "src/train/cross_check.hpp"
#include "src/train/evaluation.hpp"
#include "tests/support/training_fixture.hpp"

namespace arcus::testing {
namespace {

using nlohmann::json;

class PairRuns : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = std::make_unique<TemporaryFolder>("arcus_pairs");
    std::ofstream pairs(folder_->path() / "pairs.jsonl");
    for (int i = 0; i < 400; ++i) {
      pairs << json{{"prompt", fmt::format("{} + {}", i % 37, i % 11)},
                    {"answer", fmt::format("{}", i % 37 + i % 11)}}
            << "\n";
    }
    pairs.close();
    PrepareOptions options{.out = folder_->path() / "data", .valid_fraction = 0.2};
    options.domains = {{"license", {ARCUS_SOURCE_DIR "/LICENSE"}, {}}};
    options.pair_template = "\\n{prompt} = {answer}";
    add_pairs_argument("sums=" + (folder_->path() / "pairs.jsonl").string(), options.domains);
    prepare(options, {});
    dataset_ = std::make_unique<TokenDataset>(TokenDataset::open(options.out));
  }
  static void TearDownTestSuite() {
    dataset_.reset();
    folder_.reset();
  }

  static DataConfig mix(double license, double sums) {
    DataConfig data;
    data.domains = {{"license", license}, {"sums", sums}};
    data.cross_document_attention = false;
    return data;
  }
  static std::vector<std::string> trace(Communicator& world, int ep, const TrainerOptions& options,
                                        const DataConfig& data, std::int64_t steps) {
    std::vector<std::string> lines;
    TrainingRun run(world, ep, options, *dataset_, 1, data);
    run.trainer().initialize();
    run.steps(steps, lines);
    lines.push_back(run.digest());
    return lines;
  }

  /// Of a first step whose loss is the sum over targets divided by their number.
  static double gradient_norm_by_hand(const TrainerOptions& options, const BatchSampler& sampler,
                                      std::int64_t targets) {
    Stream stream(1);
    ModelInstance instance(make_process_groups(*self_, 1), stream, instance_options(options));
    instance.initialize_parameters();
    Optimizer optimizer(instance, options.train);
    BatchBuffers buffers(options.train.micro_batch_seqs, options.train.seq_len);
    MicroBatchStats stats = instance.transformer().make_stats();
    auto workspace = instance.transformer().make_workspace();
    instance.params().start_sums(stream);
    const std::int64_t seqs = options.train.micro_batch_seqs;
    const std::int64_t micro_batches = options.train.global_batch_seqs / seqs;
    for (std::int64_t n = 0; n < micro_batches; ++n) {
      MicroBatch batch = buffers.fill(sampler, n, seqs, n * seqs);
      batch.loss_scale = 1 / static_cast<double>(targets);
      batch.weight = 1 / static_cast<double>(micro_batches);
      PassContext ctx = instance.pass(batch, stats);
      instance.transformer().train(ctx, instance.params(), instance.dispatcher(), workspace, false);
    }
    optimizer.reduce_gradients();
    return optimizer.gradient_norm();
  }

  static inline std::unique_ptr<TemporaryFolder> folder_;
  static inline std::unique_ptr<TokenDataset> dataset_;
  static inline std::unique_ptr<Communicator> self_ = make_self_communicator();
};

TEST_F(PairRuns, TheLossIsTheMeanOverAnswers) {
  const TrainerOptions options = small_training();
  TrainingRun run(*self_, 1, options, *dataset_, 1, mix(1, 1));
  run.trainer().initialize();
  for (std::int64_t step = 0; step < 3; ++step) {
    // Counted from the samples themselves.
    std::int64_t targets = 0;
    const auto length = static_cast<std::size_t>(options.train.seq_len);
    std::vector<std::int32_t> tokens(length + 1), first_key(length), learned(length);
    for (std::int64_t i = 0; i < options.train.global_batch_seqs; ++i) {
      run.sampler().sample(step * options.train.global_batch_seqs + i, tokens, first_key, learned);
      targets += std::count_if(learned.begin(), learned.end(), [](auto id) { return id >= 0; });
    }
    StepRequests requests;
    const StepMetrics metrics = run.trainer().step(run.sampler(), requests);
    EXPECT_EQ(metrics.targets, targets);
    EXPECT_LT(metrics.targets, metrics.tokens);
    EXPECT_EQ(metrics.tokens, options.train.global_batch_seqs * options.train.seq_len);
    EXPECT_EQ(json::parse(to_json_line(metrics))["targets"], targets);
    // As a fresh model's mean must be; a mean over all tokens would be far less.
    if (step > 0) continue;
    EXPECT_NEAR(metrics.ce, std::log(256.0), 0.1);
    EXPECT_EQ(metrics.grad_norm, gradient_norm_by_hand(options, run.sampler(), targets));
  }
  // Where everything is learned nothing is said.
  TrainingRun text(*self_, 1, options, *dataset_, 1, mix(1, 0));
  text.trainer().initialize();
  StepRequests requests;
  const StepMetrics metrics = text.trainer().step(text.sampler(), requests);
  EXPECT_EQ(metrics.targets, metrics.tokens);
  EXPECT_FALSE(json::parse(to_json_line(metrics)).contains("targets"));
}

TEST_F(PairRuns, SameBitsOnAnyRanksAndEp) {
  TrainerOptions options = small_training();
  options.routing.capacity_factor = 1.25;
  const DataConfig data = mix(1, 2);
  const auto reference = trace(*self_, 1, options, data, 8);
  for (const auto& [ranks, ep] : {std::pair{2, 2}, {3, 1}, {3, 3}, {4, 2}}) {
    std::vector<std::string> lines;
    run_on_threads(ranks, {}, [&, n = ranks, e = ep](Communicator& world) {
      auto mine = trace(world, e, options, data, 8);
      if (world.rank() == 0) lines = std::move(mine);
    });
    EXPECT_EQ(lines, reference) << ranks << " ranks, EP " << ep;
  }
}

// A '+' stands in every prompt at a place that anything could learn. That it is not learned shows
// in its loss: like a byte that never occurs it only becomes less likely.
TEST_F(PairRuns, PromptsAreReadButNotLearned) {
  const TrainerOptions options = small_training();
  TrainingRun run(*self_, 1, options, *dataset_, 1, mix(0, 1));
  run.trainer().initialize();
  std::vector<std::string> lines;
  run.steps(40, lines);
  const std::string text = "\n12 + 3 = 15";
  std::vector<std::int32_t> ids(static_cast<std::size_t>(options.train.seq_len), 0);
  std::copy(text.begin(), text.end(), ids.begin());
  std::vector<std::int32_t> targets(ids.begin() + 1, ids.end());
  targets.push_back(-1);
  BatchBuffers buffers(1, options.train.seq_len);
  const MicroBatch batch = buffers.fill(ids, targets, 0);
  MicroBatchStats stats = run.instance().transformer().make_stats();
  PassContext ctx = run.instance().pass(batch, stats);
  ctx.training = false;
  std::vector<float> losses(ids.size());
  run.instance().transformer().evaluate(
      ctx, run.instance().params(), run.instance().dispatcher(),
      {losses.data(), DType::f32, 1, static_cast<std::int64_t>(losses.size())});
  const std::size_t plus = text.find('+') - 1, answer = text.size() - 2;
  EXPECT_GT(losses[plus], std::log(256.0F) + 0.5F);
  EXPECT_LT(losses[answer], std::log(256.0F) - 2);
}

TEST_F(PairRuns, HeldOutAnswersAloneAreEvaluated) {
  TrainerOptions options = small_training();
  options.train.steps = 150;
  TrainingRun run(*self_, 1, options, *dataset_, 1, mix(0, 1));
  run.trainer().initialize();
  const EvalMetrics before = evaluate(run.instance(), *dataset_, mix(0, 1), {"sums"}, 0, 0);
  const TokenFile& file = dataset_->file(1, Split::valid);
  EXPECT_EQ(before.domains[0].tokens, file.num_targets(1, file.num_tokens()));
  EXPECT_LT(before.domains[0].tokens, file.num_tokens());
  std::vector<std::string> lines;
  run.steps(150, lines);
  const EvalMetrics after = evaluate(run.instance(), *dataset_, mix(0, 1), {"sums"}, 0, 0);
  EXPECT_LT(after.domains[0].loss, 0.5 * before.domains[0].loss);
}

TEST_F(PairRuns, AStepWithoutAnswersIsRefusedOnAllRanks) {
  std::ofstream(folder_->path() / "long.jsonl")
      << json{{"prompt", std::string(600, 'p')}, {"answer", "a"}};
  PrepareOptions prepared{.out = folder_->path() / "long", .valid_fraction = 0};
  add_pairs_argument((folder_->path() / "long.jsonl").string(), prepared.domains);
  prepare(prepared, {});
  const TokenDataset data = TokenDataset::open(prepared.out);
  TrainerOptions options = small_training();
  options.train.global_batch_seqs = options.train.micro_batch_seqs;
  std::atomic<int> refused{0};
  run_on_threads(3, {}, [&](Communicator& world) {
    TrainingRun run(world, 3, options, data);
    run.trainer().initialize();
    StepRequests requests;
    try {
      for (int step = 0; step < 20; ++step) run.trainer().step(run.sampler(), requests);
    } catch (const Error& error) {
      EXPECT_EQ(static_cast<int>(error.code()), static_cast<int>(ExitCode::data));
      EXPECT_NE(std::string(error.what()).find("nothing to learn"), std::string::npos);
      ++refused;
    }
  });
  EXPECT_EQ(refused, 3);
}

TEST_F(PairRuns, RanksCrossCheckPairs) {
  run_on_threads(2, {}, [&](Communicator& world) {
    const TrainerOptions options = small_training();
    TrainingRun run(world, 2, options, *dataset_, 1, mix(1, 3));
    run.trainer().initialize();
    CrossCheck check(run.instance(), options);
    EXPECT_TRUE(check.run(run.sampler(), 0).suspects.empty());
  });
}

}  // namespace
}  // namespace arcus::testing
