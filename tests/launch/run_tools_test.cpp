// What is done about runs: comparing two, looking at one, starting one again.
#include <nlohmann/json.hpp>

#include "tests/launch/training_commands.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

class RunTools : public testing_commands::TrainingCommands {};

TEST_F(RunTools, DiffFindsNothingBetweenLayoutsAndTheStepWhereRunsPart) {
  const std::string logged =
      "--set run.digest_every=2 --set checkpoint.every=6 --set checkpoint.keep=9 "
      "--set checkpoint.background=false ";
  ASSERT_EQ(arcus(0, train("one", logged)).code, 0);
  ASSERT_EQ(arcus(2, train("two", logged)).code, 0);
  const std::string pair = "diff " + run_dir("one").string() + " ";
  const ShellResult same = arcus(0, pair + run_dir("two").string());
  EXPECT_EQ(same.code, 0) << same.out;
  EXPECT_TRUE(contains(same.out, "metrics      equal at all 20 common steps")) << same.out;
  EXPECT_TRUE(contains(same.out, "digests      equal at all 10 common steps, 2 to 20")) << same.out;
  EXPECT_TRUE(contains(same.out, "checkpoints  equal at all")) << same.out;

  // Written while training went on: the same as what it waited for.
  ASSERT_EQ(arcus(2, train("meanwhile", logged + "--set checkpoint.background=true")).code, 0);
  const ShellResult meanwhile = arcus(0, pair + run_dir("meanwhile").string());
  EXPECT_EQ(meanwhile.code, 0) << meanwhile.out;

  // The same up to step 12; another learning rate from there.
  fs::copy(run_dir("one"), run_dir("other"), fs::copy_options::recursive);
  for (const char* step : {"step-00000018", "step-00000020"}) {
    fs::remove_all(run_dir("other") / "checkpoints" / step);
  }
  const ShellResult resumed =
      arcus(0, train("other", logged + "--set train.lr=0.5 --resume " +
                                  (run_dir("other") / "checkpoints" / "step-00000012").string()));
  ASSERT_EQ(resumed.code, 0) << resumed.out;
  const ShellResult differ = arcus(0, pair + run_dir("other").string());
  EXPECT_EQ(differ.code, 1) << differ.out;
  EXPECT_TRUE(contains(differ.out, "metrics      part at step 13")) << differ.out;
  EXPECT_TRUE(contains(differ.out, "lr: ")) << differ.out;
  EXPECT_TRUE(contains(differ.out, "digests      part at step 14")) << differ.out;
  EXPECT_TRUE(contains(differ.out, "experts.gate_proj.weight[")) << differ.out;

  EXPECT_EQ(arcus(0, pair + data()).code, 64);
  EXPECT_EQ(arcus(0, pair + "nowhere").code, 64);
}

TEST_F(RunTools, StatusReadsARunFromItsFolder) {
  ASSERT_EQ(arcus(2, train("seen")).code, 0);
  const std::string run = run_dir("seen").string();
  const ShellResult text = arcus(0, "status " + run);
  EXPECT_EQ(text.code, 0) << text.out;
  EXPECT_TRUE(contains(text.out, "step        20 of 20, loss ")) << text.out;
  EXPECT_TRUE(contains(text.out, "nobody holds it")) << text.out;
  EXPECT_TRUE(contains(text.out, "step-00000020")) << text.out;
  const Json json = Json::parse(arcus(0, "status --json " + run).out, nullptr, false);
  ASSERT_TRUE(json.is_object());
  EXPECT_EQ(json["step"], 20);
  EXPECT_EQ(json["running"], false);
  EXPECT_GT(json["tokens_per_s"], 0);
  EXPECT_EQ(arcus(0, "status " + data()).code, 64);
}

TEST_F(RunTools, ConvertChangesTheNumberOfExpertsAndNothingElseDoes) {
  const std::string run = run_dir("before").string();
  ASSERT_EQ(arcus(0, train("before", "--set routing.capacity_factor=0")).code, 0);
  const std::string before = arcus(0, "eval " + run).out;
  const ShellResult accident = arcus(2, train("before", "--set model.num_experts=8"));
  EXPECT_EQ(accident.code, 66) << accident.out;
  EXPECT_TRUE(contains(accident.out, "does not fit this run")) << accident.out;

  // Every expert twice, twice as many a token: the same model, but for roundings.
  const std::string same = run_dir("same").string();
  const ShellResult doubled =
      arcus(3, "convert " + run + " --num-experts 8 --topk 4 --noise 0 --out " + same);
  EXPECT_EQ(doubled.code, 0) << doubled.out;
  EXPECT_TRUE(contains(doubled.out, "8 experts instead of 4")) << doubled.out;
  const auto bits = [](const std::string& table) {
    return std::stod(table.substr(table.find_last_of(' ')));
  };
  EXPECT_NEAR(bits(arcus(0, "eval " + same).out), bits(before), 1e-4);
  EXPECT_EQ(arcus(0, "inspect --verify " + same).code, 0);
  const std::string eight =
      "--set routing.capacity_factor=0 --set model.num_experts=8 --set model.topk=4 --set "
      "model.dense_ff_size=64 --set train.steps=24";
  const ShellResult on = arcus(2, train("same", eight));
  EXPECT_EQ(on.code, 0) << on.out;
  EXPECT_TRUE(contains(on.out, "done at step 24 of 24")) << on.out;

  // Doubled and halved again: what it was.
  const std::string back = run_dir("back").string();
  ASSERT_EQ(arcus(0, "convert " + run + " --num-experts 8 --out " + run_dir("noisy").string()).code,
            0);
  ASSERT_EQ(arcus(0, "convert " + run_dir("noisy").string() +
                         " --num-experts 4 --keep 0-2,3 --out " + back)
                .code,
            0);
  EXPECT_EQ(digest("back"), digest("before"));
  EXPECT_NE(digest("noisy"), digest("before"));

  for (const auto& [arguments, message] :
       {std::pair{"--num-experts 2 --out ", "--keep says which ones stay"},
        std::pair{"--num-experts 4 --out ", "asks for as many"},
        std::pair{"--num-experts 2 --keep 0,4 --out ", "must be experts of 0 to 3"},
        std::pair{"--num-experts 2 --keep 0-2 --out ", "names 3 experts"},
        std::pair{"--num-experts 1 --keep 2 --out ", "model.topk (2) exceeds"}}) {
    const ShellResult refused =
        arcus(0, "convert " + run + " " + arguments + run_dir("refused").string());
    EXPECT_EQ(refused.code, 64) << refused.out;
    EXPECT_TRUE(contains(refused.out, message)) << refused.out;
  }
  EXPECT_FALSE(fs::exists(run_dir("refused")));
  const ShellResult taken = arcus(0, "convert " + run + " --num-experts 8 --out " + same);
  EXPECT_EQ(taken.code, 64) << taken.out;
}

TEST_F(RunTools, BlocksLikeGpt2sTrainConvertAndGenerate) {
  const std::string blocks =
      "--set model.norm=layer --set model.activation=gelu_new --set model.qkv_bias=true --set "
      "model.o_bias=true --set model.mlp_bias=true --set model.qk_norm=none --set "
      "model.num_kv_heads=4 --set model.tie_embeddings=true --set model.position=learned --set "
      "model.max_positions=32 --set routing.capacity_factor=0";
  const ShellResult trained = arcus(2, train("gpt2", blocks));
  ASSERT_EQ(trained.code, 0) << trained.out;
  const std::string run = run_dir("gpt2").string();
  const std::string same = run_dir("gpt2_same").string();
  ASSERT_EQ(arcus(3, "convert " + run + " --num-experts 8 --topk 4 --noise 0 --out " + same).code,
            0);
  const auto bits = [](const std::string& table) {
    return std::stod(table.substr(table.find_last_of(' ')));
  };
  EXPECT_NEAR(bits(arcus(0, "eval " + same).out), bits(arcus(2, "eval " + run).out), 1e-4);

  const std::string generate = "generate " + run + " --ignore-eos --prompt ab --max-tokens ";
  const ShellResult text = arcus(0, generate + "30");
  EXPECT_EQ(text.code, 0) << text.out;
  EXPECT_EQ(arcus(2, generate + "30").out, text.out);
  const ShellResult beyond = arcus(0, generate + "31");
  EXPECT_EQ(beyond.code, 64) << beyond.out;
  EXPECT_TRUE(contains(beyond.out, "ask for at most 30 (--max-tokens)")) << beyond.out;
  const ShellResult longer = arcus(0, train("gpt2_longer", blocks + " --set train.seq_len=40"));
  EXPECT_EQ(longer.code, 64) << longer.out;
  EXPECT_TRUE(contains(longer.out, "train.seq_len (40) exceeds model.max_positions (32)"))
      << longer.out;
}

/// A script that stands for `mpirun arcus train`: fails as often as the file of its name says.
class Supervise : public RunTools {
 protected:
  /// `body` sees $n, the number of this start.
  static std::string script(const std::string& name, const std::string& body) {
    const fs::path file = folder_ / (name + ".sh");
    std::ofstream(file) << "n=$(cat " << file.string()
                        << ".n 2>/dev/null || echo 0); n=$((n + 1)); "
                        << "echo $n >" << file.string() << ".n; echo >>"
                        << (run_dir(name) / "run.log").string() << "\n"
                        << body << "\n";
    return "sh " + file.string();
  }
  static int starts(const std::string& name) {
    return std::atoi(testing_commands::read_file(folder_ / (name + ".sh.n")).c_str());
  }
  static std::string supervise(const std::string& run, const std::string& options,
                               const std::string& command) {
    fs::create_directories(run_dir(run));
    return "supervise --backoff 0.05 --run " + run_dir(run).string() + " " + options + " -- " +
           command;
  }
};

TEST_F(Supervise, StartsAgainWhatGetsOnUntilItIsDone) {
  const std::string metrics = (run_dir("goes_on") / "metrics.jsonl").string();
  const std::string command =
      script("goes_on", "echo \"{\\\"step\\\": $n}\" >>" + metrics + "; [ $n -ge 4 ] || exit 137");
  const ShellResult result = arcus(0, supervise("goes_on", "", command));
  EXPECT_EQ(result.code, 0) << result.out;
  EXPECT_EQ(starts("goes_on"), 4);
  EXPECT_TRUE(contains(result.out, "exit code 137 (signal 9) after step 3")) << result.out;
}

TEST_F(Supervise, GivesUpWhatFailsTwiceInTheSameWay) {
  const ShellResult same = arcus(0, supervise("same", "", script("same", "exit 69")));
  EXPECT_EQ(same.code, 69) << same.out;
  EXPECT_EQ(starts("same"), 2);
  EXPECT_TRUE(contains(same.out, "second time at step 1 in the same way")) << same.out;
  const ShellResult others =
      arcus(0, supervise("others", "--retries 3", script("others", "exit $((80 + n))")));
  EXPECT_EQ(others.code, 84) << others.out;
  EXPECT_EQ(starts("others"), 4);
}

// A checkpoint that was named counts until the run has one of its own.
TEST_F(Supervise, GoesOnFromWhatWasNamedUntilSomethingIsSaved) {
  const std::string saved = (run_dir("named") / "checkpoints" / "step-00000001").string();
  const std::string command = script(
      "named", "echo start $n: $*; [ $n -ne 2 ] || mkdir -p " + saved + "; exit $((80 + n))");
  const ShellResult result = arcus(
      0, supervise("named", "--retries 2", command + " train my.toml --resume elsewhere/step-5"));
  EXPECT_TRUE(contains(result.out, "start 1: train my.toml --resume elsewhere/step-5"))
      << result.out;
  EXPECT_TRUE(contains(result.out, "start 2: train my.toml --resume elsewhere/step-5"))
      << result.out;
  EXPECT_TRUE(contains(result.out, "start 3: train my.toml --resume auto")) << result.out;
}

TEST_F(Supervise, LeavesAloneWhatAnotherStartCannotMend) {
  for (const int code : {0, 64, 65, 66, 75}) {
    const std::string name = "final" + std::to_string(code);
    EXPECT_EQ(arcus(0, supervise(name, "", script(name, "exit " + std::to_string(code)))).code,
              code);
    EXPECT_EQ(starts(name), 1);
  }
  EXPECT_EQ(arcus(0, "supervise -- sleep 1").code, 64) << "no run folder";
}

TEST_F(Supervise, RunsThatNeverBeginAreTriedAgainToTheLimit) {
  const ShellResult result = arcus(0, supervise("never", "--retries 3", "sh -c 'exit 1'"));
  EXPECT_EQ(result.code, 1) << result.out;
  EXPECT_TRUE(contains(result.out, "started again 3 times")) << result.out;
  const ShellResult nobody =
      arcus(0, supervise("nobody", "--retries 1 --hosts a:2 --probe false", "echo {hosts}"));
  EXPECT_EQ(nobody.code, 69) << nobody.out;
  EXPECT_TRUE(contains(nobody.out, "no host answers")) << nobody.out;
  EXPECT_EQ(arcus(0, supervise("odd", "--hosts a:8x", "true")).code, 64);
}

TEST_F(Supervise, PassesOneSignalOnAndHonoursItDuringAProbe) {
  const std::string wait = "trap 'echo got; exit 75' TERM; sleep 5 & wait $!; exit 1";
  const std::string binary = std::string(ARCUS_BINARY) + " ";
  const ShellResult passed = shell(binary + supervise("passed", "", script("passed", wait)) +
                                   " & sleep 0.5; kill -TERM $!; wait $!");
  EXPECT_EQ(passed.code, 75) << passed.out;
  EXPECT_TRUE(contains(passed.out, "got")) << passed.out;
  const ShellResult probed =
      shell(binary + supervise("probed", "--hosts a --probe 'sleep 0.6'", script("probed", wait)) +
            " & sleep 0.2; kill -TERM $!; wait $!");
  EXPECT_EQ(probed.code, 128 + 15) << probed.out;
  EXPECT_EQ(starts("probed"), 0) << "started although a signal had come";
}

TEST_F(Supervise, TakesTheHostsThatAnswer) {
  const ShellResult result =
      arcus(0, supervise("hosts", "--hosts a:2,b:3,c:4 --probe 'test {host} != b'",
                         "echo hosts {hosts} ranks {ranks}"));
  EXPECT_EQ(result.code, 0) << result.out;
  EXPECT_TRUE(contains(result.out, "hosts a:2,c:4 ranks 6")) << result.out;
  EXPECT_TRUE(contains(result.out, "b does not answer")) << result.out;
}

TEST_F(Supervise, ARunWhoseRankIsKilledEndsLikeAnUndisturbedOne) {
  const std::string some = "--set checkpoint.every=3 --set checkpoint.background=false ";
  ASSERT_EQ(arcus(0, train("quiet", some)).code, 0);
  // The first start loses a rank after a few steps; the second has one rank less.
  const std::string metrics = (run_dir("killed") / "metrics.jsonl").string();
  const std::string command = script(
      "killed",
      "kill_one() { while [ $(cat " + metrics +
          " 2>/dev/null | wc -l) -lt 6 ]; do sleep 0.01; done; pkill -9 -n -f 'set.run.dir=" +
          run_dir("killed").string() + "' ; }\n" + "[ $n -ge 2 ] || kill_one &\n" +
          std::string(ARCUS_MPIRUN) + " -np $((4 - n)) " + ARCUS_BINARY + " " +
          train("killed", some));
  const ShellResult result = arcus(0, supervise("killed", "", command));
  EXPECT_EQ(result.code, 0) << result.out;
  EXPECT_GE(starts("killed"), 2) << "nothing was killed: " << result.out;
  EXPECT_EQ(digest("killed"), digest("quiet"));
  testing_commands::expect_same_metrics(run_dir("killed"), run_dir("quiet"));
}

}  // namespace
}  // namespace arcus
