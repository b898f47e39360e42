#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <filesystem>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "checkpoints/interop/model_files.hpp"
#include "launch/commands.hpp"
#include "launch/new_run.hpp"
#include "launch/run_folder.hpp"
#include "launch/run_setup.hpp"
#include "launch/session.hpp"
#include "launch/version.hpp"
#include "src/base/error.hpp"

namespace arcus {
namespace {

struct Arguments {
  std::string from;
  std::string out;
  std::vector<std::string> ignored_keys;
  std::vector<std::string> sets;
};

constexpr const char* kFooter =
    "Reads a Hugging Face directory (config.json, safetensors, tokenizer) or a GGUF file and "
    "writes\n"
    "the first checkpoint of a new run folder, for eval, generate, upcycle, export and\n"
    "`arcus train --init`. Every tensor is used once and every number kept (F32, F16, BF16; Q8_0,\n"
    "Q4_0 and Q4_1 are dequantised); what Arcus does not compute is refused by name.\n"
    "A large model goes through several ranks' memory: mpirun -np 4 arcus import ...\n"
    "\n"
    "Examples:\n"
    "  arcus import --from models/olmoe --out runs/olmoe\n"
    "  arcus import --from llama.gguf --out runs/llama && arcus eval runs/llama --data data/books";

/// The configuration of a run that starts from imported weights.
Config imported_config(const PortableModel& model, const Arguments& arguments) {
  Config config;
  config.model = model.model;
  config.routing = model.routing;
  config.model.max_positions = model.context_length;
  config.run.dir = arguments.out;
  constexpr std::int64_t kUsualLength = 2048;
  config.train.seq_len =
      model.context_length > 0 ? std::min(model.context_length, kUsualLength) : kUsualLength;
  config.train.micro_batch_seqs = 1;
  for (const std::string& assignment : arguments.sets) {
    ARCUS_REQUIRE(!assignment.starts_with("model."), ExitCode::usage,
                  "--set {}: what the model is comes from its files; leave it out", assignment);
    apply_set(config, assignment);
  }
  validate(config);
  return config;
}

/// One tensor of the model, all units.
std::vector<char> read_tensor(const ModelFiles& files, const TensorSpec& spec) {
  const std::int64_t unit_size = spec.num_elements() / spec.num_units;
  std::vector<char> bytes(static_cast<std::size_t>(spec.num_elements()) * sizeof(float));
  auto* values = reinterpret_cast<float*>(bytes.data());
  for (std::int64_t unit = 0; unit < spec.num_units; ++unit) {
    files.read({spec.name, unit}, {values + unit * unit_size, static_cast<std::size_t>(unit_size)});
  }
  ARCUS_REQUIRE(all_finite({values, static_cast<std::size_t>(spec.num_elements())}), ExitCode::data,
                "{} holds numbers that are not finite; the model is damaged", spec.name);
  return bytes;
}

CheckpointInfo imported_info(const Config& config, const Tokenizer* tokenizer) {
  CheckpointInfo info{.config_text = to_toml(config),
                      .run_id = new_run_id(),
                      .created_by = "arcus " + version_line() + ", import"};
  if (tokenizer == nullptr) return info;
  info.extra[extra_key::kTokenizerKind] = tokenizer->kind();
  info.extra[extra_key::kTokenizer] = tokenizer->serialized();
  return info;
}

void check_vocabulary(const ModelFiles& files, const Tokenizer* tokenizer,
                      const std::string& from) {
  if (tokenizer == nullptr) {
    spdlog::warn(
        "{} has no tokenizer: the model can be evaluated on ids only, and trained on data "
        "that was prepared with the right one",
        from);
    return;
  }
  const std::int64_t rows = files.model().model.vocab_size;
  ARCUS_REQUIRE(tokenizer->vocab_size() <= rows, ExitCode::data,
                "{}: the tokenizer has {} ids, the embedding {} rows; they do not belong together",
                from, tokenizer->vocab_size(), rows);
}

ExitCode run_on_ranks(Session& session, const Arguments& arguments) {
  std::optional<ModelFiles> files;
  std::unique_ptr<Tokenizer> tokenizer;
  Config config;
  session.together([&] {
    files.emplace(arguments.from, std::set<std::string>(arguments.ignored_keys.begin(),
                                                        arguments.ignored_keys.end()));
    tokenizer = files->tokenizer();
    config = imported_config(files->model(), arguments);
    if (session.is_root()) check_vocabulary(*files, tokenizer.get(), arguments.from);
  });
  NewRun run(session, arguments.out);
  const SaveReport report =
      run.save(imported_info(config, tokenizer.get()), files->tensors(),
               [&](const TensorSpec& spec) { return read_tensor(*files, spec); });
  if (!session.is_root()) return ExitCode::ok;
  for (const std::string& note : files->notes()) spdlog::info("note: {}", note);
  fmt::print(
      "{}: {} from {}, {} tensors, {:.1f} MB, tokenizer {}\n", report.path.string(),
      files->family().name, arguments.from, files->tensors().size(),
      static_cast<double>(report.bytes) / 1e6,
      tokenizer ? fmt::format("{} of {} ids", tokenizer->kind(), tokenizer->vocab_size()) : "none");
  return ExitCode::ok;
}

}  // namespace

void add_import_command(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand("import", "A run from another program's model files");
  auto args = std::make_shared<Arguments>();
  command->add_option("--from", args->from, "Hugging Face directory or GGUF file")
      ->required()
      ->type_name("PATH");
  command->add_option("--out", args->out, "folder of the new run")->required()->type_name("DIR");
  command
      ->add_option("--ignore-key", args->ignored_keys,
                   "an unknown key of the description that changes nothing; may be given again")
      ->expected(1)
      ->take_all()
      ->type_name("KEY");
  command
      ->add_option("--set", args->sets, "a key of the new run's configuration; may be given again")
      ->expected(1)
      ->take_all()
      ->type_name("KEY=VALUE");
  command->footer(kFooter);
  command->callback([&action, args] {
    action = [args] {
      return run_session({}, [args](Session& session) { return run_on_ranks(session, *args); });
    };
  });
}

}  // namespace arcus
