#include <gtest/gtest.h>

#include <fstream>

#include "tests/checkpoints/interop/expect.hpp"
#include "tests/checkpoints/interop/small_files.hpp"
#include "tests/support/small_disk.hpp"

namespace arcus::test {
namespace {

namespace fs = std::filesystem;
using testing::FileSizeLimit;
using testing::open_files_in;
using testing::SmallDisk;
using testing::TemporaryFolder;

/// One large tensor and a small one behind it.
std::vector<TensorContent> large_tensors(std::int64_t numbers) {
  const std::int64_t bytes = 4 * numbers;
  return {{{.name = "large", .shape = {numbers}, .bytes = bytes},
           std::string(static_cast<std::size_t>(bytes), 'x')},
          {{.name = "small", .shape = {2}, .bytes = 8}, "abcdefgh"}};
}

/// Writes both kinds of files.
using WriteFn = void (*)(const fs::path&, const std::vector<TensorContent>&);
struct Container {
  const char* name;
  WriteFn write;
};
const Container kContainers[] = {
    {"model.safetensors",
     [](const fs::path& path, const std::vector<TensorContent>& tensors) {
       write_safetensors(path, tensors, {});
     }},
    {"model.gguf", [](const fs::path& path, const std::vector<TensorContent>& tensors) {
       write_gguf(path, random_keys(1), tensors);
     }}};

TEST(Writers, PiecesOfAnySizeGiveTheSameFile) {
  const TemporaryFolder folder;
  const fs::path whole = folder.path() / "whole";
  const fs::path pieces = folder.path() / "pieces";
  const auto in_pieces = [](auto& writer, const std::string& data, std::size_t piece_bytes) {
    for (std::size_t at = 0; at < data.size(); at += piece_bytes) {
      writer.write(std::string_view(data).substr(at, piece_bytes));
    }
    writer.write({});
    writer.finish();
  };
  const auto tensors = large_tensors(1'000'003);
  std::vector<FileTensor> described;
  std::string data;
  for (const TensorContent& content : tensors) {
    described.push_back(content.tensor);
    data += content.bytes;
  }
  write_safetensors(whole, tensors, {{"format", "pt"}});
  const std::string safetensors = read_file(whole);
  write_gguf(whole, random_keys(2), tensors);
  const std::string gguf = read_file(whole);
  for (const std::size_t piece_bytes : {std::size_t{3}, std::size_t{4096}, data.size()}) {
    SafetensorsWriter one(pieces, described);
    in_pieces(one, data, piece_bytes);
    EXPECT_TRUE(read_file(pieces) == safetensors) << piece_bytes;
    GgufWriter other(pieces, random_keys(2), described);
    in_pieces(other, data, piece_bytes);
    EXPECT_TRUE(read_file(pieces) == gguf) << piece_bytes;
  }
}

TEST(Writers, AFileThatCannotGrowIsNamedAndClosed) {
  const TemporaryFolder folder;
  const auto tensors = large_tensors(1'000'000);
  for (const Container& container : kContainers) {
    const fs::path path = folder.path() / container.name;
    container.write(path, tensors);
    const std::uintmax_t whole = fs::file_size(path);
    for (const std::uintmax_t limit :
         {std::uintmax_t{0}, std::uintmax_t{100}, std::uintmax_t{4096}, whole / 2, whole - 1}) {
      const FileSizeLimit limited(limit);
      EXPECT_EQ(error_of([&] { container.write(path, tensors); }),
                "cannot write " + path.string() + ": File too large")
          << limit;
      EXPECT_EQ(open_files_in(folder.path()), 0) << limit;
    }
    const FileSizeLimit limited(whole);
    EXPECT_NO_THROW(container.write(path, tensors));
  }
}

TEST(Writers, NoSpaceLeft) {
  const SmallDisk disk(64 << 20);
  if (!disk.mounted()) GTEST_SKIP() << "mounting a small disk takes more rights";
  const auto tensors = large_tensors(3'000'000);
  for (const Container& container : kContainers) {
    const fs::path path = disk.path() / container.name;
    for (const std::int64_t room : {0, 4096, 1 << 20, 11 << 20}) {
      fs::remove(path);
      disk.fill_up_to(room);
      EXPECT_EQ(error_of([&] { container.write(path, tensors); }),
                "cannot write " + path.string() + ": No space left on device")
          << room;
      EXPECT_EQ(open_files_in(disk.path()), 0) << room;
      disk.make_room();
    }
    EXPECT_NO_THROW(container.write(path, tensors));
  }
}

TEST(Writers, NothingIsWrittenAfterAFailure) {
  const TemporaryFolder folder;
  const auto tensors = large_tensors(1'000'000);
  const fs::path path = folder.path() / "file";
  SafetensorsWriter writer(path, {tensors[0].tensor});
  {
    const FileSizeLimit limited(1000);
    EXPECT_CONTAINS(error_of([&] { writer.write(tensors[0].bytes); }), "File too large");
  }
  EXPECT_CONTAINS(error_of([&] { writer.write(tensors[0].bytes); }, ExitCode::internal),
                  path.string() + " is written to after a failure");
  EXPECT_CONTAINS(error_of([&] { writer.finish(); }, ExitCode::internal), "are missing");
}

TEST(Writers, PlacesThatCannotBeWrittenAreNamed) {
  const TemporaryFolder folder;
  for (const Container& container : kContainers) {
    const fs::path path = folder.path() / "missing" / container.name;
    EXPECT_EQ(error_of([&] { container.write(path, {}); }),
              "cannot create " + path.string() + ": No such file or directory");
    EXPECT_EQ(error_of([&] { container.write(folder.path(), {}); }),
              "cannot create " + folder.path().string() + ": Is a directory");
    EXPECT_EQ(error_of([&] { container.write("/dev/full", {}); }),
              "cannot write /dev/full: No space left on device");
  }
}

TEST(Writers, OneThatIsGivenUpClosesItsFile) {
  const TemporaryFolder folder;
  const auto tensors = large_tensors(10);
  {
    SafetensorsWriter one(folder.path() / "one", {tensors[0].tensor});
    GgufWriter other(folder.path() / "other", {}, {tensors[0].tensor});
    one.write("abc");
    other.write("abc");
    EXPECT_GE(open_files_in(folder.path()), 2);
  }
  EXPECT_EQ(open_files_in(folder.path()), 0);
}

TEST(Writers, BytesAreCounted) {
  const TemporaryFolder folder;
  const auto tensors = large_tensors(10);
  const std::vector<FileTensor> described{tensors[0].tensor, tensors[1].tensor};
  SafetensorsWriter one(folder.path() / "one", described);
  one.write(tensors[0].bytes);
  EXPECT_CONTAINS(error_of([&] { one.finish(); }, ExitCode::internal), "8 bytes are missing");
  EXPECT_CONTAINS(error_of([&] { one.write("123456789"); }, ExitCode::internal),
                  "9 bytes are too many, 8 are missing");
  GgufWriter other(folder.path() / "other", {}, described);
  other.write(tensors[0].bytes);
  EXPECT_CONTAINS(error_of([&] { other.finish(); }, ExitCode::internal),
                  "1 of 2 tensors are missing");
  EXPECT_CONTAINS(error_of([&] { other.write("123456789"); }, ExitCode::internal),
                  "1 bytes too many");
}

TEST(Writers, WhatTheFormatsCannotHoldIsRefusedBeforeThereIsAFile) {
  const TemporaryFolder folder;
  const fs::path path = folder.path() / "file";
  const auto safetensors = [&](std::vector<FileTensor> tensors) {
    return error_of([&] { SafetensorsWriter(path, std::move(tensors)); }, ExitCode::internal);
  };
  const auto gguf = [&](std::vector<FileTensor> tensors, const GgufKeys& keys = {}) {
    return error_of([&] { GgufWriter(path, keys, std::move(tensors)); }, ExitCode::internal);
  };
  for (const std::string name : {"", "\xff", "__metadata__"}) {
    EXPECT_CONTAINS(safetensors({{.name = name}}), "is to name a tensor");
  }
  EXPECT_CONTAINS(safetensors({{.name = "a"}, {.name = "a"}}), "\"a\" is to name a tensor");
  EXPECT_CONTAINS(safetensors({{.name = "a", .type = FileType::bf16, .shape = {3}}, {.name = "b"}}),
                  "tensor b (F32) would begin at byte 6: put wider types in front");
  for (const std::string& name : {std::string(), std::string("\xff"), std::string(64, 'x')}) {
    EXPECT_CONTAINS(gguf({{.name = name}}), "is to name a tensor");
  }
  EXPECT_CONTAINS(gguf({{.name = "a"}, {.name = "a"}}), "\"a\" is to name a tensor");
  EXPECT_CONTAINS(gguf({{.name = "a", .shape = {1, 1, 1, 1, 1}}}), "a has 5 dimensions");
  EXPECT_CONTAINS(gguf({}, {{"k", 1.0F}, {"k", 2.0F}}), "\"k\" is to name a key");
  EXPECT_CONTAINS(gguf({}, {{"general.alignment", std::uint32_t{64}}}), "general.alignment 32");
  EXPECT_CONTAINS(error_of([&] {
                    GgufWriter(path, {}, {{.name = "a", .type = FileType::q8_0, .shape = {2, 48}}});
                  }),
                  "48 numbers cannot be written as Q8_0");
  EXPECT_FALSE(fs::exists(path));
}

}  // namespace
}  // namespace arcus::test
