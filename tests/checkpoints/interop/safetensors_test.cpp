#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "src/base/memory.hpp"
#include "tests/checkpoints/interop/expect.hpp"
#include "tests/checkpoints/interop/small_files.hpp"
#include "tests/support/temporary_folder.hpp"

namespace arcus::test {
namespace {

namespace fs = std::filesystem;
using testing::TemporaryFolder;

class Safetensors : public ::testing::Test {
 protected:
  /// The message for a file of these bytes, without its name, which has to be there.
  std::string refused(std::string_view bytes) const {
    write_file(path_, bytes);
    const std::string message = error_of([&] { SafetensorsFile{path_}; });
    EXPECT_TRUE(message.starts_with(path_.string())) << message;
    return message.substr(std::min(message.size(), path_.string().size()));
  }
  std::string refused(std::string_view header, std::size_t data_bytes) const {
    return refused(safetensors_bytes(header, std::string(data_bytes, 'x')));
  }

  TemporaryFolder folder_;
  fs::path path_ = folder_.path() / "model.safetensors";
};

TEST_F(Safetensors, ComeBackAsTheyWereWritten) {
  std::size_t tensors = 0;
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    const auto contents = random_tensors(seed, false);
    const std::map<std::string, std::string> metadata{{"format", "pt"}, {"größe", "\n\""}};
    write_safetensors(path_, contents, metadata);
    const SafetensorsFile file(path_);
    EXPECT_EQ(file.metadata(), metadata);
    ASSERT_EQ(file.tensors().size(), contents.size());
    for (std::size_t i = 0; i < contents.size(); ++i) {
      const FileTensor& wanted = contents[i].tensor;
      const FileTensor* found = file.find(wanted.name);
      ASSERT_NE(found, nullptr) << wanted.name;
      EXPECT_EQ(found->type, wanted.type);
      EXPECT_EQ(found->shape, wanted.shape);
      EXPECT_EQ(file.bytes(*found), contents[i].bytes);
      ++tensors;
    }
    EXPECT_EQ(file.find("not there"), nullptr);
  }
  EXPECT_GT(tensors, 500U);
}

TEST_F(Safetensors, AreWrittenAsTheFormatSays) {
  write_safetensors(path_,
                    {{{.name = "a", .shape = {1, 2}}, "ABCDEFGH"},
                     {{.name = "b", .type = FileType::bf16, .shape = {}}, "IJ"},
                     {{.name = "c", .type = FileType::f16, .shape = {0}}, ""}},
                    {{"format", "pt"}});
  const std::string header =
      R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},)"
      R"("b":{"dtype":"BF16","shape":[],"data_offsets":[8,10]},)"
      R"("c":{"dtype":"F16","shape":[0],"data_offsets":[10,10]}})";
  const std::string padding((8 - header.size() % 8) % 8, ' ');
  EXPECT_FALSE(padding.empty());
  EXPECT_EQ(read_file(path_), safetensors_bytes(header + padding, "ABCDEFGHIJ"));
}

TEST_F(Safetensors, StandInTheOrderOfTheirDataWhateverTheHeadersIs) {
  write_file(path_, safetensors_bytes(R"({"b":{"shape":[1],"data_offsets":[4,8],"dtype":"F32"},)"
                                      R"("c":{"dtype":"F32","shape":[2,0],"data_offsets":[4,4]},)"
                                      R"("a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}})",
                                      "aaaabbbb"));
  const SafetensorsFile file(path_);
  ASSERT_EQ(file.tensors().size(), 3U);
  EXPECT_EQ(file.tensors()[0].name, "a");
  EXPECT_EQ(file.tensors()[1].name, "c");
  EXPECT_EQ(file.tensors()[2].name, "b");
  EXPECT_EQ(file.bytes(file.tensors()[2]), "bbbb");
  EXPECT_EQ(file.bytes(file.tensors()[1]), "");
}

TEST_F(Safetensors, AnyPartOfATensorReadsAsFloats) {
  std::vector<float> values(1000);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i) - 500;
  for (const FileType type : {FileType::f32, FileType::f16, FileType::bf16}) {
    std::vector<float> wanted(values.size());
    decode(type, encode(type, values, "x"), wanted);
    // One byte in front, so that nothing is aligned.
    write_file(path_,
               safetensors_bytes(
                   fmt::format(R"({{"a":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}},)"
                               R"("x":{{"dtype":"{}","shape":[10,100],"data_offsets":[1,{}]}}}})",
                               name_of(type), 1 + bytes_of(type, 1000)),
                   std::string("!") + encode(type, values, "x")));
    const SafetensorsFile file(path_, [](std::string_view name) { return name == "a"; });
    for (const std::int64_t begin : {0, 1, 499, 1000}) {
      for (const std::int64_t count : {0, 1, 100, 500}) {
        if (begin + count > 1000) continue;
        std::vector<float> part(static_cast<std::size_t>(count));
        file.read(*file.find("x"), begin, part);
        EXPECT_TRUE(std::equal(part.begin(), part.end(), wanted.begin() + begin));
      }
    }
    std::vector<float> part(2);
    for (const std::int64_t begin : {-1, 999, 1000}) {
      EXPECT_CONTAINS(
          error_of([&] { file.read(*file.find("x"), begin, part); }, ExitCode::internal),
          "of tensor x of [10, 100] are asked for");
    }
  }
}

TEST_F(Safetensors, ReadingALargeOnePieceByPieceHoldsNoMoreThanAPiece) {
  constexpr std::int64_t kRows = 64;
  constexpr std::int64_t kCols = 1 << 20;  // 4 MiB a row
  {
    SafetensorsWriter writer(path_, {{.name = "x", .shape = {kRows, kCols}}});
    for (std::int64_t row = 0; row < kRows; ++row) {
      writer.write(encode(FileType::f32, std::vector<float>(kCols, static_cast<float>(row)), "x"));
    }
    writer.finish();
  }
  const SafetensorsFile file(path_);
  std::vector<float> row(kCols);
  file.read(file.tensors()[0], 0, row);
  const std::int64_t before = resident_memory();
  std::int64_t most = 0;
  for (std::int64_t i = 0; i < kRows; ++i) {
    file.read(file.tensors()[0], i * kCols, row);
    EXPECT_EQ(row[0], static_cast<float>(i));
    EXPECT_EQ(row.back(), static_cast<float>(i));
    most = std::max(most, resident_memory());
  }
  EXPECT_LT(most - before, 32 << 20);
}

TEST_F(Safetensors, HalfADownloadSaysSo) {
  const std::string_view remedy = "; half a download? fetch it again";
  EXPECT_EQ(refused(""), " is empty; fetch it again");
  EXPECT_EQ(refused("\x40"),
            " is shorter than its description says: it has 1 bytes" + std::string(remedy));
  const std::string whole = safetensors_bytes(
      R"({"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}})", std::string(16, 'x'));
  const std::size_t header_bytes = whole.size() - 8 - 16;
  for (std::size_t bytes = 8; bytes < 8 + header_bytes; ++bytes) {
    EXPECT_EQ(refused(whole.substr(0, bytes)),
              fmt::format(" is shorter than its description says: the header has {} bytes, {} of "
                          "them are there{}",
                          header_bytes, bytes - 8, remedy));
  }
  for (std::size_t bytes = 0; bytes < 16; ++bytes) {
    EXPECT_EQ(refused(whole.substr(0, 8 + header_bytes + bytes)),
              fmt::format(" is shorter than its description says: the tensors have 16 bytes, {} of "
                          "them are there{}",
                          bytes, remedy));
  }
  EXPECT_EQ(refused("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
            " is a pointer of Git LFS, not the file itself; fetch that with git lfs pull");
}

TEST_F(Safetensors, OtherFilesAreNone) {
  EXPECT_CONTAINS(refused("<!DOCTYPE html><html>"),
                  " is no safetensors file: its header would have "
                  "5789751444030890300 bytes");
  EXPECT_CONTAINS(refused(std::string(64, '\xff')), "18446744073709551615 bytes");
  EXPECT_CONTAINS(refused(std::string(64, '\0')), "its header would have 0 bytes");
  EXPECT_CONTAINS(refused("[]", 0), "its header begins with [, not with {");
  EXPECT_CONTAINS(refused("\n{}", 0), "its header begins with \\x0a, not with {");
  write_file(path_, "");
  fs::remove(path_);
  EXPECT_CONTAINS(error_of([&] { SafetensorsFile{path_}; }), "cannot read " + path_.string());
  EXPECT_CONTAINS(error_of([&] { SafetensorsFile{folder_.path()}; }), "is no regular file");
}

TEST_F(Safetensors, BytesThatBelongToNoTensorAreRefused) {
  const auto two = [&](int begin, int end, std::size_t data_bytes) {
    return refused(fmt::format(R"({{"a":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}},)"
                               R"("b":{{"dtype":"F32","shape":[1],"data_offsets":[{},{}]}}}})",
                               begin, end),
                   data_bytes);
  };
  EXPECT_EQ(two(4, 8, 9), ": the tensors have 8 bytes, but 9 follow the header");
  EXPECT_EQ(two(5, 9, 9),
            ": tensor b begins at byte 5 of the data, the one in front of it ends at 4");
  EXPECT_EQ(two(2, 6, 6),
            ": tensor b begins at byte 2 of the data, the one in front of it ends at 4");
  EXPECT_EQ(two(0, 4, 4),
            ": tensor b begins at byte 0 of the data, the one in front of it ends at 4");
  EXPECT_EQ(refused(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", 8),
            ": tensor a begins at byte 4 of the data, the one in front of it ends at 0");
  EXPECT_EQ(refused("{}", 1), ": the tensors have 0 bytes, but 1 follow the header");
}

TEST_F(Safetensors, ARangeThatShapeAndTypeDoNotGiveIsRefused) {
  const auto tensor = [&](const char* shape, const char* offsets) {
    return refused(
        fmt::format(R"({{"a":{{"dtype":"F32","shape":{},"data_offsets":{}}}}})", shape, offsets),
        16);
  };
  EXPECT_EQ(tensor("[3]", "[0,16]"),
            ": tensor a of [3] numbers F32 does not take the 16 bytes of its data_offsets [0, 16]");
  EXPECT_CONTAINS(tensor("[]", "[0,16]"), "tensor a of [] numbers F32 does not take the 16 bytes");
  EXPECT_CONTAINS(tensor("[0]", "[0,16]"), "tensor a of [0] numbers");
  // Products that pass 64 bits: 2^32 * 2^32 would be 0, 2^62 * 4 as well.
  EXPECT_CONTAINS(tensor("[4294967296,4294967296]", "[0,0]"), "does not take the 0 bytes");
  EXPECT_CONTAINS(tensor("[4611686018427387904]", "[0,0]"), "does not take the 0 bytes");
  EXPECT_CONTAINS(tensor("[4611686018427387904,4,0]", "[0,0]"), "does not take the 0 bytes");
  EXPECT_CONTAINS(tensor("[18446744073709551615]", "[0,16]"),
                  "the header has 18446744073709551615 in shape of a, which is beyond 2^62");
  EXPECT_CONTAINS(tensor("[4]", "[18446744073709551600,18446744073709551615]"),
                  "in data_offsets of a, which is beyond 2^62");
  EXPECT_CONTAINS(tensor("[4]", "[4611686018427387888,4611686018427387904]"),
                  "tensor a begins at byte 4611686018427387888 of the data");
  EXPECT_EQ(tensor("[4]", "[16,0]"),
            ": tensor a has the data_offsets [16, 0]; a begin and an end belong there");
  EXPECT_CONTAINS(tensor("[4]", "[0]"), "data_offsets [0]; a begin and an end");
  EXPECT_CONTAINS(tensor("[4]", "[0,16,16]"), "data_offsets [0, 16, 16]; a begin and an end");
  EXPECT_CONTAINS(tensor("[4]", "[]"), "data_offsets []; a begin and an end");
}

TEST_F(Safetensors, NothingIsThereTwice) {
  const std::string a = R"("a":{"dtype":"F32","shape":[],"data_offsets":[0,4]})";
  const std::string b = R"("a":{"dtype":"F32","shape":[],"data_offsets":[4,8]})";
  EXPECT_EQ(refused(fmt::format("{{{},{}}}", a, b), 8), ": the header has a twice");
  EXPECT_EQ(refused(R"({"__metadata__":{},"__metadata__":{}})", 0),
            ": the header has __metadata__ twice");
  EXPECT_EQ(refused(R"({"__metadata__":{"k":"1","k":"2"}})", 0),
            ": the header has k of __metadata__ twice");
  for (const std::string field : {R"("dtype":"F32")", R"("shape":[])", R"("data_offsets":[0,4])"}) {
    const std::string open = a.substr(0, a.size() - 1);
    EXPECT_CONTAINS(refused(fmt::format("{{{},{}}}}}", open, field), 4), " of a twice");
  }
}

TEST_F(Safetensors, TheHeaderHoldsNothingElse) {
  const auto field = [&](const std::string& text) { return refused("{\"a\":{" + text + "}}", 0); };
  EXPECT_EQ(field(R"("dtype":"F32","shape":[0])"), ": tensor a has no data_offsets");
  EXPECT_EQ(field(R"("dtype":"F32","data_offsets":[0,0])"), ": tensor a has no shape");
  EXPECT_EQ(field(R"("shape":[0],"data_offsets":[0,0])"), ": tensor a has no dtype");
  EXPECT_EQ(field(""), ": tensor a has no dtype");
  EXPECT_EQ(field(R"("shape":[-1])"),
            ": the header has the number -1 where none belongs, in shape of a");
  EXPECT_EQ(field(R"("shape":[1.5])"),
            ": the header has the number 1.5 where none belongs, in shape of a");
  EXPECT_CONTAINS(field(R"("shape":[36893488147419103232])"),
                  "the number 36893488147419103232 where none");
  EXPECT_CONTAINS(field(R"("shape":["1"])"), "has a text where none belongs, in shape of a");
  EXPECT_CONTAINS(field(R"("shape":[null])"), "has null where none belongs");
  EXPECT_CONTAINS(field(R"("shape":[true])"), "has true where none belongs");
  EXPECT_CONTAINS(field(R"("shape":3)"), "has a number where none belongs, in shape of a");
  EXPECT_CONTAINS(field(R"("shape":{})"), "has an object where none belongs, in shape of a");
  EXPECT_CONTAINS(field(R"("shape":[[1]])"), "has an array where none belongs, in shape of a");
  EXPECT_CONTAINS(field(R"("dtype":["F32"])"), "has an array where none belongs, in dtype of a");
  EXPECT_CONTAINS(field(R"("dtype":32)"), "has a number where none belongs, in dtype of a");
  EXPECT_CONTAINS(field(R"("strides":[1])"),
                  "has an unknown field where none belongs, in strides of a");
  EXPECT_CONTAINS(refused(R"({"a":[]})", 0), "has an array where none belongs, in a");
  EXPECT_CONTAINS(refused(R"({"a":"F32"})", 0), "has a text where none belongs, in a");
  EXPECT_CONTAINS(refused(R"({"__metadata__":{"k":1}})", 0),
                  "has a number where none belongs, in k of __metadata__");
  EXPECT_CONTAINS(refused(R"({"__metadata__":{"k":{}}})", 0), "has an object where none belongs");
  EXPECT_CONTAINS(refused(R"({"__metadata__":"pt"})", 0),
                  "has a text where none belongs, in __metadata__");
  EXPECT_CONTAINS(refused(R"({"":{"dtype":"F32","shape":[],"data_offsets":[0,4]}})", 4),
                  "tensor 0 has no name");
}

TEST_F(Safetensors, WhatIsNoJsonIsRefusedWithItsPlace) {
  EXPECT_EQ(refused(R"({"a":})", 0),
            ": the header is no JSON at byte 13: unexpected '}'; expected '[', '{', or a literal");
  EXPECT_CONTAINS(refused(R"({"a")", 0),
                  "the header is no JSON at byte 12: unexpected end of input");
  EXPECT_CONTAINS(refused("{}{}", 0), "the header is no JSON at byte 10");
  EXPECT_CONTAINS(refused(std::string_view("{}\0{", 4), 0),
                  "the header is no JSON at byte 10: a zero byte");
  EXPECT_CONTAINS(refused("{\"\xff\":1}", 0), "invalid string: ill-formed UTF-8 byte");
  EXPECT_CONTAINS(refused("{\"\\ud800\":1}", 0), "surrogate");
  EXPECT_CONTAINS(refused("{'a':1}", 0), "the header is no JSON at byte 9");
  EXPECT_CONTAINS(refused("{\"a\n\":1}", 0), "the header is no JSON");
  // A name of a megabyte does not fill the screen.
  const std::string message = refused("{\"" + std::string(1 << 20, 'a') + "\":1}", 0);
  EXPECT_CONTAINS(message, "aaa... (1048576 bytes)");
  EXPECT_LT(message.size(), 300U);
  EXPECT_LT(refused("{\"" + std::string(1 << 20, 'a') + "\x01\":1}", 0).size(), 300U);
}

TEST_F(Safetensors, DeeplyNestedHeadersAreRefusedAtOnce) {
  constexpr std::size_t kDepth = 5'000'000;
  std::string objects;
  for (std::size_t i = 0; i < kDepth / 5; ++i) objects += "{\"a\":";
  EXPECT_CONTAINS(refused(objects, 0), "has an unknown field where none belongs, in a of a");
  EXPECT_CONTAINS(refused("{\"a\":" + std::string(kDepth, '['), 0),
                  "has an array where none belongs");
  EXPECT_CONTAINS(refused("{\"a\":{\"shape\":" + std::string(kDepth, '['), 0),
                  "has an array where none belongs");
}

TEST_F(Safetensors, TypesThatArcusDoesNotReadAreNamedOrIgnoredOnRequest) {
  const std::string header = R"({"attn.bias":{"dtype":"BOOL","shape":[2,2],"data_offsets":[0,4]},)"
                             R"("w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})";
  EXPECT_EQ(
      refused(header, 8),
      ": tensor attn.bias has the type BOOL; Arcus reads F32, F16 and BF16: convert it first");
  const SafetensorsFile file(path_, [](std::string_view name) { return name == "attn.bias"; });
  ASSERT_EQ(file.tensors().size(), 1U);
  EXPECT_EQ(file.tensors()[0].name, "w");
  for (const std::string type : {"F64", "I64", "I32", "I16", "I8", "U8", "F8_E4M3", "F8_E5M2"}) {
    EXPECT_CONTAINS(
        refused(R"({"a":{"dtype":")" + type + R"(","shape":[0],"data_offsets":[0,0]}})", 0),
        "tensor a has the type " + type + "; Arcus reads");
  }
  EXPECT_CONTAINS(refused(R"({"a":{"dtype":"F31","shape":[0],"data_offsets":[0,0]}})", 0),
                  "tensor a has the unknown type F31");
  EXPECT_CONTAINS(refused(R"({"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}})", 1),
                  "tensor a of [3] numbers F4 does not take the 1 bytes");
  // What is ignored is checked all the same.
  write_file(path_,
             safetensors_bytes(
                 R"({"attn.bias":{"dtype":"BOOL","shape":[2,2],"data_offsets":[0,5]}})", "abcde"));
  EXPECT_CONTAINS(error_of([&] { SafetensorsFile(path_, [](std::string_view) { return true; }); }),
                  "does not take the 5 bytes");
}

}  // namespace
}  // namespace arcus::test
