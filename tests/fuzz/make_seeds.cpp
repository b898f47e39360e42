#include <fmt/format.h>

#include <filesystem>

#include "tests/checkpoints/interop/small_files.hpp"

// Writes the seeds of the fuzzers of containers below a folder: make_seeds FOLDER.
int main(int argc, char** argv) {
  using namespace arcus::test;
  if (argc != 2) return 64;
  const auto write = [&](const char* name, const auto& files) {
    const auto folder = std::filesystem::path(argv[1]) / name;
    std::filesystem::create_directories(folder);
    for (const auto& [file, bytes] : files) write_file(folder / file, bytes);
  };
  write("safetensors", small_safetensors());
  write("gguf", small_gguf());
  return 0;
}
