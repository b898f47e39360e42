#include "tests/checkpoints/interop/small_files.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>

#include "tests/support/temporary_folder.hpp"

namespace arcus::test {
namespace {

/// Whole numbers below `end`, the same with every standard library.
class Draws {
 public:
  explicit Draws(std::uint64_t seed) : engine_(seed) {}
  std::uint64_t operator()(std::uint64_t end) { return engine_() % end; }
  std::string bytes(std::size_t count) {
    std::string bytes;
    for (std::size_t i = 0; i < count; ++i) bytes += static_cast<char>((*this)(256));
    return bytes;
  }

 private:
  std::mt19937_64 engine_;
};

std::vector<std::int64_t> random_shape(Draws& draw, bool block) {
  std::vector<std::int64_t> shape(draw(5));
  for (std::int64_t& dim : shape) dim = static_cast<std::int64_t>(draw(8) == 0 ? 0 : 1 + draw(4));
  if (!block) return shape;
  if (shape.empty()) shape.push_back(1);
  shape.back() *= 32;
  return shape;
}

std::string random_name(Draws& draw, std::size_t idx) {
  const char* const parts[] = {"model.layers.", "blk", "weight", "größe", "路由",
                               "a b",           "\"",  "\\",     "\n",    "🌈"};
  std::string name;
  for (std::uint64_t i = draw(4); i > 0; --i) name += parts[draw(std::size(parts))];
  return name + std::to_string(idx);
}

}  // namespace

std::vector<TensorContent> random_tensors(std::uint64_t seed, bool blocks) {
  Draws draw(seed);
  std::vector<TensorContent> tensors(draw(9));
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    FileTensor& tensor = tensors[i].tensor;
    tensor.name = random_name(draw, i);
    tensor.type = static_cast<FileType>(draw(blocks ? 6 : 3));
    tensor.shape = random_shape(draw, tensor.type >= FileType::q8_0);
    tensor.bytes = bytes_of(tensor.type, tensor.num_elements());
    tensors[i].bytes = draw.bytes(static_cast<std::size_t>(tensor.bytes));
  }
  std::ranges::stable_sort(tensors, {}, [](const TensorContent& content) {
    return content.tensor.type == FileType::f32 ? 0 : 1;
  });
  return tensors;
}

GgufKeys random_keys(std::uint64_t seed) {
  Draws draw(seed);
  const auto number = [&] { return static_cast<std::uint32_t>(draw(1ULL << 32)); };
  const auto real = [&] { return static_cast<double>(draw(1ULL << 53)) / 1024 - 1e6; };
  return {{"general.architecture", std::string("arcus")},
          {"a.u8", static_cast<std::uint8_t>(number())},
          {"a.i8", static_cast<std::int8_t>(number())},
          {"a.u16", static_cast<std::uint16_t>(number())},
          {"a.i16", static_cast<std::int16_t>(number())},
          {"a.u32", number()},
          {"a.i32", static_cast<std::int32_t>(number())},
          {"a.u64", std::uint64_t{number()} << 32 | number()},
          {"a.i64", static_cast<std::int64_t>(std::uint64_t{number()} << 32)},
          {"a.f32", static_cast<float>(real())},
          {"a.f64", real()},
          {"a.bool", draw(2) == 1},
          {"a.text", "größe " + draw.bytes(draw(20))},
          {"a.u32s", std::vector<std::uint32_t>{number(), number()}},
          {"a.i32s", std::vector<std::int32_t>{-1, 0, 1}},
          {"a.f32s", std::vector<float>{static_cast<float>(real()), -0.0F}},
          {"a.bools", std::vector<bool>{true, false, draw(2) == 1}},
          {"a.texts", std::vector<std::string>{"", "a", draw.bytes(draw(9))}},
          {"a.i64s", std::vector<std::int64_t>{-(std::int64_t{1} << 62), number()}},
          {"a.f64s", std::vector<double>{real()}},
          {"a.nothing", std::vector<std::int32_t>{}}};
}

void write_safetensors(const std::filesystem::path& path, const std::vector<TensorContent>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  std::vector<FileTensor> described;
  for (const TensorContent& content : tensors) described.push_back(content.tensor);
  SafetensorsWriter writer(path, described, metadata);
  for (const TensorContent& content : tensors) writer.write(content.bytes);
  writer.finish();
}

void write_gguf(const std::filesystem::path& path, const GgufKeys& keys,
                const std::vector<TensorContent>& tensors) {
  std::vector<FileTensor> described;
  for (const TensorContent& content : tensors) described.push_back(content.tensor);
  GgufWriter writer(path, keys, described);
  for (const TensorContent& content : tensors) writer.write(content.bytes);
  writer.finish();
}

std::string read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void write_file(const std::filesystem::path& path, std::string_view bytes) {
  std::filesystem::remove(path);  // some file systems wait for the disk when a file is cut to 0
  std::ofstream(path, std::ios::binary) << bytes;
}

std::string safetensors_bytes(std::string_view header, std::string_view data) {
  const std::uint64_t length = header.size();
  std::string bytes(reinterpret_cast<const char*>(&length), sizeof length);
  return bytes.append(header).append(data);
}

std::vector<std::pair<std::string, std::string>> small_safetensors() {
  std::vector<std::pair<std::string, std::string>> files{
      {"empty", safetensors_bytes("{}", "")},
      {"metadata", safetensors_bytes(R"({"__metadata__":{"format":"pt","a":"\u00e4"}})", "")},
      {"scalar",
       safetensors_bytes(R"({"s":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}   )", "abcd")}};
  const testing::TemporaryFolder folder;
  for (std::uint64_t seed = 0; seed < 6; ++seed) {
    write_safetensors(folder.path() / "file", random_tensors(seed, false), {{"format", "pt"}});
    files.emplace_back(fmt::format("random{}", seed), read_file(folder.path() / "file"));
  }
  return files;
}

std::vector<std::pair<std::string, std::string>> small_gguf() {
  constexpr std::uint32_t kU32 = 4;
  std::vector<std::pair<std::string, std::string>> files{
      {"empty", GgufBytes::begin(0, 0).bytes()},
      {"version2", GgufBytes()
                       .raw("GGUF")
                       .u32(2)
                       .u64(1)
                       .u64(0)
                       .tensor("a", {2}, 0, 0)
                       .pad()
                       .raw("abcdefgh")
                       .bytes()},
      {"alignment", GgufBytes::begin(2, 1)
                        .text("general.alignment")
                        .u32(kU32)
                        .u32(8)
                        .tensor("a", {1}, 30, 0)
                        .tensor("b", {2, 2}, 1, 8)
                        .pad(8)
                        .raw("ab")
                        .pad(8)
                        .raw("abcdefgh")
                        .bytes()}};
  const testing::TemporaryFolder folder;
  for (std::uint64_t seed = 0; seed < 6; ++seed) {
    write_gguf(folder.path() / "file", seed % 2 == 0 ? random_keys(seed) : GgufKeys{},
               random_tensors(seed, true));
    files.emplace_back(fmt::format("random{}", seed), read_file(folder.path() / "file"));
  }
  return files;
}

}  // namespace arcus::test
