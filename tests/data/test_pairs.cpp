// Pairs: what lines and templates mean, and the law that a prompt's tokens are never a target while
// every other token is one exactly once, whatever the window, in training and in evaluation.

#include "src/data/pairs.hpp"

#include <gtest/gtest.h>

#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "src/data/sampler.hpp"
#include "tests/data/data_testing.hpp"

namespace arcus {
namespace {

using nlohmann::json;
using testing::expect_failure;
using testing::TempDir;

/// Parts as text, those that are not learned in brackets.
std::string shown(const std::vector<TextPart>& parts) {
  std::string text;
  for (const TextPart& part : parts) {
    text += fmt::format(fmt::runtime(part.learned ? "{}" : "[{}]"), part.text);
  }
  return text;
}
std::string shown(const std::string& line, const std::string& how = PairTemplate::kPlain) {
  return shown(read_pair(line, PairTemplate(how)));
}

TEST(Pairs, PlainTemplatePutsThemTogether) {
  EXPECT_EQ(shown(R"({"prompt": "2+2=", "answer": "4"})"), "[2+2=]4");
  EXPECT_EQ(shown(R"({"system": "Add. ", "prompt": "2+2=", "answer": "4", "id": 7})"),
            "[Add. 2+2=]4");
  EXPECT_EQ(shown(R"({"prompt": "", "answer": "a text of its own"})"), "a text of its own");
}

TEST(Pairs, TemplatesSayWhatStandsAround) {
  const std::string how = R"(<{{s}}>{system}\n<u>{prompt}\t<a>{answer}</a>\\\n)";
  EXPECT_EQ(shown(R"({"prompt": "p", "answer": "a"})", how), "[\n<u>p\t<a>]a</a>\\\n");
  EXPECT_EQ(shown(R"({"system": "s", "prompt": "p", "answer": "a"})", how),
            "[<{s}>s\n<u>p\t<a>]a</a>\\\n");
  EXPECT_EQ(PairTemplate(how).prompt("q"), "\n<u>q\t<a>");
  // What they hold is text, whatever it looks like.
  EXPECT_EQ(shown(R"({"prompt": "{answer}\\n", "answer": "{prompt}"})"), "[{answer}\\n]{prompt}");
}

TEST(Pairs, MessagesTakeTurnsAndAssistantsAreLearned) {
  const std::string line = R"({"messages": [{"role": "system", "content": "S"},
      {"role": "user", "content": "U1"}, {"role": "assistant", "content": "A1"},
      {"role": "user", "content": "U2"}, {"role": "assistant", "content": "A2"}]})";
  EXPECT_EQ(shown(line), "[SU1]A1[U2]A2");
  EXPECT_EQ(shown(line, R"(sys {system}; {prompt}? {answer}!)"), "[sys S; U1? ]A1![; U2? ]A2!");
}

TEST(Pairs, WhatIsNoPairIsRefusedByWhatItIs) {
  const auto refused = [](const std::string& line, const std::vector<std::string>& words) {
    expect_failure(ExitCode::data, words,
                   [&] { read_pair(line, PairTemplate("{prompt}{answer}")); });
  };
  refused("{", {"no JSON"});
  refused("\"text\"", {"is string, must be an object"});
  refused("{}", {"\"prompt\" and \"answer\", or \"messages\""});
  refused(R"({"prompt": "p", "answer": "a", "messages": []})", {"or \"messages\""});
  refused(R"({"prompt": "p"})", {"no \"answer\""});
  refused(R"({"prompt": 5, "answer": "a"})", {"\"prompt\" is number, must be text"});
  refused(R"({"prompt": "p", "answer": ""})", {"an answer is empty"});
  refused(R"({"prompt": "p", "answer": "a\u0000"})", {"NUL"});
  refused("{\"prompt\": \"p\", \"answer\": \"\xff\"}", {"no JSON", "UTF-8"});
  refused(R"({"system": "s", "prompt": "p", "answer": "a"})", {"no {system}"});
  refused(R"({"messages": []})", {"no list of messages"});
  refused(R"({"messages": [{"role": "user", "content": "u"}]})", {"last message"});
  refused(R"({"messages": [{"role": "tool", "content": "u"}]})", {"\"tool\"", "\"user\""});
  refused(R"({"messages": [{"role": "user", "content": [{"type": "text"}]}]})",
          {"\"content\" is array, must be text"});
  refused(R"({"messages": [{"role": "user", "content": "u"}, {"role": "user", "content": "u"}]})",
          {"message 1 is of \"user\" where one of \"assistant\" is due"});
  for (const char* how :
       {"{prompt}", "{answer}{prompt}", "{prompt}{answer}{answer}", "{prompt}{system}{answer}",
        "{question}{answer}", "{prompt}{answer", "{prompt}\\x{answer}", "{prompt}{answer}\\"}) {
    expect_failure(ExitCode::usage, {"--template"}, [&] { PairTemplate{how}; });
  }
}

/// A domain of pairs beside one of text. Prompts are of digits and capitals, answers of small
/// letters, so that every token of bytes tells what it is of.
class PairData : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string lines;
    for (int i = 0; i < 150; ++i) {
      json pair = {{"prompt", fmt::format("Q{}{}", i, std::string(i % 23, 'X'))},
                   {"answer", std::string(1 + i % 17, static_cast<char>('a' + i % 26))}};
      lines += pair.dump() + "\n" + (i % 10 == 0 ? "\n" : "");
    }
    dir_.write("pairs.jsonl", lines);
    for (int i = 0; i < 8; ++i) {
      dir_.write("text/" + std::to_string(i),
                 testing::plain_text(static_cast<std::uint64_t>(i), 400));
    }
    options_.out = dir_ / "out";
    options_.valid_fraction = 0.2;
    options_.pair_template = R"({prompt}={answer};)";
    options_.domains = {{"text", {(dir_ / "text").string()}, {}}};
    add_pairs_argument("tasks=" + (dir_ / "pairs.jsonl").string(), options_.domains);
    report_ = prepare(options_);
    data_ = TokenDataset::open(options_.out, /*verify=*/true);
  }
  static bool is_answer(std::int32_t id) {
    return (id >= 'a' && id <= 'z') || id == ';' || id == 0;
  }
  static std::vector<std::int32_t> all_tokens(const TokenFile& file) {
    std::vector<std::int32_t> all(static_cast<std::size_t>(file.num_tokens()));
    file.read(0, all);
    return all;
  }

  TempDir dir_;
  PrepareOptions options_;
  PrepareReport report_;
  TokenDataset data_;
};

TEST_F(PairData, EveryPairIsADocumentAndItsAnswerIsLearned) {
  EXPECT_EQ(report_.domains[1].train.documents + report_.domains[1].valid.documents, 150);
  EXPECT_GT(report_.domains[1].valid.documents, 10);
  std::int64_t targets = 0;
  for (const Split split : kSplits) {
    const TokenFile& file = data_.file(1, split);
    ASSERT_TRUE(file.is_masked());
    const std::vector<std::int32_t> all = all_tokens(file);
    for (std::int64_t d = 0; d < file.num_documents(); ++d) {
      const auto [begin, end] = file.document_range(d);
      const std::vector<std::int32_t> ids(all.begin() + begin, all.begin() + end);
      const std::string text = data_.tokenizer().decode(ids);
      EXPECT_TRUE(text.starts_with("Q") && text.ends_with(";")) << text;
    }
    std::vector<std::int32_t> masked = all;
    file.mask(0, masked);
    for (std::size_t i = 0; i < all.size(); ++i) {
      EXPECT_EQ(masked[i], is_answer(all[i]) ? all[i] : -1) << "token " << i;
      targets += masked[i] >= 0 ? 1 : 0;
    }
    EXPECT_FALSE(data_.file(0, split).is_masked());
  }
  EXPECT_EQ(report_.domains[1].train.targets + report_.domains[1].valid.targets, targets);
  EXPECT_EQ(data_.manifest().pair_template, options_.pair_template);
}

TEST_F(PairData, AnyRangeIsMaskedAndCountedAlike) {
  const TokenFile& file = data_.file(1, Split::train);
  const std::vector<std::int32_t> all = all_tokens(file);
  const std::int64_t n = file.num_tokens();
  for (std::int64_t begin = 0; begin < n; begin += 3) {
    for (const std::int64_t length : {0, 1, 5, 40, 100000}) {
      const std::int64_t end = std::min(n, begin + length);
      std::vector<std::int32_t> part(all.begin() + begin, all.begin() + end);
      file.mask(begin, part);
      std::int64_t count = 0;
      for (std::size_t i = 0; i < part.size(); ++i) {
        const std::int32_t id = all[static_cast<std::size_t>(begin) + i];
        ASSERT_EQ(part[i], is_answer(id) ? id : -1);
        count += part[i] >= 0 ? 1 : 0;
      }
      ASSERT_EQ(file.num_targets(begin, end), count) << begin << ", " << length;
    }
  }
}

TEST_F(PairData, SamplesTargetAnswersAloneAndCountThem) {
  for (const std::int64_t seq_len : {7, 48}) {
    DataConfig config;
    config.domains = {{"text", 1}, {"tasks", 3}};
    const BatchSampler sampler(data_, config, seq_len, 5);
    const auto size = static_cast<std::size_t>(seq_len);
    std::vector<std::int32_t> tokens(size + 1), targets(size), first_key(size);
    std::map<std::size_t, int> samples;
    std::int64_t answers = 0;
    for (std::int64_t i = 0; i < 400; ++i) {
      sampler.sample(i, tokens, first_key, targets);
      const std::size_t domain = sampler.place(i).domain_idx;
      ++samples[domain];
      std::int64_t count = 0;
      for (std::size_t s = 0; s < size; ++s) {
        const bool target = domain == 0 || is_answer(tokens[s + 1]);
        ASSERT_EQ(targets[s], target ? tokens[s + 1] : -1);
        count += target ? 1 : 0;
      }
      ASSERT_EQ(sampler.num_targets(i, 1), count);
      answers += count;
    }
    EXPECT_EQ(sampler.num_targets(0, 400), answers);
    // Weights share out samples: one in four is text.
    EXPECT_NEAR(samples[0], 100, 25);
    config.domains = {{"text", 1}};
    EXPECT_EQ(BatchSampler(data_, config, seq_len, 5).num_targets(3, 9), 9 * seq_len);
  }
}

TEST_F(PairData, EvaluationCountsAnswersAndTheirBytes) {
  const TokenFile& file = data_.file(1, Split::valid);
  const std::vector<std::int32_t> all = all_tokens(file);
  for (const std::int64_t seq_len : {1, 29, 100000}) {
    const EvalSampler sampler(data_, 1, {}, seq_len);
    const auto size = static_cast<std::size_t>(seq_len);
    std::vector<std::int32_t> tokens(size), targets(size), first_key(size), seen;
    std::int64_t bytes = 0;
    for (std::int64_t window = 0; window < sampler.num_windows(); ++window) {
      bytes += sampler.sample(window, tokens, targets, first_key);
      for (const std::int32_t id : targets) {
        if (id >= 0) seen.push_back(id);
      }
    }
    std::vector<std::int32_t> expected;
    std::copy_if(all.begin(), all.end(), std::back_inserter(expected), is_answer);
    EXPECT_EQ(seen, expected);
    // EOS stands for no byte.
    EXPECT_EQ(bytes, std::count_if(seen.begin(), seen.end(), [](auto id) { return id != 0; }));
  }
}

TEST_F(PairData, TheVersionSaysThatThereArePairs) {
  const auto version = [](const std::filesystem::path& dir) {
    return json::parse(testing::read_file(dir / "dataset.json"))["version"].get<int>();
  };
  EXPECT_EQ(version(options_.out), 2);
  PrepareOptions plain = options_;
  plain.out = dir_ / "plain";
  plain.domains.pop_back();
  prepare(plain);
  EXPECT_EQ(version(plain.out), 1) << "what older programs read";
  std::string file = testing::read_file(dir_ / "out" / "tasks.train.h5");
  const std::size_t at = file.find("target_spans");
  ASSERT_NE(at, std::string::npos);
  file[at] = 'T';
  dir_.write("out/tasks.train.h5", file);
  expect_failure(ExitCode::data, {"tasks.train.h5", "metadata"},
                 [&] { TokenDataset::open(options_.out); });
}

TEST_F(PairData, AnotherChoiceOfWhatIsLearnedIsOtherData) {
  const auto data_of = [&](const std::string& name, const std::string& between,
                           const std::string& how) {
    std::string lines;
    for (int i = 0; i < 5; ++i) {
      lines += json{{"prompt", fmt::format("Q{}", i)}, {"answer", between + "a"}}.dump() + "\n";
    }
    dir_.write(name + ".jsonl", lines);
    PrepareOptions options = options_;
    options.out = dir_ / name;
    options.pair_template = how;
    options.valid_fraction = 0;
    options.domains.clear();
    add_pairs_argument("tasks=" + (dir_ / (name + ".jsonl")).string(), options.domains);
    prepare(options);
    return TokenDataset::open(options.out);
  };
  const TokenDataset one = data_of("one", "", "{prompt}={answer}");
  const TokenDataset two = data_of("two", "=", "{prompt}{answer}");
  EXPECT_EQ(all_tokens(one.file(0, Split::train)), all_tokens(two.file(0, Split::train)));
  EXPECT_NE(one.fingerprint(), two.fingerprint());
}

TEST_F(PairData, TokenizersAreTrainedOnWhatIsWritten) {
  PrepareOptions spm = options_;
  spm.out = dir_ / "spm";
  spm.tokenizer = "spm:300";
  prepare(spm);
  const TokenDataset data = TokenDataset::open(spm.out, true);
  const TokenFile& file = data.file(1, Split::train);
  const std::vector<std::int32_t> all = all_tokens(file);
  std::vector<std::int32_t> learned, read;
  for (std::int64_t d = 0; d < file.num_documents(); ++d) {
    const auto [begin, end] = file.document_range(d);
    std::vector<std::int32_t> ids(all.begin() + begin, all.begin() + end);
    std::vector<std::int32_t> masked = ids;
    file.mask(begin, masked);
    const auto first = std::find_if(masked.begin(), masked.end(), [](auto id) { return id >= 0; });
    EXPECT_TRUE(std::all_of(first, masked.end(), [](auto id) { return id >= 0; }));
    const auto split = first - masked.begin();
    const std::string prompt = data.tokenizer().decode({ids.begin(), ids.begin() + split});
    const std::string answer = data.tokenizer().decode({ids.begin() + split, ids.end()});
    EXPECT_TRUE(prompt.starts_with("Q") && prompt.ends_with("=")) << prompt;
    EXPECT_TRUE(answer.ends_with(";") && answer.find('=') == std::string::npos) << answer;
  }
}

TEST_F(PairData, BadFilesAreNamedWithTheLine) {
  const auto refused = [&](const std::string& content, const std::vector<std::string>& words) {
    dir_.write("bad.jsonl", content);
    PrepareOptions bad = options_;
    bad.out = dir_ / "bad";
    bad.domains.pop_back();
    add_pairs_argument((dir_ / "bad.jsonl").string(), bad.domains);
    EXPECT_EQ(bad.domains.back().name, "pairs");
    expect_failure(ExitCode::data, words, [&] { prepare(bad); });
    EXPECT_FALSE(std::filesystem::exists(bad.out));
  };
  refused("{\"prompt\": \"p\", \"answer\": \"a\"}\n\n{\"prompt\": \"p\"}\n",
          {"bad.jsonl:3 is no pair", "no \"answer\""});
  refused("\n \n", {"holds no pair"});
  PrepareOptions cut = options_;
  cut.out = dir_ / "cut";
  cut.domains.back().rule.split_bytes = 4096;
  expect_failure(ExitCode::usage, {"\"tasks\"", "split-bytes"}, [&] { prepare(cut); });
  std::vector<DomainSource> domains = {{"text", {"a"}, {}}};
  expect_failure(ExitCode::usage, {"text already"},
                 [&] { add_pairs_argument("text=b.jsonl", domains); });
}

}  // namespace
}  // namespace arcus
