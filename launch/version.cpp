#include "launch/version.hpp"

#include <fmt/format.h>
#include <spdlog/version.h>

#include <toml++/toml.h>
#include <CLI/Version.hpp>
#include <nlohmann/json.hpp>

#include "comm/backends.hpp"
#include "kernels/backend.hpp"
#include "launch/git_commit.hpp"

namespace arcus {
namespace {

std::string compiler() {
#if defined(__clang__)
  return fmt::format("clang {}", __clang_version__);
#else
  return fmt::format("g++ {}", __VERSION__);
#endif
}

/// The widest vector instructions that the compiler was allowed to use.
std::string compiled_vectors() {
#if defined(__AVX512BF16__)
  return "AVX-512 with BF16";
#elif defined(__AVX512F__)
  return "AVX-512";
#elif defined(__AVX2__)
  return "AVX2";
#elif defined(__AVX__)
  return "AVX";
#elif defined(__SSE2__)
  return "SSE2";
#else
  return "no vector instructions known to Arcus";
#endif
}

std::string header_libraries() {
  return fmt::format(
      "fmt {}.{}.{}, spdlog {}.{}.{}, CLI11 {}, toml++ {}.{}.{}, nlohmann-json {}.{}.{}",
      FMT_VERSION / 10000, FMT_VERSION / 100 % 100, FMT_VERSION % 100, SPDLOG_VER_MAJOR,
      SPDLOG_VER_MINOR, SPDLOG_VER_PATCH, CLI11_VERSION, TOML_LIB_MAJOR, TOML_LIB_MINOR,
      TOML_LIB_PATCH, NLOHMANN_JSON_VERSION_MAJOR, NLOHMANN_JSON_VERSION_MINOR,
      NLOHMANN_JSON_VERSION_PATCH);
}

}  // namespace

std::string version_line() { return fmt::format("{} ({})", ARCUS_VERSION, kGitCommit); }

std::string version_text() {
  const Backend products = backend();
  return fmt::format(
      "arcus {}\n"
      "commit      {}\n"
      "build       {}, {}\n"
      "compiled    -march={}: {}\n"
      "running on  {}\n"
      "libraries   {}; {}; HDF5 {}; hwloc {}; SentencePiece {}; xxHash {}\n"
      "            {}",
      ARCUS_VERSION, kGitCommit, ARCUS_BUILD_TYPE, compiler(), ARCUS_ARCH_NAME, compiled_vectors(),
      products.instruction_sets, MpiSession::library_version(), products.library,
      ARCUS_HDF5_VERSION, ARCUS_HWLOC_VERSION, ARCUS_SENTENCEPIECE_VERSION, ARCUS_XXHASH_VERSION,
      header_libraries());
}

}  // namespace arcus
