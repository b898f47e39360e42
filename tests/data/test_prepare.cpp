#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "src/data/dataset.hpp"
#include "src/data/prepare.hpp"
#include "tests/data/data_testing.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;
using testing::expect_failure;
using testing::plain_text;
using testing::random_text;
using testing::read_file;
using testing::TempDir;

std::vector<std::string> documents_of(const TokenDataset& data, std::size_t domain, Split split) {
  const TokenFile& file = data.file(domain, split);
  std::vector<std::string> documents;
  for (std::int64_t d = 0; d < file.num_documents(); ++d) {
    const auto [begin, end] = file.document_range(d);
    std::vector<std::int32_t> ids(static_cast<std::size_t>(end - begin));
    file.read(begin, ids);
    EXPECT_EQ(ids.back(), data.tokenizer().eos_id());
    EXPECT_EQ(std::count(ids.begin(), ids.end(), ids.back()), 1);
    documents.push_back(data.tokenizer().decode(ids));
  }
  return documents;
}

PrepareOptions options_for(const TempDir& dir, std::vector<DomainSource> domains) {
  PrepareOptions options;
  options.out = dir / "out";
  options.domains = std::move(domains);
  options.valid_fraction = 0.2;
  return options;
}

class PrepareKinds : public ::testing::TestWithParam<const char*> {};

/// Every document comes back whole, in order, on one side; both sides together are the text.
TEST_P(PrepareKinds, KeepsEveryDocumentOnce) {
  const TempDir dir;
  std::mt19937_64 random(1);
  std::set<std::string> written;
  for (int i = 0; i < 60; ++i) {
    const std::string text =
        plain_text(static_cast<std::uint64_t>(i), 500 + random() % 5000) + random_text(random, 50);
    dir.write("text/" + std::to_string(i), text);
    written.insert(text);
  }
  PrepareOptions options = options_for(dir, {{"prose", {(dir / "text").string()}, {}}});
  options.tokenizer = GetParam();
  const PrepareReport report = prepare(options);
  const TokenDataset data = TokenDataset::open(dir / "out", true);
  EXPECT_EQ(data.vocab_size(), report.vocab_size);
  std::set<std::string> found;
  for (const Split split : kSplits) {
    const SplitReport& counts =
        split == Split::train ? report.domains[0].train : report.domains[0].valid;
    const auto documents = documents_of(data, 0, split);
    std::int64_t bytes = 0;
    for (const std::string& text : documents) {
      bytes += static_cast<std::int64_t>(text.size());
      EXPECT_TRUE(found.insert(text).second) << "a document stands on both sides";
    }
    EXPECT_EQ(counts.documents, static_cast<std::int64_t>(documents.size()));
    EXPECT_EQ(counts.bytes, bytes);
    EXPECT_EQ(counts.tokens, data.file(0, split).num_tokens());
    EXPECT_EQ(data.file(0, split).num_bytes(), bytes);
  }
  EXPECT_EQ(found, written);
  const double share =
      static_cast<double>(report.domains[0].valid.bytes) /
      static_cast<double>(report.domains[0].valid.bytes + report.domains[0].train.bytes);
  EXPECT_NEAR(share, 0.2, 0.02);
}

TEST_P(PrepareKinds, ABigDocumentIsEncodedLikeASmallOne) {
  const TempDir dir;
  std::mt19937_64 random(2);
  std::string text;
  for (std::size_t size : {1, 4}) {  // beyond a batch of parts and a block of the scan
    text += plain_text(size, size << 20) + "\n";
    std::string line = random_text(random, 60000);
    std::erase(line, '\n');
    text += line;
  }
  dir.write("big", text);
  dir.write("small", plain_text(5, 3000));
  PrepareOptions options =
      options_for(dir, {{"d", {(dir / "big").string(), (dir / "small").string()}, {}}});
  options.tokenizer = GetParam();
  options.spm_sample_bytes = 1 << 19;
  options.valid_fraction = 0.001;
  prepare(options);
  const TokenDataset data = TokenDataset::open(dir / "out", true);
  const TokenFile& file = data.file(0, Split::train);
  ASSERT_EQ(file.num_documents(), 1);
  std::vector<std::int32_t> expected;
  data.tokenizer().encode(text, expected);
  expected.push_back(data.tokenizer().eos_id());
  std::vector<std::int32_t> ids(static_cast<std::size_t>(file.num_tokens()));
  file.read(0, ids);
  EXPECT_EQ(ids, expected);
}

INSTANTIATE_TEST_SUITE_P(Kinds, PrepareKinds, ::testing::Values("bytes", "spm:400"));

TEST(Prepare, GivesTheSameBitsAgainAndOtherSplitsForOtherSeeds) {
  const TempDir dir;
  for (int i = 0; i < 30; ++i) {
    dir.write("text/" + std::to_string(i), plain_text(static_cast<std::uint64_t>(i), 1000));
  }
  PrepareOptions options = options_for(dir, {{"a", {(dir / "text").string()}, {}}});
  options.tokenizer = "spm:300";
  prepare(options);
  options.out = dir / "again";
  prepare(options);
  options.out = dir / "other";
  options.seed = 2;
  prepare(options);
  for (const char* name : {"a.train.h5", "a.valid.h5", "dataset.json", "tokenizer.model"}) {
    EXPECT_EQ(read_file(dir / "out" / name), read_file(dir / "again" / name)) << name;
  }
  const TokenDataset one = TokenDataset::open(dir / "out");
  const TokenDataset two = TokenDataset::open(dir / "other");
  EXPECT_NE(documents_of(one, 0, Split::valid), documents_of(two, 0, Split::valid));
  EXPECT_NE(one.fingerprint(), two.fingerprint());
  EXPECT_EQ(one.fingerprint(), TokenDataset::open(dir / "again").fingerprint());
}

TEST(Prepare, HeldOutDocumentsDoNotDependOnPaths) {
  const TempDir dir;
  for (int i = 0; i < 20; ++i) {
    const std::string text = plain_text(static_cast<std::uint64_t>(i), 1000);
    dir.write("one/" + std::to_string(i), text);
    dir.write("two/" + std::to_string(100 - i), text);
  }
  std::set<std::string> held_out[2];
  for (int i = 0; i < 2; ++i) {
    PrepareOptions options =
        options_for(dir, {{"a", {(dir / (i == 0 ? "one" : "two")).string()}, {}}});
    options.out = dir / ("out" + std::to_string(i));
    prepare(options);
    for (const auto& text : documents_of(TokenDataset::open(options.out), 0, Split::valid)) {
      held_out[i].insert(text);
    }
  }
  EXPECT_FALSE(held_out[0].empty());
  EXPECT_EQ(held_out[0], held_out[1]);
}

TEST(Prepare, DropsDuplicatesAcrossFilesAndDomains) {
  const TempDir dir;
  for (int i = 0; i < 20; ++i) {
    const auto text = plain_text(static_cast<std::uint64_t>(i % 10), 1000);
    dir.write("a/" + std::to_string(i), text);
    dir.write("b/" + std::to_string(i),
              i < 3 ? text : plain_text(static_cast<std::uint64_t>(100 + i), 900));
  }
  const PrepareReport report = prepare(
      options_for(dir, {{"a", {(dir / "a").string()}, {}}, {"b", {(dir / "b").string()}, {}}}));
  EXPECT_EQ(report.domains[0].duplicates, 10);
  EXPECT_EQ(report.domains[1].duplicates, 3);
  EXPECT_GT(report.domains[1].duplicate_bytes, 3000);
  const TokenDataset data = TokenDataset::open(dir / "out");
  std::set<std::string> seen;
  std::size_t count = 0;
  for (std::size_t domain = 0; domain < 2; ++domain) {
    for (const Split split : kSplits) {
      for (const auto& text : documents_of(data, domain, split)) {
        seen.insert(text);
        ++count;
      }
    }
  }
  EXPECT_EQ(count, 27U);
  EXPECT_EQ(seen.size(), count);
}

TEST(Prepare, EverySideGetsADocumentWhereThereAreTwo) {
  for (const double fraction : {0.001, 0.5, 0.999}) {
    const TempDir dir;
    dir.write("text/1", plain_text(1, 1000));
    dir.write("text/2", plain_text(2, 90000));
    PrepareOptions options = options_for(dir, {{"a", {(dir / "text").string()}, {}}});
    options.valid_fraction = fraction;
    const PrepareReport report = prepare(options);
    EXPECT_EQ(report.domains[0].train.documents, 1) << fraction;
    EXPECT_EQ(report.domains[0].valid.documents, 1) << fraction;
  }
}

TEST(Prepare, ASingleDocumentIsCutAtAParagraphAndSaysSo) {
  const TempDir dir;
  const std::string text = plain_text(1, 50000);
  dir.write("text", text);
  const PrepareReport report = prepare(options_for(dir, {{"a", {(dir / "text").string()}, {}}}));
  ASSERT_EQ(report.domains[0].notes.size(), 1U);
  EXPECT_NE(report.domains[0].notes[0].find("one document"), std::string::npos);
  const TokenDataset data = TokenDataset::open(dir / "out");
  const std::string train = documents_of(data, 0, Split::train).at(0);
  EXPECT_EQ(train + documents_of(data, 0, Split::valid).at(0), text);
  EXPECT_TRUE(train.ends_with("\n\n"));
  EXPECT_NEAR(static_cast<double>(train.size()) / static_cast<double>(text.size()), 0.8, 0.02);
}

TEST(Prepare, NothingIsHeldOutOfOneCharacterOrAtFractionZero) {
  const TempDir dir;
  dir.write("text", "\xE4\xB8\xAD");
  PrepareReport report = prepare(options_for(dir, {{"a", {(dir / "text").string()}, {}}}));
  EXPECT_EQ(report.domains[0].valid.tokens, 0);
  EXPECT_EQ(report.domains[0].notes.size(), 1U);
  dir.write("more", plain_text(1, 5000));
  PrepareOptions options =
      options_for(dir, {{"a", {(dir / "text").string(), (dir / "more").string()}, {}}});
  options.out = dir / "zero";
  options.valid_fraction = 0;
  report = prepare(options);
  EXPECT_EQ(report.domains[0].train.documents, 2);
  EXPECT_EQ(TokenDataset::open(dir / "zero", true).file(0, Split::valid).num_tokens(), 0);
}

TEST(Prepare, RulesCutDocuments) {
  const TempDir dir;
  dir.write("fortunes", "one\n%\ntwo\n%\nthree\n%\nfour\n%\nfive\n");
  dir.write("book", plain_text(3, 100000));
  const PrepareReport report =
      prepare(options_for(dir, {{"f", {(dir / "fortunes").string()}, {"%", 0}},
                                {"b", {(dir / "book").string()}, {"", 4096}}}));
  EXPECT_EQ(report.domains[0].train.documents + report.domains[0].valid.documents, 5);
  EXPECT_EQ(report.domains[0].train.bytes + report.domains[0].valid.bytes, 4 + 4 + 6 + 5 + 5);
  EXPECT_GT(report.domains[1].train.documents, 12);
  EXPECT_GT(report.domains[1].valid.documents, 1);
}

TEST(Prepare, NamesBadFilesAndOffsets) {
  const TempDir dir;
  const struct {
    const char* name;
    std::string content;
    std::vector<std::string> words;
  } cases[] = {{"empty", "", {"empty"}},
               {"binary", std::string("abc\0def", 7), {"NUL", "offset 3"}},
               {"latin", "caf\xE9 noir", {"UTF-8", "0xe9", "offset 3"}},
               {"cut", "ab\xE4\xB8", {"UTF-8", "offset 2"}},
               {"far", std::string((4 << 20) - 1, 'x') + "\xE4\xB8\xAD\xFF", {"offset 4194306"}},
               {"late", "fine\n%\n\xFF", {"offset 7"}},
               {"marks", "%\n%\n", {"separators"}}};
  for (const auto& bad : cases) {
    const std::string path = dir.write(bad.name, bad.content);
    auto words = bad.words;
    words.push_back(path);
    expect_failure(ExitCode::data, words, [&] {
      prepare(options_for(dir, {{"a", {path}, {"%", 0}}}));
    });
    EXPECT_FALSE(fs::exists(dir / "out"));
    EXPECT_FALSE(fs::exists(dir / "out.partial"));
  }
  expect_failure(ExitCode::data, {"no file"}, [&] {
    prepare(options_for(dir, {{"a", {(dir / "absent").string()}, {}}}));
  });
}

TEST(Prepare, SkipsBadFilesWhenAskedTo) {
  const TempDir dir;
  dir.write("text/empty", "");
  dir.write("text/binary", std::string("a\n%\nbc\0def", 10));
  dir.write("text/latin", "caf\xE9");
  for (int i = 0; i < 5; ++i) {
    dir.write("text/good" + std::to_string(i), plain_text(static_cast<std::uint64_t>(i), 500));
  }
  PrepareOptions options = options_for(dir, {{"a", {(dir / "text").string()}, {"%", 0}}});
  options.skip_bad = true;
  const PrepareReport report = prepare(options);
  EXPECT_EQ(report.domains[0].bad_files, 3);
  EXPECT_EQ(report.domains[0].files, 5);
  EXPECT_EQ(report.domains[0].notes.size(), 3U);
  EXPECT_EQ(report.domains[0].train.documents + report.domains[0].valid.documents, 5);
  const PrepareOptions all_bad =
      options_for(dir, {{"a", {(dir / "text/latin").string(), (dir / "text/empty").string()}, {}}});
  fs::remove_all(dir / "out");
  PrepareOptions skipping = all_bad;
  skipping.skip_bad = true;
  expect_failure(ExitCode::data, {"no text left", "2 files"}, [&] { prepare(skipping); });
}

TEST(Prepare, RefusesBadOptions) {
  const TempDir dir;
  const std::string path = dir.write("text", plain_text(1, 1000));
  const auto with = [&](const std::function<void(PrepareOptions&)>& change) {
    PrepareOptions options = options_for(dir, {{"a", {path}, {}}});
    change(options);
    return [options] { prepare(options); };
  };
  const auto usage = ExitCode::usage;
  expect_failure(usage, {"words", "spm:VOCAB"}, with([](auto& o) { o.tokenizer = "words"; }));
  expect_failure(usage, {"spm:12x"}, with([](auto& o) { o.tokenizer = "spm:12x"; }));
  expect_failure(usage, {"valid-fraction 1"}, with([](auto& o) { o.valid_fraction = 1; }));
  expect_failure(usage, {"valid-fraction"}, with([](auto& o) { o.valid_fraction = std::nan(""); }));
  expect_failure(usage, {"a/b"}, with([](auto& o) { o.domains[0].name = "a/b"; }));
  expect_failure(usage, {"twice"}, with([](auto& o) { o.domains.push_back(o.domains[0]); }));
  expect_failure(usage, {"no files"}, with([](auto& o) { o.domains[0].paths.clear(); }));
  expect_failure(usage, {"split-bytes 5"},
                 with([](auto& o) { o.domains[0].rule.split_bytes = 5; }));
  expect_failure(usage, {"--domain"}, with([](auto& o) { o.domains.clear(); }));
}

TEST(Prepare, KeepsWhatIsThereUnlessForced) {
  const TempDir dir;
  const std::string path = dir.write("text", plain_text(1, 5000));
  PrepareOptions options = options_for(dir, {{"a", {path}, {}}});
  fs::create_directories(dir / "out");  // an empty folder is no loss
  prepare(options);
  const std::string before = read_file(dir / "out/dataset.json");
  options.seed = 9;
  options.domains[0].name = "b";
  expect_failure(ExitCode::data, {"exists", "--force"}, [&] { prepare(options); });
  EXPECT_EQ(read_file(dir / "out/dataset.json"), before);
  options.force = true;
  prepare(options);
  EXPECT_EQ(TokenDataset::open(dir / "out", true).domains(), std::vector<std::string>{"b"});
  EXPECT_FALSE(fs::exists(dir / "out/a.train.h5"));
  EXPECT_FALSE(fs::exists(dir / "out.old"));
  options.out = dir / "precious";
  dir.write("precious/thesis", "years of work");
  expect_failure(ExitCode::data, {"no data set"}, [&] { prepare(options); });
  EXPECT_EQ(read_file(dir / "precious/thesis"), "years of work");
}

TEST(Prepare, ReplacesWhatAnInterruptedRunLeft) {
  const TempDir dir;
  dir.write("out.partial/a.train.h5.spool", "half a spool");
  prepare(options_for(dir, {{"a", {dir.write("text", plain_text(1, 5000))}, {}}}));
  EXPECT_FALSE(fs::exists(dir / "out.partial"));
  EXPECT_FALSE(fs::exists(dir / "out/a.train.h5.spool"));
}

TEST(Prepare, ReportsProgressUpToTheEnd) {
  const TempDir dir;
  dir.write("a/1", plain_text(1, 9 << 20));
  dir.write("b/1", plain_text(2, 5000));
  std::vector<PrepareProgress> calls;
  prepare(options_for(dir, {{"a", {(dir / "a").string()}, {}}, {"b", {(dir / "b").string()}, {}}}),
          [&](const PrepareProgress& progress) { calls.push_back(progress); });
  ASSERT_GT(calls.size(), 6U);
  std::map<std::string, std::int64_t> done;
  std::set<std::string> domains;
  for (const PrepareProgress& call : calls) {
    EXPECT_GE(call.bytes_done, done[call.stage]);
    EXPECT_LE(call.bytes_done, call.bytes_total);
    done[call.stage] = call.bytes_done;
    domains.insert(call.domain);
  }
  EXPECT_EQ(done.size(), 2U);
  EXPECT_EQ(calls.back().bytes_done, calls.back().bytes_total);
  EXPECT_EQ(domains, (std::set<std::string>{"a", "b"}));
}

TEST(Prepare, DomainArgumentsCollectPaths) {
  std::vector<DomainSource> domains;
  for (const char* argument : {"code=/a", "/b=c/d", "prose=x=y", "code=/e"}) {
    add_domain_argument(argument, domains);
  }
  ASSERT_EQ(domains.size(), 2U);
  EXPECT_EQ(domains[0].paths, (std::vector<std::string>{"/a", "/b=c/d", "/e"}));
  EXPECT_EQ(domains[1].paths, std::vector<std::string>{"x=y"});
  std::vector<DomainSource> none;
  expect_failure(ExitCode::usage, {"NAME=PATH"}, [&] { add_domain_argument("/a", none); });
}

}  // namespace
}  // namespace arcus
