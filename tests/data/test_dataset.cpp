#include <gtest/gtest.h>

#include <numeric>

#include "src/base/hash.hpp"
#include "src/base/hdf5.hpp"
#include "src/data/dataset.hpp"
#include "src/data/prepare.hpp"
#include "src/data/sampler.hpp"
#include "tests/data/data_testing.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;
using testing::expect_failure;
using testing::plain_text;
using testing::read_file;
using testing::TempDir;

/// A folder with a small data set of two domains.
class Dataset : public ::testing::Test {
 protected:
  void make(const std::string& tokenizer = "bytes", std::uint64_t seed = 0) {
    for (int i = 0; i < 8; ++i) {
      dir_.write("a/" + std::to_string(i), plain_text(seed + static_cast<std::uint64_t>(i), 800));
      dir_.write("b/" + std::to_string(i), plain_text(static_cast<std::uint64_t>(50 + i), 400));
    }
    PrepareOptions options;
    options.out = out();
    options.tokenizer = tokenizer;
    options.valid_fraction = 0.25;
    options.domains = {{"a", {(dir_ / "a").string()}, {}}, {"b", {(dir_ / "b").string()}, {}}};
    prepare(options);
  }
  fs::path out() const { return dir_ / "out"; }
  void expect_damage(const std::vector<std::string>& words, bool verify = false) const {
    expect_failure(ExitCode::data, words, [&] { TokenDataset::open(out(), verify); });
  }
  void overwrite(const std::string& name, const std::string& content) const {
    std::ofstream(out() / name, std::ios::binary | std::ios::trunc) << content;
  }

  TempDir dir_;
};

TEST_F(Dataset, KnowsItsDomainsAndTokens) {
  make();
  const TokenDataset data = TokenDataset::open(out(), true);
  EXPECT_EQ(data.domains(), (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(data.domain_idx("b"), 1U);
  EXPECT_EQ(data.vocab_size(), 256);
  expect_failure(ExitCode::usage, {"\"c\"", "a, b"}, [&] { data.domain_idx("c"); });
  const TokenFile& file = data.file(0, Split::train);
  EXPECT_EQ(file.num_tokens(), file.num_bytes() + file.num_documents());
  for (std::int64_t d = 0; d < file.num_documents(); ++d) {
    const auto [begin, end] = file.document_range(d);
    for (const std::int64_t index : {begin, begin + (end - begin) / 2, end - 1}) {
      EXPECT_EQ(file.document_begin(index), begin);
    }
  }
  EXPECT_THROW(file.document_begin(file.num_tokens()), Error);
  std::vector<std::int32_t> out_of_range(2);
  EXPECT_THROW(file.read(file.num_tokens() - 1, out_of_range), Error);
  EXPECT_THROW(file.read(-1, out_of_range), Error);
}

TEST_F(Dataset, NamesMissingFoldersAndFiles) {
  expect_damage({"no folder", "arcus prepare"});
  fs::create_directories(out());
  expect_damage({"dataset.json", "arcus prepare"});
  make();
  fs::remove(out() / "b.valid.h5");
  expect_damage({"b.valid.h5", "missing"});
}

TEST_F(Dataset, NamesTruncatedAndGrownFiles) {
  make();
  const auto path = out() / "a.train.h5";
  const auto bytes = fs::file_size(path);
  for (const auto size : {bytes - 1, bytes / 2, std::uintmax_t{0}}) {
    fs::resize_file(path, size);
    expect_damage({"a.train.h5", "truncated", std::to_string(size), std::to_string(bytes)});
  }
  fs::resize_file(path, bytes + 1);
  expect_damage({"a.train.h5", "another file"});
}

TEST_F(Dataset, NamesAnotherVersion) {
  make();
  std::string text = read_file(out() / "dataset.json");
  const std::string version = "\"version\": 1";
  ASSERT_NE(text.find(version), std::string::npos);
  text.replace(text.find(version), version.size(), "\"version\": 7");
  overwrite("dataset.json", text);
  expect_damage({"dataset.json", "version 7", "version 1"});
}

TEST_F(Dataset, NamesFilesOfAnotherDataSet) {
  make();
  const fs::path first = dir_ / "first";
  fs::rename(out(), first);
  make("bytes", 90);
  fs::copy_file(first / "a.train.h5", out() / "a.train.h5", fs::copy_options::overwrite_existing);
  expect_damage({"a.train.h5"});
}

/// A flipped bit anywhere is an error, in tokens with `verify`; never a crash or a hang.
TEST_F(Dataset, EveryFlippedBitIsFound) {
  make("spm:300");
  std::mt19937_64 random(1);
  for (const auto& entry : fs::directory_iterator(out())) {
    const std::string name = entry.path().filename().string();
    const std::string good = read_file(entry.path());
    for (int i = 0; i < 150; ++i) {
      std::string bad = good;
      // The first kilobytes are HDF5's own structures.
      const std::size_t at =
          random() % (i % 2 == 0 ? std::min<std::size_t>(4096, bad.size()) : bad.size());
      bad[at] = static_cast<char>(bad[at] ^ (1 << random() % 8));
      if (name == "dataset.json" && std::isspace(static_cast<unsigned char>(bad[at])) != 0 &&
          std::isspace(static_cast<unsigned char>(good[at])) != 0) {
        continue;  // one blank for another means the same
      }
      overwrite(name, bad);
      expect_damage({name.ends_with("h5") ? name : "data"}, true);
    }
    overwrite(name, good);
  }
  TokenDataset::open(out(), true);
}

TEST_F(Dataset, FlippedTokensNameTheTensorOnlyWhenVerified) {
  make();
  const std::int64_t offset = TokenDataset::open(out()).manifest().domains[0].train.tokens_offset;
  std::string content = read_file(out() / "a.train.h5");
  content[static_cast<std::size_t>(offset) + 11] ^= 1;  // high byte of token 5
  overwrite("a.train.h5", content);
  expect_damage({"a.train.h5", "tensor tokens"}, true);
  const TokenDataset data = TokenDataset::open(out());
  std::vector<std::int32_t> tokens(10);
  expect_failure(ExitCode::data, {"a.train.h5", "vocabulary"},
                 [&] { data.file(0, Split::train).read(0, tokens); });
  data.file(0, Split::train).read(6, tokens);
}

TEST_F(Dataset, LargeVocabulariesTakeFourBytes) {
  FileRecord record{.dtype = DType::u32, .num_tokens = 3, .tokens_offset = 8};
  EXPECT_EQ(record.tokens_end(), 20);
}

/// More than 2^31 tokens: the file is sparse, only its ends hold tokens.
TEST_F(Dataset, PlacesBeyondTwoToThe31AreReached) {
  constexpr std::int64_t kTokens = (std::int64_t{1} << 31) + 5000;
  constexpr std::int64_t kTail = 4000;
  make();
  Manifest manifest = Manifest::load(out());
  manifest.domains.resize(1);
  FileRecord& record = manifest.domains[0].train;
  {
    h5::File file = h5::File::create(out() / record.file, ExitCode::data);
    file.write_attribute("tokenizer_xxh3", hex(manifest.tokenizer_hash));
    const std::vector<std::int64_t> offsets{0, kTokens - 10, kTokens};
    file.write("document_offsets", {3}, offsets.data());
    h5::Dataset tokens = file.create_dataset("tokens", DType::u16, {kTokens});
    std::vector<std::uint16_t> tail(kTail);
    std::iota(tail.begin(), tail.end(), 1);
    for (auto& token : tail) token = static_cast<std::uint16_t>(token % 255 + 1);
    tail[kTail - 11] = 0;
    tokens.write_rows(kTokens - kTail, kTail, tail.data());
    record.tokens_offset = tokens.offset();
  }
  record.num_tokens = kTokens;
  record.num_documents = 2;
  record.file_bytes = static_cast<std::int64_t>(fs::file_size(out() / record.file));
  record.metadata_hash =
      hash_file_without(out() / record.file, record.tokens_offset, record.tokens_end());
  manifest.save(out());

  const TokenDataset data = TokenDataset::open(out());
  const TokenFile& file = data.file(0, Split::train);
  EXPECT_EQ(file.num_tokens(), kTokens);
  EXPECT_EQ(file.document_begin(kTokens - 11), 0);
  EXPECT_EQ(file.document_begin(kTokens - 10), kTokens - 10);
  std::vector<std::int32_t> last(20);
  file.read(kTokens - 20, last);
  for (std::int64_t i = 0; i < 20; ++i) {
    const std::int64_t place = kTail - 20 + i;
    EXPECT_EQ(last[static_cast<std::size_t>(i)], i == 9 ? 0 : (place + 1) % 255 + 1);
  }
  // The sampler reaches the windows at the end.
  const std::int64_t seq_len = 1000;
  const BatchSampler sampler(data, {}, seq_len, 1);
  EXPECT_EQ(sampler.num_windows(0), (kTokens - 1) / seq_len);
  std::int64_t far = 0;
  for (std::int64_t i = 0; i < 2000; ++i) {
    far = std::max(far, (sampler.place(i).window + 1) * seq_len);
  }
  EXPECT_GT(far, std::int64_t{2040} << 20);
  EXPECT_LT(far, kTokens);
}

}  // namespace
}  // namespace arcus
