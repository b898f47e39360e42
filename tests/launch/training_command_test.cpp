// The commands around a training run, as a user types them: prepare, train on one and two ranks,
// resume, stop by a signal, evaluate, generate, and what happens with mistakes under a launcher.
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <string>

#include "src/base/memory.hpp"
#include "tests/launch/training_commands.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;
using testing_commands::read_file;
using testing_commands::TrainingCommands;

class TrainingCommand : public TrainingCommands {};

TEST_F(TrainingCommand, TheSameRunOnOneAndTwoRanksAndInTwoParts) {
  const ShellResult alone = arcus(0, train("alone"));
  ASSERT_EQ(alone.code, 0) << alone.out;
  EXPECT_TRUE(contains(alone.out, "done at step 20 of 20")) << alone.out;
  ASSERT_EQ(arcus(2, train("two")).code, 0);
  testing_commands::expect_same_metrics(run_dir("alone"), run_dir("two"));
  EXPECT_EQ(digest("alone").size(), 17U);
  EXPECT_EQ(digest("alone"), digest("two"));

  // A run that was cut short ends with the same state, on another number of ranks.
  const std::string some = "--set train.steps=20 --set checkpoint.every=7";
  ASSERT_EQ(arcus(2, train("parts", some + " --set run.max_minutes=0.00001")).code, 0);
  const ShellResult rest = arcus(0, train("parts", some));
  ASSERT_EQ(rest.code, 0) << rest.out;
  EXPECT_TRUE(contains(rest.out, "going on from")) << rest.out;
  EXPECT_EQ(digest("parts"), digest("alone"));
}

TEST_F(TrainingCommand, FinishedRunsSayWhatTheyHoldAndWhatTheyKnow) {
  ASSERT_EQ(arcus(0, train("shown")).code, 0);
  const std::string run = run_dir("shown").string();
  for (const char* file : {"metrics.jsonl", "run.log", "config.toml", "checkpoints/latest"}) {
    EXPECT_TRUE(fs::exists(run_dir("shown") / file)) << file;
  }
  EXPECT_EQ(arcus(0, "inspect --config " + run).out, read_file(run_dir("shown") / "config.toml"));
  const ShellResult eval = arcus(0, "eval " + run);
  EXPECT_EQ(eval.code, 0) << eval.out;
  EXPECT_TRUE(contains(eval.out, "words")) << eval.out;
  EXPECT_EQ(eval.out, arcus(2, "eval " + run).out);
  EXPECT_EQ(arcus(0, "eval --domain verbs " + run).code, 64);

  const std::string generate = "generate " + run + " --prompt 'file 1' --max-tokens 20 --seed 5";
  const ShellResult text = arcus(0, generate);
  EXPECT_EQ(text.code, 0) << text.out;
  EXPECT_TRUE(text.out.starts_with("file 1")) << text.out;
  EXPECT_EQ(text.out, arcus(2, generate).out);
  const ShellResult several = arcus(0, generate + " --samples 3");
  EXPECT_TRUE(contains(several.out, "--- 3 ---")) << several.out;
}

TEST_F(TrainingCommand, ASignalSavesAndExitsWith75) {
  // The run itself writes the metrics line that tells when to send the signal.
  const std::string metrics = (run_dir("stopped") / "metrics.jsonl").string();
  const std::string command =
      std::string(ARCUS_MPIRUN) + " -np 2 " + ARCUS_BINARY + " " +
      train("stopped", "--set train.steps=1000000") + " & job=$!; while ! test -s " + metrics +
      "; do kill -0 $job || break; sleep 0.05; done; kill -USR1 $job; wait $job";
  const ShellResult stopped = shell(command);
  EXPECT_EQ(stopped.code, 75) << stopped.out;
  EXPECT_TRUE(contains(stopped.out, "stopped by USR1, saved at step")) << stopped.out;
  EXPECT_TRUE(fs::exists(run_dir("stopped") / "checkpoints" / "latest"));
}

TEST_F(TrainingCommand, StartingAnewMovesTheOldRunAside) {
  const std::string two_steps = "--set train.steps=2 --set train.warmup_steps=1";
  ASSERT_EQ(arcus(0, train("anew", two_steps)).code, 0);
  const std::string before = digest("anew");
  ASSERT_EQ(arcus(0, train("anew", two_steps + " --resume none --set run.seed=2")).code, 0);
  EXPECT_NE(digest("anew"), before);
  EXPECT_TRUE(fs::exists(run_dir("anew") / "checkpoints-1"));
  EXPECT_TRUE(fs::exists(run_dir("anew") / "metrics.jsonl-1"));
}

TEST_F(TrainingCommand, ARunTakesNothingFromAnotherRunOrOtherData) {
  const std::string two_steps = "--set train.steps=2 --set train.warmup_steps=1";
  ASSERT_EQ(arcus(0, train("first", two_steps)).code, 0);
  ASSERT_EQ(arcus(0, train("second", two_steps + " --set run.seed=2")).code, 0);
  const std::string before = digest("first");
  const ShellResult mixed =
      arcus(2, train("first", two_steps + " --resume " + run_dir("second").string()));
  EXPECT_EQ(mixed.code, 64) << mixed.out;
  EXPECT_TRUE(contains(mixed.out, "holds checkpoints of another run")) << mixed.out;

  const std::string other = (folder_ / "other").string();
  ASSERT_EQ(
      shell(std::string(ARCUS_BINARY) + " prepare --out " + other +
            " --tokenizer spm:300 --valid-fraction 0 --domain words=" ARCUS_SOURCE_DIR "/LICENSE")
          .code,
      0);
  const ShellResult tokens = arcus(2, train("first", "--set run.data=" + other));
  EXPECT_EQ(tokens.code, 65) << tokens.out;
  EXPECT_TRUE(contains(tokens.out, "another tokenizer")) << tokens.out;
  EXPECT_EQ(digest("first"), before);
}

TEST_F(TrainingCommand, ARunThatDivergesIsGivenUpSavedAndSaysSo) {
  // The time limit comes first, yet the reason is the loss.
  const ShellResult diverged =
      arcus(2, train("diverged",
                     "--set train.lr=1e30 --set train.grad_clip=0 --set train.warmup_steps=0 "
                     "--set run.max_bad_steps=3 --set run.max_minutes=1 --set train.steps=5000"));
  EXPECT_EQ(diverged.code, 64) << diverged.out;
  EXPECT_TRUE(contains(diverged.out, "3 bad steps in a row")) << diverged.out;
  EXPECT_TRUE(fs::exists(run_dir("diverged") / "checkpoints" / "latest"));
}

TEST_F(TrainingCommand, ExplodingStepsAreSkippedOnAllRanksAndSaid) {
  const std::string steep = "--set train.max_grad_norm=1 --set train.steps=6";
  const ShellResult two = arcus(2, train("steep", steep));
  EXPECT_EQ(two.code, 0) << two.out;
  EXPECT_TRUE(contains(two.out, "explodes: its gradient norm of ")) << two.out;
  EXPECT_TRUE(contains(two.out, "exceeds train.max_grad_norm (1)")) << two.out;
  EXPECT_TRUE(contains(read_file(run_dir("steep") / "metrics.jsonl"), "\"skipped\":true"));
  ASSERT_EQ(arcus(0, train("steep_alone", steep)).code, 0);
  EXPECT_EQ(digest("steep"), digest("steep_alone"));
}

// Where a loss above 0.56 times its slow average counts as a spike, there are some.
TEST_F(TrainingCommand, ASpikeOfTheLossGoesBackAndPassesTheSamplesBy) {
  const std::string spiky =
      "--set run.spike_factor=0.56 --set train.steps=50 --set checkpoint.every=5 --set "
      "run.digest_every=10 --set eval.every=5 --set eval.batches=1";
  const ShellResult one = arcus(0, train("spiky", spiky));
  EXPECT_EQ(one.code, 0) << one.out;
  EXPECT_TRUE(contains(one.out, "past the samples since")) << one.out;
  EXPECT_TRUE(contains(one.out, "having gone back 3 times")) << one.out;
  // The samples that were passed by make it another run.
  ASSERT_EQ(arcus(0, train("smooth", spiky + " --set run.spike_factor=0")).code, 0);
  EXPECT_NE(digest("smooth"), digest("spiky"));

  ASSERT_EQ(arcus(3, train("spiky_three", spiky)).code, 0);
  // Stopped after every single step, so that checkpoints of other steps lie between.
  for (int start = 0;; ++start) {
    ASSERT_LT(start, 100);
    const ShellResult step =
        arcus(0, train("spiky_steps", spiky + " --set run.max_minutes=0.0000001"));
    ASSERT_EQ(step.code, 0) << step.out;
    if (contains(step.out, "done at step 50")) break;
  }
  for (const std::string other : {"spiky_three", "spiky_steps"}) {
    testing_commands::expect_same_metrics(run_dir("spiky"), run_dir(other));
    EXPECT_EQ(digest("spiky"), digest(other));
  }
  EXPECT_EQ(arcus(0, train("spiky", spiky + " --set checkpoint.every=0")).code, 64);
}

TEST_F(TrainingCommand, ADamagedCheckpointIsNamedAndSoIsAnotherOne) {
  ASSERT_EQ(arcus(0, train("damaged", "--set checkpoint.every=10")).code, 0);
  const fs::path checkpoints = run_dir("damaged") / "checkpoints";
  fs::remove(checkpoints / "step-00000020" / "rank-00000.h5");
  const ShellResult eval = arcus(2, "eval " + run_dir("damaged").string());
  EXPECT_EQ(eval.code, 66) << eval.out;
  EXPECT_TRUE(contains(eval.out, "rank-00000.h5 is missing")) << eval.out;
  EXPECT_TRUE(contains(eval.out, (checkpoints / "step-00000010").string())) << eval.out;
  const ShellResult fixed =
      arcus(0, "eval --set model.topk=1 " + (checkpoints / "step-00000010").string());
  EXPECT_EQ(fixed.code, 64) << fixed.out;
  // Going on from the older one needs no word from the user.
  const ShellResult resumed = arcus(2, train("damaged"));
  EXPECT_EQ(resumed.code, 0) << resumed.out;
  EXPECT_TRUE(contains(resumed.out, "step-00000020 is not usable")) << resumed.out;
}

TEST_F(TrainingCommand, WhatOneProcessDoesIsDoneOnceUnderALauncher) {
  const ShellResult shown = arcus(3, "inspect --digest " + data());
  EXPECT_EQ(shown.code, 0);
  EXPECT_EQ(shown.out, arcus(0, "inspect --digest " + data()).out);
  EXPECT_EQ(arcus(2, "--version").out, arcus(0, "--version").out);
  EXPECT_EQ(arcus(2, train("planned", "--plan")).out, arcus(0, train("planned", "--plan")).out);
}

TEST_F(TrainingCommand, ThePlanNeedsNeitherRanksNorARunFolder) {
  const ShellResult plan = arcus(0, train("planned", "--plan --ranks 4"));
  EXPECT_EQ(plan.code, 0) << plan.out;
  EXPECT_TRUE(contains(plan.out, "4 = EP 4 x EDP 1")) << plan.out;
  EXPECT_TRUE(contains(plan.out, "worst case")) << plan.out;
  EXPECT_FALSE(fs::exists(run_dir("planned")));
}

// Refused before anything is reserved, on all ranks, with a way out.
TEST_F(TrainingCommand, ARunThatCannotFitIntoMemorySaysWhatWould) {
  if (available_memory() > (std::int64_t{50} << 30)) GTEST_SKIP() << "it would fit here";
  const std::string huge =
      "--set train.micro_batch_seqs=262144 --set train.global_batch_seqs=262144";
  const ShellResult refused = arcus(2, train("huge", huge));
  EXPECT_EQ(refused.code, 64) << refused.out;
  EXPECT_TRUE(contains(refused.out, "available to it")) << refused.out;
  EXPECT_TRUE(contains(refused.out, "what would fit")) << refused.out;
  EXPECT_TRUE(contains(refused.out, "train.micro_batch_seqs = ")) << refused.out;
  EXPECT_FALSE(fs::exists(run_dir("huge"))) << "touched before it was refused";
  const ShellResult planned = arcus(0, train("huge", huge + " --plan"));
  EXPECT_EQ(planned.code, 0) << planned.out;
  EXPECT_TRUE(contains(planned.out, "available to it")) << planned.out;
}

struct Mistake {
  std::string arguments;
  int code;
  const char* expected;
};

TEST_F(TrainingCommand, MistakesUnderALauncherAreReportedOnceWithTheirCode) {
  const Mistake mistakes[] = {
      {train("bad", "--set model.topk=9"), 64, "model.topk (9) exceeds model.num_experts (4)"},
      {train("bad", "--set parallel.ep_size=3"), 64, "parallel.ep_size (3) must divide"},
      {train("bad", "--set trainn.lr=1"), 64, "did you mean train.lr?"},
      {train("bad", "--set run.device=cuda"), 64, "built without CUDA"},
      {train("bad", "--set run.data=/no/such/data"), 65, "/no/such/data"},
      {train("bad", "--set model.vocab_size=100"), 65, "vocabulary of 256"},
      {train("bad", "--set train.seq_len=100000"), 65, "train.seq_len"},
      {train("bad", "--set data.domain.0.name=verbs"), 64, "verbs"},
      {train("bad", "--set parallel.threads=100000"), 64, "parallel.threads is 100000, but"},
      {train("bad", "--set 'train.group=[{match=\"embedd\"}]'"), 64,
       "found in no parameter's name"},
      {train("bad", "--set model.hidden_size=16777216 --set model.num_experts=16777216"), 64,
       "the model would have"},
      {train("bad", "--resume nope"), 64, "--resume nope: no such checkpoint or run folder"},
      {"train no-such-file.toml", 64, "no-such-file.toml: No such file"},
      {"eval /no/such/run", 66, "/no/such/run"},
  };
  for (const Mistake& mistake : mistakes) {
    const ShellResult result = arcus(2, mistake.arguments);
    EXPECT_EQ(result.code, mistake.code) << mistake.arguments << "\n" << result.out;
    EXPECT_TRUE(contains(result.out, mistake.expected)) << mistake.arguments << "\n" << result.out;
    const auto first = result.out.find("arcus: error: ");
    EXPECT_NE(first, std::string::npos) << result.out;
    EXPECT_EQ(result.out.find("arcus: error: ", first + 1), std::string::npos) << result.out;
  }
}

TEST_F(TrainingCommand, ARunWithoutItsCheckpointsStartsAfreshAndKeepsTheOldMetrics) {
  const std::string two_steps = "--set train.steps=2 --set train.warmup_steps=1";
  ASSERT_EQ(arcus(0, train("orphan", two_steps)).code, 0);
  fs::remove_all(run_dir("orphan") / "checkpoints");
  const ShellResult again = arcus(0, train("orphan", two_steps));
  EXPECT_EQ(again.code, 0) << again.out;
  EXPECT_TRUE(contains(again.out, "moved ")) << again.out;
  EXPECT_TRUE(fs::exists(run_dir("orphan") / "metrics.jsonl-1"));
}

TEST_F(TrainingCommand, ADivergedRunGivesUpNoOlderCheckpoint) {
  const std::string some =
      "--set checkpoint.every=3 --set checkpoint.keep=2 --set train.warmup_steps=0";
  ASSERT_EQ(arcus(0, train("given_up", some + " --set train.steps=6")).code, 0);
  for (int attempt = 0; attempt < 3; ++attempt) {
    const ShellResult again =
        arcus(0, train("given_up", some + " --set train.lr=1e30 --set train.grad_clip=0 --set "
                                          "run.max_bad_steps=1 --set train.steps=50"));
    EXPECT_EQ(again.code, 64) << again.out;
  }
  for (const char* good : {"step-00000003", "step-00000006"}) {
    EXPECT_TRUE(fs::exists(run_dir("given_up") / "checkpoints" / good)) << good;
  }
}

TEST_F(TrainingCommand, EveryBenchmarkRunsAtATinySize) {
  const std::string tiny = " --config " ARCUS_SOURCE_DIR
                           "/launch/configs/tiny.toml --repeats 1 --set parallel.threads=1 "
                           "--set run.data=" +
                           data();
  const std::string here = fs::current_path();
  fs::current_path(folder_);
  for (const auto& [name, expected] :
       {std::pair{"gemm", "all three"}, std::pair{"dispatch", "MPI_Alltoallv alone"},
        std::pair{"dispatch --overlap", "% hidden"}, std::pair{"generate", "x limit"},
        std::pair{"step", "roofline"}, std::pair{"checkpoint --mib 3", "of raw speed"}}) {
    const ShellResult result = arcus(2, std::string("bench ") + name + tiny);
    EXPECT_EQ(result.code, 0) << result.out;
    EXPECT_TRUE(contains(result.out, expected)) << result.out;
  }
  fs::current_path(here);
  const std::string trace = run_dir("trace.json");
  const std::string figures = run_dir("figures.json");
  const ShellResult account =
      arcus(2, "bench step" + tiny + " --account --trace " + trace + " --json " + figures);
  EXPECT_EQ(account.code, 0) << account.out;
  for (const char* row : {"experts' products at the measured peak", "counts exchange",
                          "waiting for others", "sum of the rows"}) {
    EXPECT_TRUE(contains(account.out, row)) << account.out;
  }
  // One track a rank, spans of both.
  std::ifstream file(trace);
  const auto json = nlohmann::json::parse(file, nullptr, false);
  ASSERT_TRUE(json.is_object());
  std::set<int> tracks;
  for (const auto& event : json["traceEvents"]) {
    if (event["ph"] == "X" && event["name"] == "dispatch") tracks.insert(event["tid"].get<int>());
  }
  EXPECT_EQ(tracks, (std::set<int>{0, 1}));
  std::ifstream figures_file(figures);
  const auto step = nlohmann::json::parse(figures_file, nullptr, false);
  ASSERT_TRUE(step.is_object());
  EXPECT_EQ(step["ranks"], 2);
  EXPECT_GT(step["memory"]["measured"], 0);
  EXPECT_GT(step["account_ms"]["optimizer"], 0);
}

// A text must not depend on its neighbours, in layers of another routing either.
TEST_F(TrainingCommand, EvaluationAndGenerationKeepToTheTrainedModel) {
  const ShellResult trained =
      arcus(0, train("two_level",
                     "--set train.steps=5 --set routing.stream=threshold --set "
                     "routing.override.0.layers=0 --set "
                     "routing.override.0.eval_capacity_factor=0.25"));
  ASSERT_EQ(trained.code, 0) << trained.out;
  const std::string run = run_dir("two_level");
  const ShellResult other = arcus(0, "eval " + run + " --set routing.stream=none");
  EXPECT_EQ(other.code, 64) << other.out;
  EXPECT_TRUE(contains(other.out, "stream_gate.weight, which the configuration has no use for"))
      << other.out;
  const std::string generate = "generate " + run + " --temperature 0 --max-tokens 8 --ignore-eos";
  const ShellResult alone = arcus(0, generate + " --raw --prompt \"last of five\" 2>/dev/null");
  const ShellResult fifth = arcus(0, generate +
                                         " --raw --prompt a --prompt b --prompt c --prompt d "
                                         "--prompt \"last of five\" 2>/dev/null");
  EXPECT_EQ(alone.code, 0) << alone.out;
  ASSERT_GE(fifth.out.size(), alone.out.size());
  EXPECT_TRUE(fifth.out.ends_with(alone.out)) << alone.out << "\nbeside others: " << fifth.out;
}

TEST_F(TrainingCommand, OutputThatCannotBeWrittenIsAnError) {
  if (!fs::exists("/dev/full")) GTEST_SKIP() << "no /dev/full";
  for (const std::string& command : {"inspect --held-out words " + data(),
                                     "inspect --json " + data(), train("planned", "--plan")}) {
    const ShellResult result = arcus(0, command + " >/dev/full");
    EXPECT_EQ(result.code, 64) << command << "\n" << result.out;
    EXPECT_TRUE(contains(result.out, "No space left")) << result.out;
  }
}

TEST_F(TrainingCommand, TwoRunsInOneFolderAreRefused) {
  const std::string lock = run_dir("busy") / "metrics.jsonl";
  const std::string command = std::string(ARCUS_BINARY) + " " +
                              train("busy", "--set train.steps=1000000") +
                              " >/dev/null 2>&1 & job=$!; while ! test -s " + lock +
                              "; do kill -0 $job || break; sleep 0.05; done; " + ARCUS_BINARY +
                              " " + train("busy") + "; code=$?; kill -KILL $job; exit $code";
  const ShellResult second = shell(command);
  EXPECT_EQ(second.code, 64) << second.out;
  EXPECT_TRUE(contains(second.out, "in use")) << second.out;
}

}  // namespace
}  // namespace arcus
