#include <gtest/gtest.h>

#include "src/data/documents.hpp"
#include "tests/data/data_testing.hpp"

namespace arcus {
namespace {

using testing::expect_failure;
using testing::random_text;
using testing::TempDir;

std::vector<std::string> cut(const std::string& text, const DocumentRule& rule) {
  std::vector<std::string> documents;
  cut_documents(text, rule, [&](std::size_t begin, std::size_t end) {
    documents.push_back(text.substr(begin, end - begin));
  });
  return documents;
}

using Texts = std::vector<std::string>;

TEST(Documents, AFileIsOneDocumentByDefault) {
  EXPECT_EQ(cut("a\n%\nb\n\n\nc", {}), Texts{"a\n%\nb\n\n\nc"});
  EXPECT_EQ(cut("", {}), Texts{});
}

TEST(Documents, SeparatorLinesStandBetweenDocuments) {
  const DocumentRule rule{"%", 0};
  EXPECT_EQ(cut("a\nb\n%\nc %\n%d\n%\n", rule), (Texts{"a\nb\n", "c %\n%d\n"}));
  EXPECT_EQ(cut("%\n%\na\r\n%\r\nb\n%", rule), (Texts{"a\r\n", "b\n"}));
  EXPECT_EQ(cut("%%\n%", rule), (Texts{"%%\n"}));
  EXPECT_EQ(cut("%\n", rule), Texts{});
  EXPECT_EQ(cut("x\n<|end|>\ny", {"<|end|>", 0}), (Texts{"x\n", "y"}));
}

TEST(Documents, LargeOnesAreCutAtParagraphs) {
  const std::string paragraph = "0123456789\nabcdefgh\n\n";
  std::string text;
  for (int i = 0; i < 10; ++i) text += paragraph;
  const auto documents = cut(text, {"", 32});
  EXPECT_EQ(documents.size(), 5U);
  for (const std::string& document : documents) EXPECT_TRUE(document.ends_with("\n\n"));
}

TEST(Documents, WithoutParagraphsTheyAreCutAtLinesAndWithoutLinesAtCodePoints) {
  std::string lines;
  for (int i = 0; i < 40; ++i) lines += "one line\n";
  for (const std::string& document : cut(lines, {"", 64})) EXPECT_EQ(document.back(), '\n');
  std::string wide;
  for (int i = 0; i < 200; ++i) wide += "\xE4\xB8\xAD";
  const auto documents = cut(wide, {"", 64});
  EXPECT_GT(documents.size(), 3U);
  for (const std::string& document : documents) EXPECT_EQ(document.size() % 3, 0U);
}

TEST(Documents, CuttingLosesNothing) {
  std::mt19937_64 random(3);
  for (int i = 0; i < 300; ++i) {
    const std::string text = random_text(random, random() % 400);
    const auto step = static_cast<std::int64_t>(16 + random() % 100);
    std::string joined;
    for (const std::string& document : cut(text, {"", step})) {
      EXPECT_FALSE(document.empty());
      EXPECT_LE(static_cast<std::int64_t>(document.size()), 2 * step);
      joined += document;
    }
    ASSERT_EQ(joined, text);
  }
}

Texts names(const std::vector<std::filesystem::path>& files) {
  Texts result;
  for (const auto& file : files) result.push_back(file.filename().string());
  return result;
}

TEST(Paths, FilesFoldersAndGlobs) {
  const TempDir dir;
  for (const char* name :
       {"b.txt", "a.txt", "sub/c.h", "sub/deep/d.h", ".git/x.h", "sub/.hidden"}) {
    dir.write(name, "text");
  }
  std::filesystem::create_symlink(dir / "nowhere", dir / "sub/dangling");
  const std::string root = (dir / "").string();
  EXPECT_EQ(names(expand_paths({root})), (Texts{"a.txt", "b.txt", "c.h", "d.h"}));
  EXPECT_EQ(names(expand_paths({root + "*.txt"})), (Texts{"a.txt", "b.txt"}));
  EXPECT_EQ(names(expand_paths({root + "**/*.h"})), (Texts{"c.h", "d.h"}));
  EXPECT_EQ(names(expand_paths({root + "s*b"})), (Texts{"c.h", "d.h"}));
  EXPECT_EQ(names(expand_paths({root + "a.txt", root + "a.txt", root + "sub/c.h"})),
            (Texts{"a.txt", "c.h"}));
  for (const std::string& entry : {root + "none.txt", root + "*.md", root + "**/*.py"}) {
    expect_failure(ExitCode::data, {entry}, [&] { expand_paths({entry}); });
  }
}

}  // namespace
}  // namespace arcus
