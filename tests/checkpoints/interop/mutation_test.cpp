#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>

#include "tests/checkpoints/interop/expect.hpp"
#include "tests/checkpoints/interop/small_files.hpp"
#include "tests/support/temporary_folder.hpp"

namespace {
std::size_t largest_allocation = 0;  ///< the largest block that anybody asked for
}

#ifndef __SANITIZE_ADDRESS__  // which has operators of its own
void* operator new(std::size_t bytes) {
  largest_allocation = std::max(largest_allocation, bytes);
  void* block = std::malloc(std::max<std::size_t>(bytes, 1));
  if (block == nullptr) throw std::bad_alloc();
  return block;
}
void operator delete(void* block) noexcept { std::free(block); }
void operator delete(void* block, std::size_t /*bytes*/) noexcept { std::free(block); }
#endif

namespace arcus::test {
namespace {

namespace fs = std::filesystem;
using testing::TemporaryFolder;

/// Reads a file through: keys, tensors, every number.
template <class File>
void read_all(const File& file) {
  std::vector<float> values;
  for (const FileTensor& tensor : file.tensors()) {
    EXPECT_EQ(file.find(tensor.name), &tensor);
    EXPECT_EQ(std::ssize(file.bytes(tensor)), tensor.bytes);
    values.resize(static_cast<std::size_t>(tensor.num_elements()));
    file.read(tensor, 0, values);
  }
}

/// Spoils a file in one of the ways that files get spoilt or are spoilt on purpose.
std::string spoilt(std::string bytes, std::mt19937_64& random) {
  const auto draw = [&](std::size_t end) { return static_cast<std::size_t>(random() % end); };
  switch (draw(5)) {
    case 0:  // a flipped bit
      bytes[draw(bytes.size())] ^= static_cast<char>(1 << draw(8));
      break;
    case 1:  // another byte
      bytes[draw(bytes.size())] = static_cast<char>(random());
      break;
    case 2:  // the end is missing
      bytes.resize(draw(bytes.size()));
      break;
    case 3: {  // a huge or small number
      const std::uint64_t numbers[] = {0,
                                       1,
                                       5,
                                       std::uint64_t{1} << 31,
                                       std::uint64_t{1} << 61,
                                       std::uint64_t{1} << 63,
                                       ~std::uint64_t{0},
                                       random()};
      const std::size_t at = draw(bytes.size());
      std::memcpy(bytes.data() + at, &numbers[draw(8)],
                  std::min<std::size_t>(8, bytes.size() - at));
      break;
    }
    default:  // a piece twice
      const std::size_t at = draw(bytes.size());
      bytes.insert(draw(bytes.size()), bytes.substr(at, 1 + draw(20)));
  }
  return bytes;
}

/// Spoilt files read or throw Error, and never ask for much more memory than they are large.
template <class File>
void spoil_and_read(const std::vector<std::pair<std::string, std::string>>& files) {
  constexpr int kTries = 700;  // of each file
  const TemporaryFolder folder;
  const fs::path path = folder.path() / "file";
  std::mt19937_64 random(7);
  int read = 0;
  int refused = 0;
  for (const auto& [name, bytes] : files) {
    write_file(path, bytes);
    EXPECT_NO_THROW(read_all(File(path))) << name;
    for (int i = 0; i < kTries; ++i) {
      std::string changed = spoilt(bytes, random);
      if (!changed.empty() && i % 3 == 0) changed = spoilt(changed, random);
      write_file(path, changed);
      largest_allocation = 0;
      try {
        read_all(File(path));
        ++read;
      } catch (const Error& error) {
        ++refused;
        EXPECT_EQ(static_cast<int>(error.code()), static_cast<int>(ExitCode::data)) << error.what();
        EXPECT_CONTAINS(error.what(), path.string());
        EXPECT_EQ(std::string_view(error.what()).find('\n'), std::string_view::npos);
      }
      EXPECT_LE(largest_allocation, 16 * changed.size() + 4096) << name << " " << i;
    }
  }
  EXPECT_GT(read, 300);
  EXPECT_GT(refused, 1000);
}

TEST(Mutations, OfSafetensors) { spoil_and_read<SafetensorsFile>(small_safetensors()); }

TEST(Mutations, OfGguf) { spoil_and_read<GgufFile>(small_gguf()); }

}  // namespace
}  // namespace arcus::test
