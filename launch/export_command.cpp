#include <fcntl.h>
#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>

#include "checkpoints/files.hpp"
#include "launch/commands.hpp"
#include "launch/export_report.hpp"
#include "launch/portable.hpp"
#include "launch/run_setup.hpp"
#include "launch/session.hpp"
#include "launch/threads.hpp"
#include "src/base/hash.hpp"
#include "src/base/log.hpp"
#include "src/data/output_folder.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;

struct Arguments {
  std::string check;
  std::vector<std::string> sets;
  std::string checkpoint;
  std::string to;
  std::string out;
  std::string family = "auto";
  std::string dtype = "f32";
  std::string data;
  std::string name;
  bool verify = true;
  bool force = false;
};

constexpr const char* kFooter =
    "Writes the trained model for inference engines: a Hugging Face directory (transformers, "
    "vLLM,\n"
    "SGLang) or one GGUF file (llama.cpp). A family is chosen that computes exactly what the "
    "model\n"
    "does; where there is none, the keys that stand in the way are named. Low-rank adapters are\n"
    "merged into their weights. What was written is read back, evaluated on held-out text and\n"
    "compared with the checkpoint, number by number; only then does it appear under its name,\n"
    "with a report beside it.\n"
    "\n"
    "Examples:\n"
    "  arcus export --check my.toml                    # will what this trains be exportable?\n"
    "  arcus export --checkpoint runs/mine --to hf --out models/mine --dtype bf16\n"
    "  mpirun -np 4 arcus export --checkpoint runs/large --to gguf --out large.gguf";

FileType file_type_from_name(const std::string& name) {
  if (name == "f32") return FileType::f32;
  if (name == "bf16") return FileType::bf16;
  ARCUS_REQUIRE(name == "f16", ExitCode::usage, "--dtype {}: must be f32, bf16 or f16", name);
  return FileType::f16;
}

int check_config(const Arguments& arguments) {
  init_log(0, 1);
  const LoadedConfig loaded = try_load_config(arguments.check, arguments.sets);
  if (loaded.error) std::rethrow_exception(loaded.error);
  Config config = loaded.config;
  // The vocabulary decides nothing here, but has to be a number.
  if (config.model.vocab_size == 0) {
    const bool there = !config.run.data.empty() && fs::exists(config.run.data);
    config.model.vocab_size = there ? TokenDataset::open(config.run.data).vocab_size() : 256;
  }
  const PortableModel model = portable_model(config, resolve_model(config, nullptr));
  ExitCode code = ExitCode::usage;
  std::string reasons;
  for (const Target target : {Target::hf, Target::gguf}) {
    const char* const name = target == Target::hf ? "hf" : "gguf";
    try {
      const Family& family = choose_family(model, target);
      fmt::print("--to {:<4}  {}\n", name, target == Target::hf ? family.name : family.gguf_arch);
      for (const std::string& note : export_notes(model, family, target)) {
        fmt::print("           note: {}\n", note);
      }
      code = ExitCode::ok;
    } catch (const Error& error) {
      fmt::print("--to {:<4}  no: {}\n", name, error.what());
    }
  }
  return static_cast<int>(code);
}

/// Where an export is written before it takes its name: a folder, or a file beside it.
class Output {
 public:
  Output(const std::string& path, Target target, bool force) : path_(path), target_(target) {
    while (path_.size() > 1 && path_.back() == '/') path_.pop_back();
    ARCUS_REQUIRE(!path_.empty(), ExitCode::usage, "--out must name what to write");
    if (target == Target::hf) {
      if (force) check_replaceable();
      folder_.emplace(path_, force, FolderKind{"exported model", "config.json"});
      return;
    }
    ARCUS_REQUIRE(!fs::exists(path_) || force, ExitCode::data,
                  "{} exists; choose another file, or replace it with --force", path_);
    ARCUS_REQUIRE(!fs::exists(path_) || fs::is_regular_file(path_), ExitCode::data,
                  "{} is no file: it is not replaced, even with --force", path_);
    ARCUS_REQUIRE(!fs::exists(path_) || begins_with("GGUF"), ExitCode::data,
                  "{} exists and is no GGUF file: it is not replaced, even with --force", path_);
    const fs::path parent = fs::absolute(path_).parent_path();
    ARCUS_REQUIRE(fs::is_directory(parent), ExitCode::data, "the folder {} is not there",
                  parent.string());
    lock();
  }
  Output(const Output&) = delete;
  Output& operator=(const Output&) = delete;
  ~Output() {
    std::error_code ignored;
    fs::remove(report_partial(), ignored);
    if (lock_ < 0) return;
    if (!committed_) fs::remove(partial(), ignored);
    ::close(lock_);
  }

  fs::path partial() const { return folder_ ? folder_->partial() : fs::path(path_ + ".partial"); }
  const std::string& path() const { return path_; }
  /// Puts the export in its place, with its report, or without one where it was not verified.
  void commit(const std::string& report) {
    if (!report.empty()) files::write_synced(report_partial(), report);
    if (folder_) {
      folder_->commit();
    } else {
      files::rename_synced(partial(), fs::absolute(path_));
    }
    committed_ = true;
    if (!report.empty()) {
      files::rename_synced(report_partial(), fs::absolute(report_path()));
    } else {
      std::error_code ignored;
      fs::remove(report_path(), ignored);  // of an earlier export
    }
  }

 private:
  std::string report_path() const { return path_ + ".report.json"; }
  std::string report_partial() const { return report_path() + ".partial"; }

  bool begins_with(std::string_view magic) const {
    std::ifstream file(path_, std::ios::binary);
    std::string begin(magic.size(), ' ');
    file.read(begin.data(), static_cast<std::streamsize>(begin.size()));
    return begin == magic;
  }
  /// A folder that holds anything but files of an export is somebody's.
  void check_replaceable() const {
    if (!fs::is_directory(path_)) return;
    std::set<std::string> own = {"config.json", "generation_config.json", "README.md",
                                 "model.safetensors.index.json"};
    own.insert(hf_tokenizer_file_names().begin(), hf_tokenizer_file_names().end());
    for (const auto& entry : fs::directory_iterator(path_)) {
      const std::string name = entry.path().filename().string();
      const bool shard = name.starts_with("model") && name.ends_with(".safetensors");
      ARCUS_REQUIRE(entry.is_regular_file() && (shard || own.contains(name)), ExitCode::data,
                    "{} holds {}, which is no part of an exported model: it is not replaced, even "
                    "with --force",
                    path_, name);
    }
  }
  /// One writer at a time.
  void lock() {
    lock_ = ::open(partial().c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    ARCUS_REQUIRE(lock_ >= 0, ExitCode::data, "cannot create {}: {}", partial().string(),
                  std::strerror(errno));
    struct stat mine {
    }, there{};
    const bool only = ::flock(lock_, LOCK_EX | LOCK_NB) == 0 && ::fstat(lock_, &mine) == 0 &&
                      ::stat(partial().c_str(), &there) == 0 && mine.st_ino == there.st_ino;
    if (only) return;
    ::close(std::exchange(lock_, -1));
    ARCUS_FAIL(ExitCode::data, "another process is writing {}; wait for it", partial().string());
  }

  std::string path_;
  Target target_;
  std::optional<OutputFolder> folder_;
  int lock_ = -1;  ///< of a file's partial one
  bool committed_ = false;
};

/// Prints how far it is, where somebody watches or it takes long.
ExportProgress print_progress() {
  auto shown = std::make_shared<int>(0);
  return [shown](std::int64_t done, std::int64_t all) {
    constexpr std::int64_t kWorthIt = std::int64_t{1} << 30;
    const int tenth = static_cast<int>(10 * done / std::max<std::int64_t>(1, all));
    if (all < kWorthIt || tenth == *shown) return;
    *shown = tenth;
    spdlog::info("{} % of {:.1f} GB written", 10 * tenth, static_cast<double>(all) / 1e9);
  };
}

class Export {
 public:
  Export(Session& session, const Arguments& arguments) : session_(session), arguments_(arguments) {}

  ExitCode run() {
    session_.together([&] { prepare(); });
    session_.together([&] {
      if (session_.is_root()) write();
    });
    if (arguments_.verify) verify();
    session_.together([&] {
      if (session_.is_root()) finish();
    });
    return ExitCode::ok;
  }

 private:
  void prepare() {
    target_ = target_from_name(arguments_.to);
    source_.type = file_type_from_name(arguments_.dtype);
    checkpoint_ = open_checkpoint(locate_checkpoint(arguments_.checkpoint));
    config_ = from_toml(checkpoint_.info.config_text, "the checkpoint's configuration");
    const ModelConfig model = stored_model(checkpoint_, config_);
    source_.model = portable_model(config_, model);
    source_.family = &choose_family(source_.model, target_, arguments_.family);
    source_.read = read_from(checkpoint_, config_.lora);
    source_.name = arguments_.name.empty() ? default_name() : arguments_.name;
    tokenizer_ = stored_tokenizer(checkpoint_.info);
    source_.tokenizer = tokenizer_.get();
    ARCUS_REQUIRE(
        tokenizer_ == nullptr || tokenizer_->vocab_size() <= model.vocab_size, ExitCode::checkpoint,
        "{}: the tokenizer has {} ids, the embedding {} rows; such a checkpoint is "
        "damaged or was put together wrongly",
        checkpoint_.path.string(), tokenizer_ ? tokenizer_->vocab_size() : 0, model.vocab_size);
    if (!session_.is_root()) return;
    if (tokenizer_ == nullptr) {
      spdlog::warn("{} holds no tokenizer: none is written", checkpoint_.path.string());
    }
    report_.notes = export_notes(source_.model, *source_.family, target_);
    if (config_.lora.active()) {
      report_.notes.push_back(fmt::format(
          "the adapters of rank {} are merged into their weights, formed in fp64 and rounded once",
          config_.lora.rank));
    }
    for (const std::string& note : report_.notes) spdlog::info("note: {}", note);
    output_.emplace(arguments_.out, target_, arguments_.force);
  }

  std::string default_name() const {
    const fs::path run = fs::absolute(checkpoint_.path).parent_path().parent_path();
    return run.filename().string();
  }

  void write() {
    if (target_ == Target::hf) {
      write_hf(source_, output_->partial(), print_progress());
    } else {
      write_gguf(source_, output_->partial(), print_progress());
    }
  }

  void verify() {
    const std::string data = arguments_.data.empty() ? config_.run.data : arguments_.data;
    session_.together([&] {
      ARCUS_REQUIRE(arguments_.data.empty() || fs::exists(data), ExitCode::data,
                    "--data {}: no such folder", data);
    });
    const ProbeTexts texts =
        choose_probe_texts(session_, data, config_, source_.model.model.vocab_size);
    const std::int64_t longest = texts.longest();
    ProbeResult before = probe_checkpoint(texts, longest);
    if (config_.lora.active()) {
      ProbeResult merged = probe_units(source_.model, source_.read, texts, longest);
      if (session_.is_root()) report_.merging = compare(before, merged);
      before = std::move(merged);
    }
    std::optional<ModelFiles> files;
    session_.together([&] { files.emplace(written_path()); });
    const auto read = [&](const ModelUnit& unit, std::span<float> out) { files->read(unit, out); };
    const ProbeResult after = probe_units(files->model(), read, texts, longest);
    session_.together([&] {
      if (session_.is_root()) compare_all(*files, texts, before, after);
    });
  }

  ProbeResult probe_checkpoint(const ProbeTexts& texts, std::int64_t seq_len) {
    LoadedModel loaded = load_for_logits(session_, checkpoint_.path, {}, seq_len, /*exact=*/true);
    return probe(*loaded.instance, texts);
  }

  /// Where rank 0 has written.
  fs::path written_path() {
    return broadcast_text(session_.comm(), session_.stream(),
                          session_.is_root() ? output_->partial().string() : std::string());
  }

  /// What a model computes whose numbers `read` gives.
  ProbeResult probe_units(const PortableModel& model, const UnitReader& read,
                          const ProbeTexts& texts, std::int64_t seq_len) {
    Stream stream(set_up_threads(ParallelConfig(), session_.comm(), session_.stream()));
    const int ep_size = resolve_ep_size(0, session_.comm().size(), model.model.num_experts);
    ModelInstance instance(make_process_groups(session_.comm(), ep_size), stream,
                           probe_options(model.model, model.routing, model.overrides, seq_len));
    session_.together([&] {
      std::set<std::string> names;
      for (const TensorSpec& spec : portable_tensors(model)) names.insert(spec.name);
      for (const StateView& view : instance.parameter_views()) {
        if (names.contains(view.spec.name)) fill_units(view, read);
      }
    });
    instance.finish_reading();
    instance.build_primitives();
    return probe(instance, texts);
  }

  void compare_all(const ModelFiles& files, const ProbeTexts& texts, const ProbeResult& before,
                   const ProbeResult& after) {
    report_.source = &source_;
    report_.target = target_;
    report_.checkpoint = checkpoint_.path.string();
    report_.step = checkpoint_.info.step;
    report_.digest = hex(checkpoint_.digest());
    report_.text_source = texts.source;
    report_.tensors = compare_tensors(source_, files);
    report_.model = compare(before, after);
    ARCUS_REQUIRE(report_.tensors.not_finite.empty(), ExitCode::checkpoint,
                  "{}: {} holds numbers that are not finite; such a model is not exported",
                  checkpoint_.path.string(), report_.tensors.not_finite);
    const std::string failure = report_.failure();
    ARCUS_REQUIRE(failure.empty(), ExitCode::internal,
                  "what was written is not what the checkpoint holds: {}; nothing is kept",
                  failure);
    verified_ = true;
  }

  void finish() {
    if (target_ == Target::hf) {
      files::write_synced(
          output_->partial() / "README.md",
          model_card(source_, verified_ ? &report_ : nullptr, checkpoint_.info.config_text,
                     checkpoint_.info.created_by, checkpoint_.info.step, data_description()));
    }
    output_->commit(verified_ ? report_.json().dump(2) + "\n" : std::string());
    fmt::print("{}: {}, {}, {:.1f} MB\n", output_->path(),
               target_ == Target::hf ? source_.family->name : source_.family->gguf_arch,
               name_of(source_.type), static_cast<double>(export_bytes(source_, target_)) / 1e6);
    if (!verified_) return;
    fmt::print("verified: {}\n", report_.summary());
    if (source_.type != FileType::f32) {
      fmt::print("perplexity: checkpoint {:.6g}, export {:.6g}\n",
                 std::exp(report_.model.loss_before), std::exp(report_.model.loss_after));
    }
  }

  std::string data_description() const {
    std::string text;
    for (const DomainConfig& domain : config_.data.domains) {
      text += fmt::format("{}{} (weight {})", text.empty() ? "Text: " : ", ", domain.name,
                          domain.weight);
    }
    if (text.empty()) text = "Text: " + (config_.run.data.empty() ? "unknown" : config_.run.data);
    return text + ".";
  }

  Session& session_;
  const Arguments& arguments_;
  Target target_ = Target::hf;
  Checkpoint checkpoint_;
  Config config_;
  ExportSource source_;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::optional<Output> output_;  ///< rank 0
  ExportReport report_;
  bool verified_ = false;
};

}  // namespace

void add_export_command(CLI::App& app, Action& action) {
  CLI::App* command =
      app.add_subcommand("export", "The trained model as files of inference engines");
  auto args = std::make_shared<Arguments>();
  CLI::Option* check = command->add_option("--check", args->check,
                                           "say which family a configuration can be exported as");
  check->type_name("CONFIG.toml");
  command->add_option("--set", args->sets, "with --check: override a key of the file")
      ->needs(check)
      ->expected(1)
      ->take_all()
      ->type_name("KEY=VALUE");
  command->add_option("--checkpoint", args->checkpoint, "run folder or checkpoint")
      ->excludes(check)
      ->type_name("DIR");
  command->add_option("--to", args->to, "hf (a directory) or gguf (a file)")->type_name("WHAT");
  command->add_option("--out", args->out, "what to write")->type_name("PATH");
  command->add_option("--family", args->family, "auto, or the family to write")
      ->capture_default_str()
      ->type_name("NAME");
  command->add_option("--dtype", args->dtype, "of the matrices: f32, bf16 or f16")
      ->capture_default_str()
      ->type_name("TYPE");
  command
      ->add_option("--data", args->data,
                   "data set whose held-out text is compared on; default: the run's")
      ->type_name("DIR");
  command->add_option("--name", args->name, "the model's name; default: the run folder's")
      ->type_name("NAME");
  command->add_flag("--verify,!--no-verify", args->verify,
                    "read back and compare what was written (on by default)");
  command->add_flag("--force", args->force, "replace an earlier export");
  command->footer(kFooter);
  command->callback([&action, args] {
    if (!args->check.empty()) {
      action = once([args] { return check_config(*args); });
      return;
    }
    for (const auto& [option, value] :
         {std::pair{"--checkpoint", &args->checkpoint}, std::pair{"--to", &args->to},
          std::pair{"--out", &args->out}}) {
      if (value->empty()) throw CLI::RequiredError(option);
    }
    action = [args] {
      return run_session({}, [args](Session& session) { return Export(session, *args).run(); });
    };
  });
}

}  // namespace arcus
