// Runs that start from the weights of others: --init, --fresh, adapters and merging, as a user
// types them.
#include <nlohmann/json.hpp>

#include "tests/launch/training_commands.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;
using testing_commands::read_file;

class Finetune : public testing_commands::TrainingCommands {
 protected:
  static void SetUpTestSuite() {
    TrainingCommands::SetUpTestSuite();
    ASSERT_EQ(arcus(0, train("base",
                             "--set routing.expert_bias_rate=0.01 --set "
                             "routing.score=sigmoid"))
                  .code,
              0);
  }
  static std::string base() { return run_dir("base").string(); }
  /// A file that says nothing of the model.
  static std::string tune(const std::string& run, const std::string& more = "") {
    const fs::path file = folder_ / "tune.toml";
    std::ofstream(file) << "[train]\nsteps = 6\nseq_len = 32\nmicro_batch_seqs = 2\n"
                           "global_batch_seqs = 6\nlr = 1e-3\nwarmup_steps = 1\n"
                           "[eval]\nbatches = 2\n";
    return "train " + file.string() + " --set run.dir=" + run_dir(run).string() +
           " --set run.data=" + data() + " " + more;
  }
  /// The hash of every tensor of a run's latest checkpoint.
  static std::map<std::string, std::string> hashes(const std::string& run) {
    std::map<std::string, std::string> result;
    const Json json =
        Json::parse(arcus(0, "inspect --json " + run_dir(run).string()).out, nullptr, false);
    for (const Json& tensor : json["tensors"]) result[tensor["name"]] = tensor["hash"];
    return result;
  }
  static std::string key(const std::string& run, const std::string& name) {
    const Json json =
        Json::parse(arcus(0, "inspect --json " + run_dir(run).string()).out, nullptr, false);
    return json["extra"].value(name, "");
  }
  static double bits(const std::string& run) {
    const std::string table = arcus(0, "eval " + run_dir(run).string()).out;
    return std::stod(table.substr(table.find_last_of(' ')));
  }
};

TEST_F(Finetune, ARunStartsFromAnothersWeightsAloneAndKnowsIt) {
  const ShellResult tuned =
      arcus(2, tune("tuned", "--init " + base() + " --set train.lr=1e-9 --set train.steps=1"));
  ASSERT_EQ(tuned.code, 0) << tuned.out;
  EXPECT_TRUE(contains(tuned.out, "tensors from " + base())) << tuned.out;
  // Nearly the same weights, a fresh optimizer at step 0.
  EXPECT_NEAR(bits("tuned"), bits("base"), 0.02);
  EXPECT_TRUE(fs::exists(run_dir("tuned") / "checkpoints" / "step-00000001"));
  EXPECT_TRUE(contains(key("tuned", "init_from"), base())) << key("tuned", "init_from");
  EXPECT_TRUE(contains(key("tuned", "init_from"), "step 20")) << key("tuned", "init_from");
  const std::string config = read_file(run_dir("tuned") / "config.toml");
  for (const char* line : {"hidden_size = 32", "score = \"sigmoid\"", "expert_bias_rate = 0.01",
                           "capacity_factor = 1.25", "vocab_size = 256"}) {
    EXPECT_TRUE(contains(config, line)) << line;
  }

  // Started again, it goes on from its own, with --init or without, on any ranks.
  const std::string more = " --set train.lr=1e-9 --set train.steps=3";
  const ShellResult on = arcus(0, tune("tuned", "--init no-longer-there" + more));
  EXPECT_EQ(on.code, 0) << on.out;
  EXPECT_TRUE(contains(on.out, "--init no-longer-there is not used any more")) << on.out;
  EXPECT_TRUE(contains(on.out, "going on from")) << on.out;
  const ShellResult without = arcus(3, tune("tuned", " --set train.lr=1e-9 --set train.steps=5"));
  EXPECT_EQ(without.code, 0) << without.out;
  EXPECT_TRUE(contains(without.out, "done at step 5 of 5")) << without.out;
  EXPECT_TRUE(contains(key("tuned", "init_from"), base()));
}

TEST_F(Finetune, TheSameBitsOnAnyRanks) {
  const std::string more = "--init " + base() + " --set train.lora.rank=4 --set train.lora.match=" +
                           "'_proj' --set 'train.group=[{part=\"router\", lr_scale=0.5}]'";
  ASSERT_EQ(arcus(0, tune("one", more)).code, 0);
  for (const int ranks : {3}) {
    const std::string run = "ranks" + std::to_string(ranks);
    ASSERT_EQ(arcus(ranks, tune(run, more)).code, 0);
    EXPECT_EQ(digest(run), digest("one")) << ranks << " ranks";
  }
}

TEST_F(Finetune, FrozenPartsStayAsTheyWere) {
  // An odd number of steps, so that no expert's bias can be back where it was.
  ASSERT_EQ(arcus(0, tune("router", "--init " + base() +
                                        " --set train.steps=5 "
                                        "--set 'train.group=[{match=\".\", frozen=true}, "
                                        "{part=\"router\", lr_scale=3}]'"))
                .code,
            0);
  const auto before = hashes("base");
  int trained = 0;
  for (const auto& [name, hash] : hashes("router")) {
    const bool gate = contains(name, "mlp.gate.");
    if (name.starts_with("optimizer/")) {
      EXPECT_TRUE(gate) << name;
    } else if (before.contains(name) && !name.starts_with("counters/")) {
      EXPECT_EQ(hash != before.at(name), gate) << name;
      trained += gate ? 1 : 0;
    }
  }
  EXPECT_EQ(trained, 2 * 2) << "gates and their biases";
}

TEST_F(Finetune, AdaptersAreMergedIntoTheWeights) {
  const std::string lora = "--init " + base() +
                           " --set train.lora.rank=4 --set train.lora.alpha=16 --set "
                           "train.lora.match=_proj --set train.lr=1e-2 --set train.steps=20";
  ASSERT_EQ(arcus(2, tune("lora", lora)).code, 0);
  EXPECT_LT(bits("lora"), bits("base"));
  const auto base_hashes = hashes("base");
  for (const auto& [name, hash] : hashes("lora")) {
    if (contains(name, "lora_") || !name.ends_with(".weight")) continue;
    if (name.starts_with("optimizer/")) continue;
    EXPECT_EQ(hash, base_hashes.at(name)) << name;
  }

  const ShellResult merged =
      arcus(2, "merge " + run_dir("lora").string() + " --out " + run_dir("merged").string());
  ASSERT_EQ(merged.code, 0) << merged.out;
  EXPECT_NEAR(bits("merged"), bits("lora"), 1e-4);
  for (const auto& [name, hash] : hashes("merged")) {
    EXPECT_FALSE(contains(name, "lora_") || name.starts_with("optimizer/")) << name;
    if (name.ends_with("_proj.weight")) {
      EXPECT_NE(hash, base_hashes.at(name)) << name;
    } else if (!contains(name, "_bias")) {
      EXPECT_EQ(hash, base_hashes.at(name)) << name;
    }
  }
  EXPECT_EQ(arcus(0, "inspect --verify " + run_dir("merged").string()).code, 0);
  const std::string generate = " --prompt 'file 1' --max-tokens 12 --temperature 0";
  EXPECT_EQ(arcus(0, "generate " + run_dir("merged").string() + generate).out,
            arcus(2, "generate " + run_dir("lora").string() + generate).out);

  // It is a start, not a run to go on with.
  const ShellResult direct = arcus(0, tune("merged"));
  EXPECT_EQ(direct.code, 64) << direct.out;
  EXPECT_TRUE(contains(direct.out, "holds weights alone")) << direct.out;
  EXPECT_TRUE(contains(direct.out, "--init " + run_dir("merged").string())) << direct.out;
  EXPECT_FALSE(fs::exists(run_dir("merged") / "run.log")) << "touched before it was refused";
  const ShellResult next =
      arcus(0, tune("next", "--init " + run_dir("merged").string() + " --set train.steps=1"));
  EXPECT_EQ(next.code, 0) << next.out;

  // Adapters may be trained further, not changed.
  const std::string further = "--init " + run_dir("lora").string() + " --set train.steps=1";
  EXPECT_EQ(arcus(0, tune("further", further)).code, 0);
  const ShellResult other = arcus(0, tune("other", further + " --set train.lora.rank=8"));
  EXPECT_EQ(other.code, 64) << other.out;
  EXPECT_TRUE(contains(other.out, "train.lora.rank = 8, the checkpoint's is 4")) << other.out;
  EXPECT_TRUE(contains(other.out, "arcus merge")) << other.out;
  const ShellResult twice =
      arcus(0, "merge " + run_dir("merged").string() + " --out " + run_dir("again").string());
  EXPECT_EQ(twice.code, 64) << twice.out;
  EXPECT_TRUE(contains(twice.out, "nothing to merge")) << twice.out;
}

// A mix of text and of pairs, whose answers are a letter that their prompts name.
TEST_F(Finetune, PairsAreLearnedBesideText) {
  const fs::path pairs = folder_ / "letters.jsonl";
  {
    std::ofstream file(pairs);
    for (int i = 0; i < 208; ++i) {
      const std::string letter(1, static_cast<char>('a' + i % 26));
      file << Json{{"prompt", "say " + letter}, {"answer", letter + letter}, {"id", i}} << "\n";
      file << Json{{"messages",
                    {{{"role", "user"}, {"content", "now " + letter}},
                     {{"role", "assistant"}, {"content", letter + letter}}}},
                   {"id", i}}
           << "\n";
    }
  }
  const std::string mixed = (folder_ / "mixed").string();
  const ShellResult prepared =
      arcus(0, "prepare --out " + mixed +
                   " --valid-fraction 0.1 --domain words=" + (folder_ / "text").string() +
                   " --pairs letters=" + pairs.string() + " --template '<{prompt}>{answer}'");
  ASSERT_EQ(prepared.code, 0) << prepared.out;
  EXPECT_TRUE(contains(prepared.out, "letters: 1.2k of 4.2k tokens are answers")) << prepared.out;
  EXPECT_TRUE(contains(arcus(0, "inspect " + mixed).out, " learned")) << prepared.out;

  const std::string run = run_dir("letters").string();
  const ShellResult tuned =
      arcus(2, tune("letters", "--init " + base() + " --set run.data=" + mixed +
                                   " --set train.steps=250 --set train.lr=1e-2 --set "
                                   "train.schedule=constant --set eval.batches=0 --set "
                                   "train.lora.rank=8 --set train.lora.match=_proj --set "
                                   "'data.domain=[{name=\"words\", weight=1.0}, "
                                   "{name=\"letters\", weight=3.0}]' --set "
                                   "'train.group=[{part=\"embeddings\"}]' --set "
                                   "data.cross_document_attention=false"));
  ASSERT_EQ(tuned.code, 0) << tuned.out;
  EXPECT_TRUE(contains(read_file(run_dir("letters") / "metrics.jsonl"), "\"targets\":"));
  const ShellResult said = arcus(
      2, "generate " + run + " --ask --prompt 'say q' --temperature 0 --max-tokens 3 2>/dev/null");
  EXPECT_EQ(said.out, "<say q>qq\n");
  EXPECT_EQ(key("letters", "pair_template"), "<{prompt}>{answer}");
  const ShellResult no_pairs = arcus(0, "generate " + base() + " --ask --prompt a");
  EXPECT_EQ(no_pairs.code, 64) << no_pairs.out;
  EXPECT_TRUE(contains(no_pairs.out, "not trained on pairs")) << no_pairs.out;

  const std::string bad = (folder_ / "bad.jsonl").string();
  std::ofstream(bad) << R"({"prompt": "p", "answer": "a"})"
                     << "\n"
                     << R"({"question": "p"})";
  const ShellResult refused = arcus(0, "prepare --out " + mixed + "2 --pairs " + bad);
  EXPECT_EQ(refused.code, 65) << refused.out;
  EXPECT_TRUE(contains(refused.out, "bad.jsonl:2 is no pair")) << refused.out;
  const ShellResult nothing = arcus(0, "prepare --out " + mixed + "2");
  EXPECT_EQ(nothing.code, 64) << nothing.out;
  EXPECT_TRUE(contains(nothing.out, "--pairs NAME=FILE.jsonl")) << nothing.out;
}

TEST_F(Finetune, AStepOfPromptsAloneEndsTheRunOnce) {
  const std::string long_prompt = (folder_ / "long.jsonl").string();
  std::ofstream(long_prompt) << Json{{"prompt", std::string(2000, 'p')}, {"answer", "a"}};
  const std::string data = (folder_ / "long").string();
  ASSERT_EQ(arcus(0, "prepare --out " + data + " --valid-fraction 0 --pairs " + long_prompt).code,
            0);
  const ShellResult run = arcus(2, tune("long", "--init " + base() + " --set run.data=" + data +
                                                    " --set train.global_batch_seqs=2"));
  EXPECT_EQ(run.code, 65) << run.out;
  EXPECT_TRUE(contains(run.out, "nothing to learn")) << run.out;
  const std::size_t first = run.out.find("arcus: error: ");
  EXPECT_EQ(run.out.find("arcus: error: ", first + 1), std::string::npos) << run.out;
}

TEST_F(Finetune, AFreshGateOverOldExperts) {
  const std::string fresh = "--init " + base() + " --fresh 'mlp\\.gate' --set train.steps=1";
  const ShellResult tuned = arcus(0, tune("fresh", fresh + " --set train.lr=1e-12"));
  ASSERT_EQ(tuned.code, 0) << tuned.out;
  EXPECT_TRUE(contains(tuned.out, "kept at its initial values: model.layers.1.mlp.gate.weight"))
      << tuned.out;
  const auto before = hashes("base");
  const auto after = hashes("fresh");
  EXPECT_NE(after.at("model.layers.0.mlp.gate.weight"),
            before.at("model.layers.0.mlp.gate.weight"));
  // Of which the routing may be another one.
  const ShellResult softmax =
      arcus(0, tune("softmax", fresh + " --set routing.score=softmax --set "
                                       "routing.expert_bias_rate=0 --set model.topk=1 --set "
                                       "routing.renormalize=false"));
  EXPECT_EQ(softmax.code, 0) << softmax.out;
  EXPECT_TRUE(contains(softmax.out, "left out: model.layers.0.mlp.gate.e_score_correction_bias"))
      << softmax.out;
  // Once it has begun its gates are as good as any.
  const ShellResult again = arcus(0, tune("softmax", fresh + " --set routing.score=sigmoid"));
  EXPECT_EQ(again.code, 64) << again.out;
  EXPECT_TRUE(contains(again.out, "\"sigmoid\", the checkpoint's is \"softmax\"")) << again.out;
}

TEST_F(Finetune, WhatDoesNotFitIsRefusedByName) {
  const std::string init = "--init " + base() + " ";
  struct Mistake {
    std::string arguments;
    int code;
    std::string expected;
  };
  const std::string other = (folder_ / "other").string();
  ASSERT_EQ(
      shell(std::string(ARCUS_BINARY) + " prepare --out " + other +
            " --tokenizer spm:300 --valid-fraction 0 --domain words=" ARCUS_SOURCE_DIR "/LICENSE")
          .code,
      0);
  const std::vector<Mistake> mistakes = {
      {init + "--set model.hidden_size=64", 64, "model.hidden_size = 64, the checkpoint's is 32"},
      {init + "--set model.topk=1", 64, "model.topk = 1, the checkpoint's is 2"},
      {init + "--set routing.score=softmax", 64,
       "routing.score = \"softmax\", the checkpoint's is \"sigmoid\""},
      {init + "--set routing.override.0.layers=1 --set routing.override.0.n_group=2 --set "
              "routing.override.0.score=softmax",
       64, "routing.score = \"softmax\", the checkpoint's is \"sigmoid\" (layer 1)"},
      {init + "--set routing.noise=1", 66, "it lacks model.layers.0.mlp.gate.noise_weight"},
      {init + "--fresh nothing", 64, "--fresh nothing is found in no tensor's name"},
      {init + "--fresh '('", 64, "no regular expression"},
      {init + "--set run.data=" + other, 65, "another tokenizer"},
      {init + "--resume " + base(), 64, "give one of them"},
      {"--init /no/such/run", 66, "/no/such/run does not exist"},
      {"--fresh mlp.gate", 64, "--init"},
      {init + "--set train.lora.rank=4 --set train.lora.match=embed", 64,
       "matches no weight that takes adapters"},
      {init + "--set 'train.group=[{part=\"gates\"}]'", 64, "must be \"router\", \"experts\""},
      {init + "--set 'train.group=[{lr_scale=2.0}]'", 64, "train.group.0.match is missing"},
      {init + "--set run.dir=" + base() + " --resume none", 64, "is a checkpoint of"},
  };
  for (const Mistake& mistake : mistakes) {
    const ShellResult result =
        arcus(&mistake == &mistakes.front() ? 2 : 0, tune("bad", mistake.arguments));
    EXPECT_EQ(result.code, mistake.code) << mistake.arguments << "\n" << result.out;
    EXPECT_TRUE(contains(result.out, mistake.expected)) << mistake.arguments << "\n" << result.out;
  }
  EXPECT_FALSE(fs::exists(run_dir("bad") / "checkpoints"));
  // Training may be another one, and what is as it is may be said.
  const ShellResult same =
      arcus(0, tune("same", init + "--set model.hidden_size=32 --set model.head_dim=8 --set "
                                   "routing.aux_loss=0.1 --set routing.capacity_factor=0 --set "
                                   "model.vocab_size=auto --set train.steps=1 --plan"));
  EXPECT_EQ(same.code, 0) << same.out;
  const ShellResult unbiased =
      arcus(0, tune("unbiased", init + "--set routing.expert_bias_rate=0 --set train.steps=1"));
  EXPECT_EQ(unbiased.code, 0) << unbiased.out;
  EXPECT_TRUE(contains(unbiased.out, "expert biases are left out")) << unbiased.out;
}

}  // namespace
}  // namespace arcus
