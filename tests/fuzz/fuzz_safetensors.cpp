#include "checkpoints/interop/safetensors.hpp"
#include "tests/fuzz/fuzz.hpp"
#include "tests/fuzz/read_through.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace arcus;
  fuzz::set_file_contents(fuzz::view(data, size));
  fuzz::takes_or_refuses([&] { fuzz::read_through(SafetensorsFile("input"), size); });
  fuzz::takes_or_refuses([&] {
    const auto ignored = [](std::string_view name) { return name.size() % 2 == 0; };
    fuzz::read_through(SafetensorsFile("input", ignored), size);
  });
  return 0;
}
