#include <fmt/format.h>

#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "checkpoints/checkpoint.hpp"
#include "checkpoints/inspect.hpp"
#include "launch/commands.hpp"
#include "src/base/error.hpp"
#include "src/base/hash.hpp"
#include "src/base/log.hpp"
#include "src/data/dataset.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

struct Arguments {
  std::string path;
  bool json = false;
  bool digest = false;
  bool verify = false;
  bool config = false;
  std::string text;  ///< a domain
};

constexpr const char* kFooter =
    "PATH is a checkpoint, a run folder (its latest checkpoint) or a data set made by `arcus\n"
    "prepare`; a file of a checkpoint or data set stands for the whole.\n"
    "\n"
    "Examples:\n"
    "  arcus inspect runs/first                   # latest checkpoint, every tensor\n"
    "  arcus inspect runs/first --digest          # one hash over all tensors, equal for any "
    "layout\n"
    "  arcus inspect runs/first --config > again.toml\n"
    "  arcus inspect data/books --verify          # read every byte and compare checksums\n"
    "  arcus inspect data/books --held-out prose | xz -9e | wc -c";

bool is_dataset(const fs::path& dir) { return fs::exists(dir / "dataset.json"); }

/// The folder that `path` means: itself, or the folder of a file given by name.
fs::path folder_of(const std::string& path) {
  fs::path given(path);
  ARCUS_REQUIRE(fs::exists(given), ExitCode::usage,
                "{} does not exist; give a checkpoint, a run folder or a data set", path);
  if (fs::is_directory(given)) return given;
  fs::path parent = given.has_parent_path() ? given.parent_path() : fs::path(".");
  ARCUS_REQUIRE(is_dataset(parent) || fs::exists(parent / "index.h5"), ExitCode::usage,
                "{} is no part of a checkpoint or a data set; give one of their folders", path);
  return parent;
}

Json domain_json(const DomainRecord& domain) {
  Json json = {{"name", domain.name}};
  for (const Split split : kSplits) {
    const FileRecord& file = domain.file(split);
    json[name_of(split)] = {{"file", file.file},
                            {"documents", file.num_documents},
                            {"bytes", file.num_bytes},
                            {"tokens", file.num_tokens},
                            {"dtype", std::string(name_of(file.dtype))},
                            {"hash", hex(file.tokens_hash)}};
    if (file.num_targets) json[name_of(split)]["targets"] = *file.num_targets;
  }
  return json;
}

Json dataset_json(const TokenDataset& dataset, const fs::path& path) {
  const Manifest& manifest = dataset.manifest();
  Json json = {{"kind", "dataset"},
               {"path", path.string()},
               {"tokenizer", manifest.tokenizer_kind},
               {"vocab_size", dataset.vocab_size()},
               {"fingerprint", hex(dataset.fingerprint())},
               {"made_by", manifest.made_by}};
  if (!manifest.pair_template.empty()) json["pair_template"] = manifest.pair_template;
  for (const DomainRecord& domain : manifest.domains)
    json["domains"].push_back(domain_json(domain));
  return json;
}

void print_dataset(const TokenDataset& dataset, const fs::path& path) {
  const Manifest& manifest = dataset.manifest();
  fmt::print("data set     {}\n", path.string());
  fmt::print("tokenizer    {}, vocabulary {}\n", manifest.tokenizer_kind, dataset.vocab_size());
  fmt::print("fingerprint  {}\n", hex(dataset.fingerprint()));
  fmt::print("made by      {}\n", manifest.made_by);
  if (!manifest.pair_template.empty()) fmt::print("pairs        {}\n", manifest.pair_template);
  fmt::print("\n");
  fmt::print("{:<16} {:<6} {:>10} {:>14} {:>14}\n", "domain", "split", "documents", "bytes",
             "tokens");
  for (const DomainRecord& domain : manifest.domains) {
    for (const Split split : kSplits) {
      const FileRecord& file = domain.file(split);
      fmt::print("{:<16} {:<6} {:>10} {:>14} {:>14}{}\n", domain.name, name_of(split),
                 file.num_documents, file.num_bytes, file.num_tokens,
                 file.num_targets ? fmt::format(", {} learned", *file.num_targets) : "");
    }
  }
}

/// The held-out documents of a domain, one after the other, as bytes.
void print_held_out(const TokenDataset& dataset, const std::string& domain) {
  const TokenFile& file = dataset.file(dataset.domain_idx(domain), Split::valid);
  for (std::int64_t document = 0; document < file.num_documents(); ++document) {
    const auto [begin, end] = file.document_range(document);
    std::vector<std::int32_t> ids(static_cast<std::size_t>(end - begin));
    file.read(begin, ids);
    const std::string text = dataset.tokenizer().decode(ids);
    std::fwrite(text.data(), 1, text.size(), stdout);
  }
}

int inspect_dataset(const Arguments& arguments, const fs::path& path) {
  ARCUS_REQUIRE(!arguments.config, ExitCode::usage, "{} is a data set; --config is for checkpoints",
                path.string());
  const TokenDataset dataset = TokenDataset::open(path, arguments.verify);
  if (!arguments.text.empty()) {
    print_held_out(dataset, arguments.text);
  } else if (arguments.digest) {
    fmt::print("{}\n", hex(dataset.fingerprint()));
  } else if (arguments.json) {
    fmt::print("{}\n", dataset_json(dataset, path).dump(2));
  } else {
    print_dataset(dataset, path);
    if (arguments.verify) fmt::print("\nall files are whole\n");
  }
  return static_cast<int>(ExitCode::ok);
}

int inspect_checkpoint(const Arguments& arguments, const fs::path& path) {
  ARCUS_REQUIRE(arguments.text.empty(), ExitCode::usage,
                "{} is no data set; --held-out prints text of one", path.string());
  const Checkpoint checkpoint = open_checkpoint(locate_checkpoint(path));
  if (arguments.verify) verify_checkpoint(checkpoint);
  if (arguments.digest) {
    fmt::print("{}\n", hex(checkpoint.digest()));
  } else if (arguments.config) {
    fmt::print("{}", checkpoint.info.config_text);
  } else if (arguments.json) {
    fmt::print("{}\n", describe_json(checkpoint).dump(2));
  } else {
    fmt::print("{}", describe_text(checkpoint));
    if (arguments.verify) fmt::print("\nall tensors and files are whole\n");
  }
  return static_cast<int>(ExitCode::ok);
}

int run_inspect(const Arguments& arguments) {
  init_log(0, 1);
  const fs::path folder = folder_of(arguments.path);
  return is_dataset(folder) ? inspect_dataset(arguments, folder)
                            : inspect_checkpoint(arguments, folder);
}

}  // namespace

void add_inspect_command(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand("inspect", "Show what a checkpoint or a data set holds");
  auto args = std::make_shared<Arguments>();
  command->add_option("path", args->path, "checkpoint, run folder or data set")->required();
  CLI::Option* json = command->add_flag("--json", args->json, "everything, as JSON");
  command
      ->add_flag("--digest", args->digest,
                 "one hash over the content, from the stored hashes; with --verify they are "
                 "compared with the data first")
      ->excludes(json);
  command->add_flag("--config", args->config, "the run's configuration")
      ->excludes(json)
      ->excludes("--digest");
  command->add_option("--held-out", args->text, "print the held-out text of this domain")
      ->excludes(json)
      ->type_name("DOMAIN");
  command->add_flag("--verify", args->verify, "read all of it and compare every checksum");
  command->footer(kFooter);
  command->callback([&action, args] { action = once([args] { return run_inspect(*args); }); });
}

}  // namespace arcus
