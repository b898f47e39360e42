#include "src/data/manifest.hpp"

#include <algorithm>
#include <charconv>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "src/base/error.hpp"
#include "src/base/hash.hpp"
#include "src/data/mapped_file.hpp"

namespace arcus {
namespace {

using nlohmann::json;
constexpr const char* kFileName = "dataset.json";
constexpr const char* kFormat = "arcus-dataset";

std::uint64_t hash_from_hex(const std::string& text) {
  std::uint64_t value = 0;
  const auto result = std::from_chars(text.data(), text.data() + text.size(), value, 16);
  ARCUS_REQUIRE(text.size() == 16 && result.ptr == text.data() + text.size(), ExitCode::data,
                "\"{}\" is no hash of 16 hexadecimal digits", text);
  return value;
}

json to_json(const FileRecord& record) {
  json node = {{"file", record.file},
               {"file_bytes", record.file_bytes},
               {"dtype", std::string(name_of(record.dtype))},
               {"tokens", record.num_tokens},
               {"documents", record.num_documents},
               {"text_bytes", record.num_bytes},
               {"tokens_offset", record.tokens_offset},
               {"tokens_xxh3", hex(record.tokens_hash)},
               {"metadata_xxh3", hex(record.metadata_hash)}};
  if (record.num_targets) node["targets"] = *record.num_targets;
  return node;
}

FileRecord file_record(const json& node) {
  FileRecord record;
  record.file = node.at("file").get<std::string>();
  record.file_bytes = node.at("file_bytes").get<std::int64_t>();
  record.dtype = dtype_from_name(node.at("dtype").get<std::string>());
  record.num_tokens = node.at("tokens").get<std::int64_t>();
  if (node.contains("targets")) record.num_targets = node["targets"].get<std::int64_t>();
  record.num_documents = node.at("documents").get<std::int64_t>();
  record.num_bytes = node.at("text_bytes").get<std::int64_t>();
  record.tokens_offset = node.at("tokens_offset").get<std::int64_t>();
  record.tokens_hash = hash_from_hex(node.at("tokens_xxh3").get<std::string>());
  record.metadata_hash = hash_from_hex(node.at("metadata_xxh3").get<std::string>());
  const bool plausible = record.file == std::filesystem::path(record.file).filename() &&
                         record.num_tokens >= 0 && record.num_documents >= 0 &&
                         record.tokens_offset >= 0 && record.tokens_end() <= record.file_bytes &&
                         record.num_targets.value_or(0) >= 0 &&
                         record.num_targets.value_or(0) <= record.num_tokens;
  ARCUS_REQUIRE(plausible, ExitCode::data, "the entry of \"{}\" contradicts itself", record.file);
  return record;
}

json to_json(const Manifest& manifest) {
  json domains = json::array();
  for (const DomainRecord& domain : manifest.domains) {
    domains.push_back({{"name", domain.name},
                       {"train", to_json(domain.train)},
                       {"valid", to_json(domain.valid)}});
  }
  const bool masked =
      std::any_of(manifest.domains.begin(), manifest.domains.end(),
                  [](const DomainRecord& d) { return d.train.num_targets || d.valid.num_targets; });
  json root = {{"format", kFormat},
               {"version", masked ? Manifest::kVersionWithTargets : Manifest::kVersion},
               {"tokenizer",
                {{"kind", manifest.tokenizer_kind},
                 {"file", manifest.tokenizer_file},
                 {"xxh3", hex(manifest.tokenizer_hash)},
                 {"vocab_size", manifest.vocab_size},
                 {"eos_id", manifest.eos_id}}},
               {"made_by", manifest.made_by},
               {"domains", std::move(domains)}};
  if (!manifest.pair_template.empty()) root["pair_template"] = manifest.pair_template;
  return root;
}

void read_content(const json& root, Manifest& manifest) {
  const json& tokenizer = root.at("tokenizer");
  manifest.tokenizer_kind = tokenizer.at("kind").get<std::string>();
  manifest.tokenizer_file = tokenizer.at("file").get<std::string>();
  manifest.tokenizer_hash = hash_from_hex(tokenizer.at("xxh3").get<std::string>());
  manifest.vocab_size = tokenizer.at("vocab_size").get<std::int64_t>();
  manifest.eos_id = tokenizer.at("eos_id").get<std::int32_t>();
  manifest.made_by = root.at("made_by").get<std::string>();
  manifest.pair_template = root.value("pair_template", "");
  for (const json& node : root.at("domains")) {
    manifest.domains.push_back({node.at("name").get<std::string>(), file_record(node.at("train")),
                                file_record(node.at("valid"))});
  }
  ARCUS_REQUIRE(!manifest.domains.empty(), ExitCode::data, "it lists no domain");
}

}  // namespace

const char* name_of(Split split) { return split == Split::train ? "train" : "valid"; }

void Manifest::save(const std::filesystem::path& dir) const {
  json root = to_json(*this);
  root["xxh3"] = hex(hash_text(root.dump()));
  std::ofstream file(dir / kFileName);
  file << root.dump(2) << '\n';
  file.close();
  ARCUS_REQUIRE(file.good(), ExitCode::data, "cannot write {} (is the disk full?)",
                (dir / kFileName).string());
}

Manifest Manifest::load(const std::filesystem::path& dir) {
  const std::filesystem::path path = dir / kFileName;
  ARCUS_REQUIRE(std::filesystem::is_directory(dir), ExitCode::data,
                "{} is no folder; make a data set with `arcus prepare --out {}`", dir.string(),
                dir.string());
  ARCUS_REQUIRE(std::filesystem::exists(path), ExitCode::data,
                "{} does not exist: {} was not made by `arcus prepare`", path.string(),
                dir.string());
  const MappedFile file(path);
  try {
    json root = json::parse(file.bytes());
    ARCUS_REQUIRE(root.at("format") == kFormat, ExitCode::data, "its format is not \"{}\"",
                  kFormat);
    const auto version = root.at("version").get<std::int64_t>();
    ARCUS_REQUIRE(version == kVersion || version == kVersionWithTargets, ExitCode::data,
                  "it has format version {}, this program reads version {}, or {} of pairs; "
                  "prepare it again",
                  version, kVersion, kVersionWithTargets);
    const auto recorded = root.at("xxh3").get<std::string>();
    root.erase("xxh3");
    ARCUS_REQUIRE(recorded == hex(hash_text(root.dump())), ExitCode::data,
                  "its content does not match its hash");
    Manifest manifest;
    read_content(root, manifest);
    return manifest;
  } catch (const json::exception& error) {
    ARCUS_FAIL(ExitCode::data, "{} is damaged: {}; prepare the data again", path.string(),
               error.what());
  } catch (const Error& error) {
    ARCUS_FAIL(ExitCode::data, "{} cannot be used: {}", path.string(), error.what());
  }
}

std::uint64_t hash_file_without(const std::filesystem::path& path, std::int64_t begin,
                                std::int64_t end) {
  const MappedFile file(path);
  const std::string_view bytes = file.bytes();
  const auto first = std::min(bytes.size(), static_cast<std::size_t>(begin));
  const auto last = std::min(bytes.size(), static_cast<std::size_t>(end));
  StreamHash hash;
  hash.update(bytes.data(), first);
  hash.update(bytes.data() + last, bytes.size() - last);
  return hash.digest();
}

}  // namespace arcus
