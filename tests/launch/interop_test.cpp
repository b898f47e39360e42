// Export, import and upcycling as a user types them.
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "tests/launch/training_commands.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;
using testing_commands::read_file;

/// tiny.toml's capacity is for training; other programs drop nothing.
class Interop : public testing_commands::TrainingCommands {
 protected:
  static std::string path(const std::string& name) { return run_dir(name).string(); }

  static void train_once(const std::string& run, const std::string& sets) {
    if (fs::exists(run_dir(run))) return;
    const ShellResult result = arcus(2, train(run, "--set train.steps=4 " + sets));
    ASSERT_EQ(result.code, 0) << result.out;
  }
  /// The logits of the same ids, as the bytes of the file's data set.
  static std::string logits(const std::string& run, int ranks = 0) {
    std::ofstream(run_dir("ids.txt")) << "1 2 3 4 5 6 7\n99 98 97\n250\n";
    const ShellResult result = arcus(ranks, "eval " + path(run) + " --ids " + path("ids.txt") +
                                                " --logits " + path(run + ".h5"));
    EXPECT_EQ(result.code, 0) << result.out;
    const ShellResult dump = shell("h5dump -d logits -b LE -o " + path(run + ".bin") + " " +
                                   path(run + ".h5") + " > /dev/null");
    EXPECT_EQ(dump.code, 0) << dump.out;
    return read_file(run_dir(run + ".bin"));
  }
  static void expect_refused(const std::string& arguments, int code, const std::string& part) {
    const ShellResult result = arcus(0, arguments);
    EXPECT_EQ(result.code, code) << result.out;
    EXPECT_TRUE(contains(result.out, part)) << result.out;
  }
  static bool contains(const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos;
  }
};

constexpr const char* kGlm =
    "--set model.qk_norm=none --set routing.score=sigmoid --set routing.expert_bias_rate=0.01 "
    "--set routing.aux_loss=0 --set model.num_shared_experts=1 --set model.first_k_dense=1 "
    "--set routing.routed_scaling_factor=1.5";

TEST_F(Interop, ARunGoesOutAndComesBackWithTheSameBits) {
  for (const auto& [run, sets] :
       {std::pair{"head", "--set model.qk_norm=head"}, std::pair{"glm", kGlm}}) {
    train_once(run, sets);
    const std::string expected = logits(run);
    EXPECT_EQ(expected.size(), 11U * 256U * 4U);
    EXPECT_EQ(logits(run, 3), expected);
    for (const char* to : {"hf", "gguf"}) {
      const std::string out = std::string(run) + "." + to;
      const ShellResult exported =
          arcus(to == std::string("hf") ? 2 : 0,
                "export --checkpoint " + path(run) + " --to " + to + " --out " + path(out));
      EXPECT_EQ(exported.code, 0) << exported.out;
      EXPECT_TRUE(contains(exported.out, "logits bit-equal")) << exported.out;
      const auto report = nlohmann::json::parse(read_file(run_dir(out + ".report.json")));
      EXPECT_EQ(report["perplexity_checkpoint"], report["perplexity_export"]);
      const std::string back = std::string(run) + "_from_" + to;
      const ShellResult imported = arcus(2, "import --from " + path(out) + " --out " + path(back));
      EXPECT_EQ(imported.code, 0) << imported.out;
      EXPECT_EQ(logits(back), expected);
      EXPECT_EQ(arcus(0, "inspect --verify " + path(back)).code, 0);
    }
  }
}

constexpr const char* kAdapters =
    " --set train.lora.rank=4 --set train.lora.alpha=8 --set train.lora.match=_proj --set "
    "train.lr=1e-2 ";

TEST_F(Interop, AdaptersGoOutMerged) {
  train_once("lora", std::string(kGlm) + " --set model.qkv_bias=true" + kAdapters);
  ASSERT_EQ(arcus(0, "merge " + path("lora") + " --out " + path("merged")).code, 0);
  const std::string expected = logits("merged");
  EXPECT_NE(logits("lora"), expected) << "adapters that add nothing show nothing";
  for (const char* to : {"hf", "gguf"}) {
    const std::string out = std::string("lora.") + to;
    const ShellResult exported =
        arcus(to == std::string("hf") ? 2 : 0,
              "export --checkpoint " + path("lora") + " --to " + to + " --out " + path(out));
    ASSERT_EQ(exported.code, 0) << exported.out;
    EXPECT_TRUE(contains(exported.out, "logits bit-equal, adapters merged: logits within "))
        << exported.out;
    const auto report = nlohmann::json::parse(read_file(run_dir(out + ".report.json")));
    EXPECT_TRUE(report["logits_bit_equal"]);
    const double difference = report["merging_adapters"]["max_abs_logit_difference"];
    EXPECT_GT(difference, 0);
    EXPECT_LE(difference, 1e-4);
    const std::string back = std::string("lora_from_") + to;
    const ShellResult imported = arcus(0, "import --from " + path(out) + " --out " + path(back));
    EXPECT_EQ(imported.code, 0) << imported.out;
    EXPECT_EQ(logits(back), expected);
  }
  EXPECT_TRUE(contains(read_file(run_dir("lora.hf") / "README.md"),
                       "the adapters of rank 4 are merged into their weights"));
}

TEST_F(Interop, AdaptersAreMergedBeforeUpcycling) {
  train_once("dense_lora",
             std::string("--set model.first_k_dense=2 --set model.dense_ff_size=48") + kAdapters);
  ASSERT_EQ(arcus(0, "merge " + path("dense_lora") + " --out " + path("dense_merged")).code, 0);
  const std::string how = " --experts 4 --topk 2 --out ";
  const ShellResult result = arcus(0, "upcycle --from " + path("dense_lora") + how + path("up1"));
  ASSERT_EQ(result.code, 0) << result.out;
  const auto at = result.out.find("logits differ by up to ");
  ASSERT_NE(at, std::string::npos) << result.out;
  EXPECT_LE(std::stod(result.out.substr(at + 23)), 1e-4) << result.out;
  ASSERT_EQ(arcus(0, "upcycle --from " + path("dense_merged") + how + path("up2")).code, 0);
  EXPECT_EQ(logits("up1"), logits("up2"));
}

TEST_F(Interop, SixteenBitExportsStayCloseAndSayHowClose) {
  train_once("head", "--set model.qk_norm=head");
  for (const char* dtype : {"bf16", "f16"}) {
    const ShellResult result = arcus(0, "export --checkpoint " + path("head") +
                                            " --to hf --dtype " + dtype + " --out " + path(dtype));
    EXPECT_EQ(result.code, 0) << result.out;
    EXPECT_TRUE(contains(result.out, "perplexity: checkpoint")) << result.out;
    const std::string card = read_file(run_dir(dtype) / "README.md");
    EXPECT_TRUE(contains(card, "## Verification") && contains(card, "digest")) << card;
  }
}

TEST_F(Interop, NothingIsReplacedWithoutBeingTold) {
  train_once("head", "--set model.qk_norm=head");
  const std::string out = " --out " + path("twice");
  const std::string hf = "export --no-verify --checkpoint " + path("head") + " --to hf" + out;
  EXPECT_EQ(arcus(0, hf).code, 0);
  expect_refused(hf, 65, "--force");
  EXPECT_EQ(arcus(0, hf + " --force").code, 0);
  expect_refused("export --checkpoint " + path("head") + " --to gguf --force" + out, 65,
                 "is no file");
  fs::create_directories(run_dir("other"));
  std::ofstream(run_dir("other") / "thesis.txt") << "years of work";
  expect_refused("export --checkpoint " + path("head") + " --to hf --force --out " + path("other"),
                 65, "no part of an exported model");
  EXPECT_TRUE(fs::exists(run_dir("other") / "thesis.txt"));
  // A run inside an export, the source above all, is nobody's to take away.
  fs::create_directories(run_dir("twice") / "checkpoints");
  expect_refused(hf + " --force", 65, "no part of an exported model");
  fs::remove(run_dir("twice") / "checkpoints");
  const std::string notes = path("other") + "/thesis.txt";
  expect_refused("export --checkpoint " + path("head") + " --to gguf --force --out " + notes, 65,
                 "is no GGUF file");
  expect_refused("eval " + path("head") + " --ids " + notes + " --logits " + notes, 65, "thesis");
  std::ofstream(run_dir("some.txt")) << "1 2 3";
  expect_refused("eval " + path("head") + " --ids " + path("some.txt") + " --logits " + notes, 65,
                 "is no HDF5 file");
  EXPECT_EQ(read_file(notes), "years of work");
  expect_refused("import --from " + path("twice") + " --out " + path("other"), 64, "thesis.txt");
  expect_refused("import --from " + path("twice") + " --out " + path("head"), 64,
                 "holds checkpoints of a run already");
}

TEST_F(Interop, WrongRequestsAreToldWhatWouldDo) {
  train_once("head", "--set model.qk_norm=head");
  const std::string checkpoint = "export --checkpoint " + path("head");
  const std::string out = " --out " + path("refused");
  expect_refused(checkpoint + " --to hf --family olmoe" + out, 64, "model.qk_norm = \"head\"");
  expect_refused(checkpoint + " --to hf --family llama3" + out, 64, "must be auto, mixtral");
  expect_refused(checkpoint + " --to onnx" + out, 64, "must be hf");
  expect_refused(checkpoint + " --to hf --dtype int4" + out, 64, "must be f32, bf16 or f16");
  expect_refused(checkpoint + " --to hf", 64, "--out");
  expect_refused("export --checkpoint " + path("nowhere") + " --to hf" + out, 66, "nowhere");
  expect_refused(checkpoint + " --to gguf --out " + path("no/such/folder/x.gguf"), 65,
                 "is not there");
  expect_refused("import --from " + path("nowhere") + out, 65, "does not exist");
  expect_refused("import --from " + data() + out, 65, "config.json is missing");
  expect_refused("import --from " + path("ids.txt") + out, 65, "GGUF");
  EXPECT_FALSE(fs::exists(run_dir("refused")));
  EXPECT_FALSE(fs::exists(run_dir("refused.partial")));
  // A checkpoint that is still being written has another name.
  const fs::path half = run_dir("half") / "checkpoints" / "step-00000002.tmp";
  fs::create_directories(half);
  expect_refused("export --checkpoint " + path("half") + " --to hf" + out, 66, "half");
}

TEST_F(Interop, AConfigurationIsJudgedBeforeItIsTrained) {
  const std::string config = " " ARCUS_SOURCE_DIR "/launch/configs/tiny.toml";
  const ShellResult fine = arcus(0, "export --check" + config + " --set model.qk_norm=head");
  EXPECT_EQ(fine.code, 0) << fine.out;
  EXPECT_TRUE(contains(fine.out, "qwen3_moe")) << fine.out;
  const ShellResult never =
      arcus(0, "export --check" + config + " --set routing.select=hash --set routing.aux_loss=0");
  EXPECT_EQ(never.code, 64) << never.out;
  EXPECT_TRUE(contains(never.out, "routing.select = \"hash\" (train with \"topk\")")) << never.out;
  const ShellResult warned =
      arcus(0, train("warned", "--set train.steps=4 --set routing.gate_bias=true"));
  EXPECT_TRUE(contains(warned.out, "cannot be exported")) << warned.out;
}

TEST_F(Interop, UpcyclingKeepsWhatTheDenseModelComputes) {
  train_once("dense", "--set model.first_k_dense=2 --set model.dense_ff_size=48");
  for (const char* how :
       {"--experts 4 --topk 2", "--experts 6 --topk 6", "--experts 8 --topk 4 --granularity 2",
        "--experts 12 --topk 3 --granularity 3 --first-dense 1",
        "--experts 4 --topk 2 --set routing.score=sigmoid"}) {
    fs::remove_all(run_dir("up"));
    const ShellResult result =
        arcus(2, "upcycle --from " + path("dense") + " " + how + " --out " + path("up"));
    ASSERT_EQ(result.code, 0) << result.out;
    const auto at = result.out.find("logits differ by up to ");
    ASSERT_NE(at, std::string::npos) << result.out;
    EXPECT_LE(std::stod(result.out.substr(at + 23)), 1e-5) << how << "\n" << result.out;
  }
  // With noise, or shards scaled alike, it is told what changed.
  for (const char* how : {"--experts 4 --topk 2 --noise 0.5",
                          "--experts 8 --topk 4 --granularity 2 --scaling literature"}) {
    fs::remove_all(run_dir("up"));
    const ShellResult result =
        arcus(0, "upcycle --from " + path("dense") + " " + how + " --out " + path("up"));
    EXPECT_EQ(result.code, 0) << result.out;
    const auto at = result.out.find("logits differ by up to ");
    ASSERT_NE(at, std::string::npos) << result.out;
    EXPECT_GT(std::stod(result.out.substr(at + 23)), 1e-5) << how;
  }
  const std::string up = "upcycle --from " + path("dense") + " --out " + path("never");
  expect_refused(up + " --experts 4 --topk 1", 64, "routing.renormalize=false");
  expect_refused(up + " --experts 6 --topk 4 --granularity 4", 64, "8 and 4 would do");
  expect_refused(up + " --experts 5 --topk 5 --granularity 5", 64, "does not divide");
  expect_refused(up + " --experts 2 --topk 4", 64, "topk");
  expect_refused("upcycle --from " + path("head") + " --experts 4 --topk 2 --out " + path("never"),
                 64, "arcus convert");
  EXPECT_FALSE(fs::exists(run_dir("never")));
}

// A report belongs to the export beside it.
TEST_F(Interop, AnExportThatIsNotVerifiedLeavesNoReportOfAnother) {
  train_once("head", "--set model.qk_norm=head");
  const std::string gguf =
      "export --checkpoint " + path("head") + " --to gguf --out " + path("r.gguf");
  EXPECT_EQ(arcus(0, gguf).code, 0);
  EXPECT_TRUE(fs::exists(run_dir("r.gguf.report.json")));
  EXPECT_EQ(arcus(0, gguf + " --force --no-verify").code, 0);
  EXPECT_FALSE(fs::exists(run_dir("r.gguf.report.json")));
  // The tokenizer of bytes comes back as it went.
  EXPECT_EQ(arcus(0, "import --from " + path("r.gguf") + " --out " + path("bytes_again")).code, 0);
  EXPECT_EQ(arcus(0, "eval " + path("bytes_again") + " --data " + data()).code, 0);
  fs::create_directories(run_dir("s.gguf.report.json.partial"));
  const ShellResult full =
      arcus(0, "export --checkpoint " + path("head") + " --to gguf --out " + path("s.gguf"));
  EXPECT_NE(full.code, 0);
  EXPECT_FALSE(fs::exists(run_dir("s.gguf"))) << full.out;
}

TEST_F(Interop, TwoExportsToOneFileDoNotMix) {
  train_once("head", "--set model.qk_norm=head");
  const std::string gguf = std::string(ARCUS_BINARY) + " export --checkpoint " + path("head") +
                           " --to gguf --out " + path("race.gguf");
  const ShellResult both =
      shell(gguf + " & " + gguf + "; wait; ls " + path(".") + "; " + ARCUS_BINARY +
            " import --from " + path("race.gguf") + " --out " + path("raced"));
  EXPECT_EQ(both.code, 0) << both.out;
  EXPECT_FALSE(fs::exists(run_dir("race.gguf.partial"))) << both.out;
}

TEST_F(Interop, BadIdsAreRefused) {
  train_once("head", "--set model.qk_norm=head");
  const auto with = [&](const std::string& text) {
    std::ofstream(run_dir("bad.txt")) << text;
    return "eval " + path("head") + " --ids " + path("bad.txt") + " --logits " + path("bad.h5");
  };
  expect_refused(with("1 2 x"), 65, "is no token id");
  expect_refused(with("1 256"), 65, "vocabulary ends at 255");
  expect_refused(with("-1"), 65, "is no token id");
  expect_refused(with("99999999999999"), 65, "is no token id");
  expect_refused(with("\n\n"), 65, "holds no ids");
  EXPECT_FALSE(fs::exists(run_dir("bad.h5")));
  EXPECT_FALSE(fs::exists(run_dir("bad.h5.partial")));
}

}  // namespace
}  // namespace arcus
