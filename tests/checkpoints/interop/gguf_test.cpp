#include <fmt/format.h>
#include <gtest/gtest.h>

#include "tests/checkpoints/interop/expect.hpp"
#include "tests/checkpoints/interop/small_files.hpp"
#include "tests/support/temporary_folder.hpp"

namespace arcus::test {
namespace {

namespace fs = std::filesystem;
using testing::TemporaryFolder;

/// Numbers of the format.
enum Kind : std::uint32_t {
  kU8,
  kI8,
  kU16,
  kI16,
  kU32,
  kI32,
  kF32,
  kBool,
  kText,
  kArray,
  kU64,
  kI64,
  kF64
};
constexpr std::uint32_t kTypeF32 = 0;
constexpr std::uint32_t kTypeQ8_0 = 8;

class Gguf : public ::testing::Test {
 protected:
  /// The message for a file of these bytes, without its name, which has to be there.
  std::string refused(std::string_view bytes) const {
    write_file(path_, bytes);
    const std::string message = error_of([&] { GgufFile{path_}; });
    EXPECT_TRUE(message.starts_with(path_.string())) << message;
    return message.substr(std::min(message.size(), path_.string().size()));
  }
  std::string refused(const GgufBytes& file) const { return refused(file.bytes()); }
  /// The message for a file with one key, whose type and value these bytes are.
  std::string key_refused(const GgufBytes& value) const {
    return refused(GgufBytes::begin(0, 1).text("k").raw(value.bytes()));
  }
  /// The message for a file with one tensor and `data_bytes` bytes of data.
  std::string tensor_refused(const std::vector<std::uint64_t>& dims, std::uint32_t type,
                             std::uint64_t offset, std::size_t data_bytes = 64) const {
    return refused(GgufBytes::begin(1, 0)
                       .tensor("a.weight", dims, type, offset)
                       .pad()
                       .raw(std::string(data_bytes, 'x')));
  }

  TemporaryFolder folder_;
  fs::path path_ = folder_.path() / "model.gguf";
};

TEST_F(Gguf, ComesBackAsItWasWritten) {
  std::size_t tensors = 0;
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    const auto contents = random_tensors(seed, true);
    const GgufKeys keys = seed % 3 == 0 ? GgufKeys{} : random_keys(seed);
    write_gguf(path_, keys, contents);
    const GgufFile file(path_);
    EXPECT_EQ(file.keys(), (std::map<std::string, GgufValue>(keys.begin(), keys.end())));
    ASSERT_EQ(file.tensors().size(), contents.size());
    for (std::size_t i = 0; i < contents.size(); ++i) {
      const FileTensor& found = file.tensors()[i];
      EXPECT_EQ(found.name, contents[i].tensor.name);
      EXPECT_EQ(found.type, contents[i].tensor.type);
      const auto& shape = contents[i].tensor.shape;
      EXPECT_EQ(found.shape, shape.empty() ? std::vector<std::int64_t>{1} : shape);
      EXPECT_EQ(found.offset % 32, 0);
      EXPECT_EQ(file.bytes(found), contents[i].bytes);
      ++tensors;
    }
    EXPECT_EQ(fs::file_size(path_) % 32, 0U);
  }
  EXPECT_GT(tensors, 500U);
}

TEST_F(Gguf, IsWrittenAsTheFormatSays) {
  write_gguf(path_,
             {{"general.architecture", std::string("llama")},
              {"n", std::uint32_t{7}},
              {"t", std::vector<std::string>{"a", ""}},
              {"b", true}},
             {{{.name = "x.weight", .shape = {2, 3}}, std::string(24, 'x')},
              {{.name = "y", .type = FileType::q8_0, .shape = {32}}, std::string(34, 'y')},
              {{.name = "z", .type = FileType::bf16, .shape = {}}, "zz"}});
  GgufBytes wanted = GgufBytes::begin(3, 4);
  wanted.text("general.architecture").u32(kText).text("llama");
  wanted.text("n").u32(kU32).u32(7);
  wanted.text("t").u32(kArray).u32(kText).u64(2).text("a").text("");
  wanted.text("b").u32(kBool).number(std::uint8_t{1});
  wanted.tensor("x.weight", {3, 2}, 0, 0).tensor("y", {32}, 8, 32).tensor("z", {1}, 30, 96).pad();
  wanted.raw(std::string(24, 'x')).pad().raw(std::string(34, 'y')).pad().raw("zz").pad();
  EXPECT_EQ(read_file(path_), wanted.bytes());
}

TEST_F(Gguf, OtherOrdersAlignmentsAndAMissingPaddingAreRead) {
  // Version 2, alignment 8, data in another order than descriptions, nothing behind the last byte.
  GgufBytes bytes = GgufBytes().raw("GGUF").u32(2).u64(4).u64(1);
  bytes.text("general.alignment").u32(kU32).u32(8);
  bytes.tensor("late", {3}, 1, 8).tensor("early", {1, 2}, 30, 0).tensor("none", {0, 5}, 0, 8);
  bytes.tensor("one", {}, 0, 16);
  bytes.pad(8).raw("earl").pad(8).raw("latest").pad(8).raw("1234");
  write_file(path_, bytes.bytes());
  const GgufFile file(path_);
  EXPECT_EQ(file.bytes(*file.find("early")), "earl");
  EXPECT_EQ(file.bytes(*file.find("late")), "latest");
  EXPECT_EQ(file.find("early")->shape, (std::vector<std::int64_t>{2, 1}));
  EXPECT_EQ(file.bytes(*file.find("none")), "");
  EXPECT_EQ(file.bytes(*file.find("one")), "1234");
  EXPECT_EQ(file.find("one")->shape, std::vector<std::int64_t>{});
  EXPECT_EQ(file.find("none")->shape, (std::vector<std::int64_t>{5, 0}));
}

TEST_F(Gguf, KeysConvertWhereTheyFit) {
  write_gguf(path_,
             {{"u8", std::uint8_t{200}},
              {"i16", std::int16_t{-5}},
              {"u64", ~std::uint64_t{0}},
              {"i64", std::int64_t{-1} << 62},
              {"f32", 0.5F},
              {"f64", 1e300},
              {"b", true},
              {"t", std::string("text")},
              {"u32s", std::vector<std::uint32_t>{4'000'000'000}},
              {"i32s", std::vector<std::int32_t>{-1}},
              {"i64s", std::vector<std::int64_t>{1LL << 40}},
              {"f32s", std::vector<float>{1.5F}},
              {"f64s", std::vector<double>{0.25}},
              {"huge", std::vector<double>{1e300}},
              {"ts", std::vector<std::string>{"a", "b"}}},
             {});
  const GgufFile file(path_);
  EXPECT_TRUE(file.has("u8"));
  EXPECT_FALSE(file.has("u9"));
  EXPECT_EQ(file.integer("u8"), 200);
  EXPECT_EQ(file.integer("i16"), -5);
  EXPECT_EQ(file.integer("i64"), std::int64_t{-1} << 62);
  EXPECT_EQ(file.number("f32"), 0.5);
  EXPECT_EQ(file.number("f64"), 1e300);
  EXPECT_EQ(file.number("u8"), 200.0);
  EXPECT_EQ(file.flag("b"), true);
  EXPECT_EQ(file.text("t"), "text");
  EXPECT_EQ(file.integers("u32s"), (std::vector<std::int64_t>{4'000'000'000}));
  EXPECT_EQ(file.integers("i32s"), (std::vector<std::int64_t>{-1}));
  EXPECT_EQ(file.integers("i64s"), (std::vector<std::int64_t>{1LL << 40}));
  EXPECT_EQ(file.integers("i16"), (std::vector<std::int64_t>{-5}));
  EXPECT_EQ(file.numbers("f32s"), (std::vector<float>{1.5F}));
  EXPECT_EQ(file.numbers("f64s"), (std::vector<float>{0.25F}));
  EXPECT_EQ(file.numbers("f32"), (std::vector<float>{0.5F}));
  EXPECT_EQ(file.texts("ts"), (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(file.integer("none", 3), 3);
  EXPECT_EQ(file.number("none", 3.5), 3.5);
  EXPECT_EQ(file.flag("none", false), false);
  EXPECT_EQ(file.text("none", "x"), "x");
  EXPECT_EQ(file.integer("u8", 3), 200);
  const std::string name = path_.string();
  EXPECT_EQ(error_of([&] { file.integer("none"); }), name + " lacks the key none");
  EXPECT_EQ(error_of([&] { file.number("none"); }), name + " lacks the key none");
  EXPECT_EQ(error_of([&] { file.flag("none"); }), name + " lacks the key none");
  EXPECT_EQ(error_of([&] { file.text("none"); }), name + " lacks the key none");
  EXPECT_EQ(error_of([&] { file.integers("none"); }), name + " lacks the key none");
  EXPECT_EQ(error_of([&] { file.numbers("none"); }), name + " lacks the key none");
  EXPECT_EQ(error_of([&] { file.texts("none"); }), name + " lacks the key none");
  EXPECT_EQ(error_of([&] { file.integer("f32", 3); }),
            name + ": the key f32 is f32, not an integer");
  EXPECT_EQ(error_of([&] { file.integer("b"); }), name + ": the key b is bool, not an integer");
  EXPECT_EQ(error_of([&] { file.number("t"); }), name + ": the key t is text, not a number");
  EXPECT_EQ(error_of([&] { file.flag("u8"); }), name + ": the key u8 is u8, not true or false");
  EXPECT_EQ(error_of([&] { file.text("ts"); }),
            name + ": the key ts is an array of text, not a text");
  EXPECT_EQ(error_of([&] { file.integers("f32s"); }),
            name + ": the key f32s is an array of f32, not an array of integers");
  EXPECT_EQ(error_of([&] { file.numbers("i32s"); }),
            name + ": the key i32s is an array of i32, not an array of floats");
  EXPECT_EQ(error_of([&] { file.texts("t"); }),
            name + ": the key t is text, not an array of texts");
  EXPECT_EQ(error_of([&] { file.integer("u64"); }),
            name + ": the key u64 is 18446744073709551615, beyond 2^63");
  EXPECT_CONTAINS(error_of([&] { file.numbers("huge"); }), "holds 1e+300, too large for a float");
}

TEST_F(Gguf, NarrowArraysAreReadAs32Bits) {
  GgufBytes bytes = GgufBytes::begin(0, 5);
  bytes.text("u8").u32(kArray).u32(kU8).u64(2).raw("\xff\x01");
  bytes.text("i8").u32(kArray).u32(kI8).u64(2).raw("\xff\x01");
  bytes.text("u16").u32(kArray).u32(kU16).u64(1).raw("\xff\xff");
  bytes.text("i16").u32(kArray).u32(kI16).u64(1).raw("\xff\xff");
  bytes.text("u64").u32(kArray).u32(kU64).u64(1).u64(1ULL << 40);
  write_file(path_, bytes.bytes());
  const GgufFile file(path_);
  EXPECT_EQ(file.keys().at("u8"), GgufValue(std::vector<std::uint32_t>{255, 1}));
  EXPECT_EQ(file.keys().at("i8"), GgufValue(std::vector<std::int32_t>{-1, 1}));
  EXPECT_EQ(file.keys().at("u16"), GgufValue(std::vector<std::uint32_t>{65535}));
  EXPECT_EQ(file.keys().at("i16"), GgufValue(std::vector<std::int32_t>{-1}));
  EXPECT_EQ(file.keys().at("u64"), GgufValue(std::vector<std::int64_t>{1LL << 40}));
}

TEST_F(Gguf, AnyBlocksOfATensorReadAsFloats) {
  std::string bytes;
  for (int i = 0; i < 6 * 34; ++i) bytes += static_cast<char>(i * 37);
  write_gguf(path_, {}, {{{.name = "x", .type = FileType::q8_0, .shape = {2, 96}}, bytes}});
  const GgufFile file(path_);
  std::vector<float> whole(192);
  file.read(file.tensors()[0], 0, whole);
  std::vector<float> part(64);
  for (const std::int64_t begin : {0, 32, 128}) {
    file.read(file.tensors()[0], begin, part);
    EXPECT_TRUE(std::equal(part.begin(), part.end(), whole.begin() + begin));
  }
  EXPECT_CONTAINS(error_of([&] { file.read(file.tensors()[0], 160, part); }, ExitCode::internal),
                  "of tensor x of [2, 96] are asked for");
  EXPECT_CONTAINS(error_of([&] { file.read(file.tensors()[0], 16, part); }), "blocks of 32");
}

TEST_F(Gguf, OtherFilesAreNone) {
  EXPECT_EQ(refused("GGJT and more of it"), " is no GGUF file: it begins with GGJT, not with GGUF");
  EXPECT_EQ(refused("\x80\n"), " is no GGUF file: it begins with \\x80\\x0a, not with GGUF");
  EXPECT_EQ(refused(""), " is empty; fetch it again");
  EXPECT_EQ(refused("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
            " is a pointer of Git LFS, not the file itself; fetch that with git lfs pull");
  EXPECT_EQ(refused(GgufBytes().raw("GGUF").u32(0x03000000).u64(0).u64(0)),
            " is big-endian, which Arcus does not read; convert it to little-endian");
  EXPECT_EQ(
      refused(GgufBytes().raw("GGUF").u32(1).u32(0).u32(0)),
      " has version 1 of the GGUF format; Arcus reads 2 and 3: convert it anew, 1 is obsolete");
  for (const std::uint32_t version : {0U, 4U, 0xFFFFFFFFU}) {
    EXPECT_EQ(refused(GgufBytes().raw("GGUF").u32(version).u64(0).u64(0)),
              fmt::format(" has version {} of the GGUF format; Arcus reads 2 and 3: convert it",
                          version));
  }
}

TEST_F(Gguf, HalfADownloadSaysSoWhereverItEnds) {
  for (const auto& [name, whole] : small_gguf()) {
    write_file(path_, whole);
    const GgufFile file(path_);
    std::int64_t end = 0;
    for (const FileTensor& tensor : file.tensors())
      end = std::max(end, tensor.offset + tensor.bytes);
    for (std::int64_t bytes = 1; bytes < end; ++bytes) {
      const std::string message = refused(whole.substr(0, static_cast<std::size_t>(bytes)));
      EXPECT_TRUE(message.starts_with(" is shorter than its description says: ")) << message;
      EXPECT_TRUE(message.ends_with("; half a download? fetch it again")) << message;
    }
  }
  EXPECT_CONTAINS(refused("GGUF\3"), "in the header, 4 bytes are to follow byte 4, there are 1");
  EXPECT_CONTAINS(tensor_refused({64}, kTypeF32, 32),
                  "tensor a.weight is to take 256 bytes from byte 96, the file has 128");
}

TEST_F(Gguf, CountsBeyondTheFileAreRefused) {
  for (const std::uint64_t count : {std::uint64_t{2}, std::uint64_t{1} << 61, ~std::uint64_t{0}}) {
    EXPECT_CONTAINS(
        refused(GgufBytes::begin(count, 0).text("a").u32(0).u32(0).u64(0)),
        fmt::format("in the header, {} items of 25 or more bytes are to follow byte 16", count));
    EXPECT_CONTAINS(
        refused(GgufBytes::begin(0, count).text("k").u32(kBool).number('\1')),
        fmt::format("in the header, {} items of 14 or more bytes are to follow byte 24", count));
  }
  for (const std::uint64_t count : {std::uint64_t{9}, std::uint64_t{1} << 62, ~std::uint64_t{0}}) {
    EXPECT_CONTAINS(key_refused(GgufBytes().u32(kArray).u32(kU32).u64(count).u64(0)),
                    fmt::format("in key 1 of 1 (k), {} items of 4 or more bytes", count));
    EXPECT_CONTAINS(key_refused(GgufBytes().u32(kArray).u32(kText).u64(count).u64(0)),
                    fmt::format("in key 1 of 1 (k), {} items of 8 or more bytes", count));
    EXPECT_CONTAINS(
        key_refused(GgufBytes().u32(kText).u64(count)),
        fmt::format("in key 1 of 1 (k), {} bytes are to follow byte 45, there are 0", count));
    EXPECT_CONTAINS(
        refused(GgufBytes::begin(0, 1).u64(count + 9).raw("name..")),
        fmt::format("in key 1 of 1, {} bytes are to follow byte 32, there are 6", count + 9));
    EXPECT_CONTAINS(
        refused(GgufBytes::begin(1, 0).u64(std::max(count, count + 30)).raw(std::string(30, 'n'))),
        "in tensor 1 of 1, ");
  }
  // The second text of an array is longer than what is left.
  EXPECT_CONTAINS(
      key_refused(GgufBytes().u32(kArray).u32(kText).u64(2).text("abc").u64(4).raw("abc")),
      "in key 1 of 1 (k), 4 bytes are to follow byte 68, there are 3");
}

TEST_F(Gguf, KeysThatAreWrongAreNamed) {
  EXPECT_EQ(key_refused(GgufBytes().u32(13).u64(0)),
            ": key 1 of 1 (k) has an unknown type 13; types 0 to 12 are known");
  EXPECT_EQ(key_refused(GgufBytes().u32(kArray).u32(13).u64(0)),
            ": key 1 of 1 (k) is an array of an unknown type 13; types 0 to 12 are known");
  EXPECT_EQ(key_refused(GgufBytes().u32(kArray).u32(kArray).u64(1).u32(kU8).u64(0)),
            ": key 1 of 1 (k) is an array of arrays, which Arcus does not read");
  EXPECT_EQ(key_refused(GgufBytes().u32(kBool).number('\2')),
            ": key 1 of 1 (k) has a truth value 2; 0 and 1 are known");
  EXPECT_CONTAINS(key_refused(GgufBytes().u32(kArray).u32(kBool).u64(2).number('\0').number('\2')),
                  "has a truth value 2");
  EXPECT_EQ(key_refused(GgufBytes().u32(kArray).u32(kU64).u64(1).u64(~std::uint64_t{0})),
            ": key 1 of 1 (k) has the number 18446744073709551615, beyond 2^63");
  EXPECT_EQ(refused(GgufBytes::begin(0, 2).text("k").u32(kU32).u32(1).text("k").u32(kU32).u32(1)),
            ": key 2 of 2 (k) is there twice");
  EXPECT_EQ(refused(GgufBytes::begin(0, 1).text("").u32(kU32).u32(1)), ": key 1 of 1 has no name");
  EXPECT_EQ(refused(GgufBytes::begin(0, 1).text("\xc3(\x1b").u32(kU32).u32(1)),
            ": key 1 of 1 (\\xc3(\\x1b) has a name that is no UTF-8");
  EXPECT_EQ(refused(GgufBytes::begin(0, 1).text("split.count").u32(kU16).number(std::uint16_t{3})),
            " is one of 3 files of a model; join them with llama-gguf-split --merge first");
}

TEST_F(Gguf, AlignmentsThatAreNoneAreRefused) {
  for (const std::uint32_t alignment : {0U, 1U << 21, 1U << 31, 3U, 48U, 0xFFFFFFFFU}) {
    EXPECT_EQ(refused(GgufBytes::begin(0, 1).text("general.alignment").u32(kU32).u32(alignment)),
              fmt::format(": general.alignment is {}; a power of two up to 1048576 belongs there",
                          alignment));
  }
  EXPECT_EQ(refused(GgufBytes::begin(0, 1).text("general.alignment").u32(kU64).u64(32)),
            ": general.alignment is u64, not u32");
  EXPECT_EQ(refused(GgufBytes::begin(0, 1).text("general.alignment").u32(kText).text("32")),
            ": general.alignment is text, not u32");
  EXPECT_EQ(
      tensor_refused({4}, kTypeF32, 16),
      ": tensor 1 of 1 (a.weight) begins at byte 16 of the data, no multiple of the alignment 32");
}

TEST_F(Gguf, TensorsThatCannotBeAreNamed) {
  EXPECT_EQ(tensor_refused({1, 1, 1, 1, 1}, kTypeF32, 0),
            ": tensor 1 of 1 (a.weight) has 5 dimensions; GGUF knows up to 4");
  EXPECT_EQ(tensor_refused({~std::uint64_t{0}}, kTypeF32, 0),
            ": tensor 1 of 1 (a.weight) has a dimension of 18446744073709551615, beyond 2^62");
  EXPECT_EQ(tensor_refused({1ULL << 32, 1ULL << 32}, kTypeF32, 0),
            ": tensor 1 of 1 (a.weight) has the shape [4294967296, 4294967296], beyond 2^62 bytes");
  EXPECT_CONTAINS(tensor_refused({1ULL << 32, 1ULL << 32, 0}, kTypeF32, 0), "beyond 2^62 bytes");
  EXPECT_CONTAINS(tensor_refused({1ULL << 61}, kTypeF32, 0), "rows of 2305843009213693952 numbers");
  EXPECT_EQ(tensor_refused({48, 2}, kTypeQ8_0, 0),
            ": tensor 1 of 1 (a.weight) has rows of 48 numbers, Q8_0 goes in blocks of 32");
  EXPECT_CONTAINS(tensor_refused({}, kTypeQ8_0, 0),
                  "has rows of 1 numbers, Q8_0 goes in blocks of 32");
  for (const std::uint64_t offset : {std::uint64_t{32}, std::uint64_t{1} << 62}) {
    EXPECT_CONTAINS(tensor_refused({16}, kTypeF32, offset), "is shorter than its description says");
  }
  for (const std::uint64_t offset : {std::uint64_t{1} << 63, ~std::uint64_t{31}}) {
    EXPECT_EQ(tensor_refused({16}, kTypeF32, offset),
              fmt::format(": tensor 1 of 1 (a.weight) begins at byte {} of the data, beyond 2^62",
                          offset));
  }
  EXPECT_EQ(refused(GgufBytes::begin(1, 0).tensor("", {1}, 0, 0).pad().raw("abcd")),
            ": tensor 0 has no name");
}

TEST_F(Gguf, NamesAreUniqueAndText) {
  const auto two = [&](std::string_view first, std::string_view second, std::uint64_t offset) {
    return refused(GgufBytes::begin(2, 0)
                       .tensor(first, {8}, 0, 0)
                       .tensor(second, {8}, 0, offset)
                       .pad()
                       .raw(std::string(64, 'x')));
  };
  EXPECT_EQ(two("a", "a", 32), ": two tensors are called a");
  EXPECT_EQ(two("a", "", 32), ": tensor 1 has no name");
  EXPECT_EQ(two("a", "b\xff\x1b", 32), ": the name of tensor 1 is not UTF-8: b\\xff\\x1b");
  EXPECT_CONTAINS(two("a", "b", 0),
                  ": tensors a (bytes 96 to 128 of the file) and b (from byte 96) overlap");
  EXPECT_CONTAINS(refused(GgufBytes::begin(2, 0)
                              .tensor("a", {9}, 0, 0)
                              .tensor("b", {1}, 0, 32)
                              .pad()
                              .raw(std::string(64, 'x'))),
                  ": tensors a (bytes 96 to 132 of the file) and b (from byte 128) overlap");
}

TEST_F(Gguf, TypesThatArcusDoesNotReadAreNamed) {
  const std::map<std::uint32_t, const char*> types{
      {2 + 2, "Q4_2"},   {6, "Q5_0"},
      {9, "Q8_1"},       {12, "Q4_K"},
      {14, "Q6_K"},      {16, "IQ2_XXS"},
      {23, "IQ4_XS"},    {24, "I8"},
      {28, "F64"},       {33, "Q4_0_8_8"},
      {35, "TQ2_0"},     {39, "MXFP4"},
      {99, "number 99"}, {0xFFFFFFFF, "number 4294967295"}};
  for (const auto& [number, name] : types) {
    EXPECT_EQ(
        tensor_refused({256}, number, 0),
        fmt::format(
            ": tensor 1 of 1 (a.weight) has the type {}, which Arcus does not read; convert the "
            "model to F32, F16, BF16, Q8_0, Q4_0 or Q4_1 first",
            name));
  }
}

}  // namespace
}  // namespace arcus::test
