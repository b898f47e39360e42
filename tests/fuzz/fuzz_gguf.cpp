#include "checkpoints/interop/gguf.hpp"
#include "tests/fuzz/fuzz.hpp"
#include "tests/fuzz/read_through.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace arcus;
  fuzz::set_file_contents(fuzz::view(data, size));
  fuzz::takes_or_refuses([&] {
    const GgufFile file("input");
    fuzz::read_through(file, size);
    for (const auto& entry : file.keys()) {
      const std::string& key = entry.first;
      fuzz::takes_or_refuses([&] { file.text(key); });
      fuzz::takes_or_refuses([&] { file.integer(key); });
      fuzz::takes_or_refuses([&] { file.number(key); });
      fuzz::takes_or_refuses([&] { file.flag(key); });
      fuzz::takes_or_refuses([&] { file.integers(key); });
      fuzz::takes_or_refuses([&] { file.numbers(key); });
      fuzz::takes_or_refuses([&] { file.texts(key); });
    }
  });
  return 0;
}
