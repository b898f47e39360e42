#include "launch/tokenizer_source.hpp"

#include <filesystem>

#include "checkpoints/checkpoint.hpp"
#include "checkpoints/interop/gguf.hpp"
#include "checkpoints/interop/tokenizer_files.hpp"
#include "launch/portable.hpp"
#include "src/base/error.hpp"
#include "src/data/dataset.hpp"
#include "src/data/mapped_file.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;

std::string read_all(const fs::path& path) {
  ARCUS_REQUIRE(fs::is_regular_file(path), ExitCode::data, "{} is no file", path.string());
  return std::string(MappedFile(path).bytes());
}

/// Errors inside a tokenizer name its file alone; here it is known where that lies.
template <class Make>
std::unique_ptr<Tokenizer> naming(const std::string& path, const Make& make) {
  try {
    return make();
  } catch (const Error& error) {
    ARCUS_FAIL(error.code(), "{}: {}", path, error.what());
  }
}

std::unique_ptr<Tokenizer> from_directory(const fs::path& given) {
  const fs::path dir = fs::is_directory(given) ? given : given.parent_path();
  ARCUS_REQUIRE(fs::is_directory(given) || given.filename() == "tokenizer.json", ExitCode::data,
                "{} is neither a directory nor a tokenizer.json", given.string());
  TokenizerFiles files;
  for (const std::string& name : hf_tokenizer_file_names()) {
    if (fs::exists(dir / name)) files[name] = read_all(dir / name);
  }
  auto tokenizer = naming(dir.string(), [&] { return tokenizer_from_hf(files); });
  ARCUS_REQUIRE(tokenizer != nullptr, ExitCode::data,
                "{} has no tokenizer: neither tokenizer.json nor tokenizer.model nor vocab.json "
                "with merges.txt",
                dir.string());
  return tokenizer;
}

std::unique_ptr<Tokenizer> from_model(const fs::path& path) {
  const TokenizerFiles files{{"tokenizer.model", read_all(path)}};
  return naming(path.string(), [&] { return tokenizer_from_hf(files); });
}

std::unique_ptr<Tokenizer> from_gguf(const fs::path& path) {
  const GgufFile file(path);
  auto tokenizer = naming(path.string(), [&] { return tokenizer_from_gguf(file); });
  ARCUS_REQUIRE(tokenizer != nullptr, ExitCode::data, "{} has no vocabulary", path.string());
  return tokenizer;
}

std::unique_ptr<Tokenizer> from_checkpoint(const std::string& path) {
  const Checkpoint checkpoint = open_checkpoint(locate_checkpoint(path));
  auto tokenizer =
      naming(checkpoint.path.string(), [&] { return stored_tokenizer(checkpoint.info); });
  ARCUS_REQUIRE(tokenizer != nullptr, ExitCode::checkpoint, "{} holds no tokenizer",
                checkpoint.path.string());
  return tokenizer;
}

std::unique_ptr<Tokenizer> from_dataset(const std::string& dir) {
  const TokenDataset dataset = TokenDataset::open(dir);
  return load_tokenizer(dataset.tokenizer().kind(), dataset.tokenizer().serialized());
}

}  // namespace

std::unique_ptr<Tokenizer> open_tokenizer_source(const std::string& source) {
  if (source == "bytes") return load_tokenizer("bytes", "");
  const std::size_t colon = source.find(':');
  if (colon == std::string::npos) return nullptr;
  const std::string kind = source.substr(0, colon);
  const std::string path = source.substr(colon + 1);
  if (kind == "hf") return from_directory(path);
  if (kind == "model") return from_model(path);
  if (kind == "gguf") return from_gguf(path);
  if (kind == "checkpoint") return from_checkpoint(path);
  if (kind == "data") return from_dataset(path);
  return nullptr;
}

}  // namespace arcus
