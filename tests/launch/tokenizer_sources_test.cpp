// Tokenizers of other programs on the command line: ids of texts, data for them, a run on these.
#include "checkpoints/interop/gguf.hpp"
#include "checkpoints/interop/tokenizer_files.hpp"
#include "tests/data/tokenizer_fixture.hpp"
#include "tests/launch/training_commands.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;

class TokenizerSources : public testing_commands::TrainingCommands {
 protected:
  static void SetUpTestSuite() {
    TrainingCommands::SetUpTestSuite();
    fs::create_directories(hf());
    const JsonTokenizer tokenizer =
        testing::json_tokenizer(testing::byte_fallback_vocabulary(/*dummy_prefix=*/true, 40));
    for (const auto& [name, text] : hf_tokenizer_files(tokenizer, tokenizer.vocab_size())) {
      std::ofstream(hf() / name, std::ios::binary) << text;
    }
    GgufWriter(folder_ / "vocab.gguf", gguf_tokenizer_keys(*load_tokenizer("bytes", ""), 256), {})
        .finish();
  }
  static fs::path hf() { return folder_ / "hf"; }
  static ShellResult tokenize(const std::string& input, const std::string& arguments) {
    return shell("printf '" + input + "' | " ARCUS_BINARY " tokenize " + arguments);
  }
};

TEST_F(TokenizerSources, TokenizeGivesIdsByLinesAndTextBack) {
  const std::string bytes = "--tokenizer bytes ";
  EXPECT_EQ(tokenize("ab\\n\\nc", bytes).out, "97 98\n\n99\n");
  EXPECT_EQ(tokenize("ab\\n\\nc", bytes + "--whole").out, "97 98 10 10 99\n");
  EXPECT_EQ(tokenize("a\\nb\\000c", bytes + "-z").out, "97 10 98\n99\n");
  EXPECT_EQ(tokenize("97 98\\n99", bytes + "--decode").out, "ab\nc\n");
  EXPECT_EQ(tokenize("97 98\\n99", bytes + "--decode --whole").out, "abc");
  const std::string gguf = "--tokenizer gguf:" + (folder_ / "vocab.gguf").string() + " ";
  EXPECT_EQ(tokenize("ab\\nc", gguf).out, "97 98\n99\n");
  const std::string from_hf = "--tokenizer hf:" + hf().string() + " ";
  const ShellResult ids = tokenize("a  tensor, 中", from_hf);
  EXPECT_EQ(ids.code, 0) << ids.out;
  EXPECT_EQ(tokenize(ids.out, from_hf + "--decode").out, "a  tensor, 中\n");
  EXPECT_EQ(tokenize("a</s>", from_hf + "--special").out,
            tokenize("a", from_hf).out.substr(0, tokenize("a", from_hf).out.size() - 1) + " 2\n");
  const ShellResult described = tokenize("", from_hf + "--describe");
  EXPECT_TRUE(contains(described.out, "kind        tokenizer_json\n")) << described.out;
  EXPECT_TRUE(contains(described.out, "end of text 2\n")) << described.out;
}

TEST_F(TokenizerSources, MistakesAreNamed) {
  const auto fails = [](int code, const std::string& word, const ShellResult& result) {
    EXPECT_EQ(result.code, code) << result.out;
    EXPECT_TRUE(contains(result.out, word)) << result.out;
  };
  fails(64, "hf:DIR", tokenize("a", "--tokenizer words"));
  fails(64, "not both", tokenize("a", ""));
  fails(65, "nowhere is neither", tokenize("a", "--tokenizer hf:nowhere"));
  fails(65, "has no tokenizer", tokenize("a", "--tokenizer hf:" + (folder_ / "text").string()));
  fails(65, "no file", tokenize("a", "--tokenizer model:nowhere"));
  fails(65, "is no id", tokenize("1 x", "--tokenizer bytes --decode"));
  fails(65, "is no id", tokenize("256", "--tokenizer bytes --decode"));
  fails(65, "NUL", tokenize("a\\000b", "--tokenizer bytes --whole"));
  std::ofstream(folder_ / "tokenizer.json") << R"({"model": {"type": "WordPiece"}})";
  fails(65, "WordPiece", tokenize("a", "--tokenizer hf:" + (folder_ / "tokenizer.json").string()));
}

TEST_F(TokenizerSources, DataOfAnImportedTokenizerTrainsAndGoesOn) {
  const auto prepare = [](const std::string& out, const std::string& tokenizer) {
    return shell(std::string(ARCUS_BINARY) + " prepare --out " + (folder_ / out).string() +
                 " --tokenizer " + tokenizer +
                 " --valid-fraction 0.1 --domain words=" + (folder_ / "text").string());
  };
  const ShellResult prepared = prepare("imported", "hf:" + hf().string());
  ASSERT_EQ(prepared.code, 0) << prepared.out;
  const std::string with_data = "--set run.data=" + (folder_ / "imported").string() +
                                " --set model.vocab_size=512 --set train.steps=2 "
                                "--set train.warmup_steps=1";
  const ShellResult trained = arcus(0, train("imported_run", with_data));
  ASSERT_EQ(trained.code, 0) << trained.out;
  const std::string run = run_dir("imported_run").string();

  // The checkpoint has it, in the same words, and so has data prepared from there.
  EXPECT_EQ(tokenize("line 7, a file", run).out,
            tokenize("line 7, a file", "--tokenizer hf:" + hf().string()).out);
  ASSERT_EQ(prepare("again", "checkpoint:" + run).code, 0);
  EXPECT_EQ(testing_commands::read_file(folder_ / "again" / "tokenizer.files"),
            testing_commands::read_file(folder_ / "imported" / "tokenizer.files"));
  ASSERT_EQ(prepare("third", "data:" + (folder_ / "again").string()).code, 0);
  const ShellResult eval = arcus(0, "eval " + run + " --data " + (folder_ / "third").string());
  EXPECT_EQ(eval.code, 0) << eval.out;
  const ShellResult text =
      arcus(0, "generate " + run + " --prompt 'file 1' --max-tokens 5 --temperature 0");
  EXPECT_EQ(text.code, 0) << text.out;
  EXPECT_TRUE(contains(text.out, "file 1")) << text.out;
}

}  // namespace
}  // namespace arcus
