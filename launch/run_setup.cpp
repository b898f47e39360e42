#include "launch/run_setup.hpp"

#include <spdlog/spdlog.h>

#include <functional>
#include <set>
#include <span>
#include <string_view>

#include "launch/threads.hpp"
#include "src/base/error.hpp"

namespace arcus {
namespace {

constexpr std::int64_t kVerifyAtStartBytes = std::int64_t{4} << 30;

std::int64_t total_file_bytes(const TokenDataset& dataset) {
  std::int64_t bytes = 0;
  for (const DomainRecord& domain : dataset.manifest().domains) {
    bytes += domain.train.file_bytes + domain.valid.file_bytes;
  }
  return bytes;
}

/// Settings of a stored configuration that say how to run, not what was trained.
void forget_layout(Config& config) {
  config.parallel = ParallelConfig();
  config.run.device = RunConfig().device;
}

}  // namespace

TrainerOptions trainer_options(const Config& config, const ModelConfig& model) {
  return {.model = model,
          .routing = config.routing,
          .overrides = resolve_overrides(config),
          .train = config.train,
          .groups = config.groups,
          .lora = config.lora,
          .seed = config.run.seed,
          .reproducible = config.run.reproducible,
          .dispatch_path = dispatch_path_from_name(config.parallel.dispatch)};
}

ModelConfig resolve_model(const Config& config, const TokenDataset* dataset) {
  ARCUS_REQUIRE(config.model.vocab_size > 0 || dataset != nullptr, ExitCode::usage,
                "model.vocab_size is \"auto\" but no data is given; set run.data or vocab_size "
                "(256 for bytes)");
  const std::int64_t data_vocab =
      dataset != nullptr ? dataset->vocab_size() : config.model.vocab_size;
  ModelConfig model = resolve(config.model, data_vocab);
  ARCUS_REQUIRE(model.vocab_size >= data_vocab, ExitCode::data,
                "the data has a vocabulary of {} but model.vocab_size is {}; set it to {} or "
                "\"auto\", or prepare the data with another tokenizer",
                data_vocab, model.vocab_size, data_vocab);
  return model;
}

TokenDataset open_dataset(Session& session, const std::filesystem::path& dir) {
  std::optional<TokenDataset> dataset;
  // The others read what rank 0 has found whole.
  session.together([&] {
    if (!session.is_root()) return;
    dataset.emplace(TokenDataset::open(dir));
    if (total_file_bytes(*dataset) <= kVerifyAtStartBytes) {
      dataset.emplace(TokenDataset::open(dir, /*verify=*/true));
    } else {
      spdlog::info("large data: checksums are not compared now; `arcus inspect --verify {}` does",
                   dir.string());
    }
  });
  session.together([&] {
    if (!session.is_root()) dataset.emplace(TokenDataset::open(dir));
  });
  return std::move(*dataset);
}

void check_device(const Config& config) {
  ARCUS_REQUIRE(config.run.device != "cuda", ExitCode::usage,
                "run.device is \"cuda\" but this binary was built without CUDA; set it to \"auto\" "
                "or \"cpu\"");
  ARCUS_REQUIRE(config.parallel.comm != "nccl", ExitCode::usage,
                "parallel.comm is \"nccl\" but this binary was built without NCCL; set it to "
                "\"auto\" or \"mpi\"");
}

void check_same_config(Session& session, const Config& config) {
  const auto texts = gather_texts(session.comm(), session.stream(), to_toml(config));
  session.together([&] {
    for (std::size_t rank = 1; rank < texts.size(); ++rank) {
      ARCUS_REQUIRE(texts[rank] == texts[0], ExitCode::usage,
                    "rank {} read another configuration than rank 0; give all ranks the same file "
                    "and --set options",
                    rank);
    }
  });
}

namespace {

LoadedConfig try_to(const std::function<Config()>& load) {
  LoadedConfig loaded;
  try {
    loaded.config = load();
    validate(loaded.config);
    check_device(loaded.config);
  } catch (...) {
    loaded.error = std::current_exception();
  }
  return loaded;
}

/// What decides what the model is.
struct ModelSource {
  std::optional<Checkpoint> checkpoint;  ///< none: the file alone
  std::vector<std::string> fresh;        ///< of it; what a run goes on with is never fresh
};
ModelSource model_of_run(const Config& config, const RunStart& start) {
  std::vector<std::filesystem::path> own;
  if (start.resume == "auto") {
    if (!config.run.dir.empty()) own = list_checkpoints(config.run.dir);
  } else if (start.resume != "none" && std::filesystem::exists(start.resume)) {
    own.push_back(locate_checkpoint(start.resume));
  }
  for (const std::filesystem::path& path : own) {
    try {
      Checkpoint checkpoint = open_checkpoint(path);
      if (!checkpoint.info.extra.contains(extra_key::kInitFrom)) return {};
      return {std::move(checkpoint), {}};
    } catch (const Error&) {
      // Damaged: the run will say so, and go on from the one before.
    }
  }
  if (start.init.path.empty()) return {};
  return {open_checkpoint(locate_checkpoint(start.init.path)), start.init.fresh};
}

}  // namespace

LoadedConfig try_load_config(const std::filesystem::path& file,
                             const std::vector<std::string>& sets) {
  return try_to([&] { return load_config(file, sets); });
}

LoadedConfig try_load_run_config(const std::filesystem::path& file,
                                 const std::vector<std::string>& sets, const RunStart& start) {
  return try_to([&] {
    Config config = load_config(file, sets);
    const auto [model, fresh] = model_of_run(config, start);
    if (!model) return config;
    const Config stored =
        from_toml(model->info.config_text, model->path.string() + " (configuration)");
    return load_config_on(file, sets, stored, model->path, fresh);
  });
}

namespace {

/// fn(), whose complaints about the checkpoint at `path` name another one of the run to try.
template <class Fn>
auto naming_others(const std::filesystem::path& path, Fn&& fn) {
  try {
    return fn();
  } catch (const Error& error) {
    if (error.code() != ExitCode::checkpoint) throw;
    std::error_code ignored;
    for (const auto& other : list_checkpoints(path.parent_path().parent_path())) {
      if (std::filesystem::equivalent(other, path, ignored)) continue;
      throw Error(
          error.code(),
          fmt::format("{}; another checkpoint of the run is {}", error.what(), other.string()),
          error.file(), error.line());
    }
    throw;
  }
}

/// A configuration that leaves out part of what the model computes with is another model.
void check_all_used(const std::filesystem::path& path, const Checkpoint& checkpoint,
                    std::span<const StateView> views) {
  std::set<std::string_view> used;
  for (const StateView& view : views) used.insert(view.spec.name);
  for (const StoredTensor& tensor : checkpoint.tensors) {
    // What only training needs has a folder before its name: optimizer/, counters/, balance/.
    const std::string& name = tensor.spec.name;
    ARCUS_REQUIRE(name.find('/') != std::string::npos || used.contains(name), ExitCode::usage,
                  "{} holds {}, which the configuration has no use for; leave out --set options "
                  "that change what the model is",
                  path.string(), name);
  }
}

void load_weights(Session& session, const Checkpoint& checkpoint, LoadedModel& loaded) {
  const auto views = loaded.instance->parameter_views();
  session.together([&] { check_all_used(loaded.path, checkpoint, views); });
  naming_others(loaded.path, [&] {
    load_checkpoint(session.comm(), *loaded.stream, loaded.path, views, Match::subset);
  });
  loaded.instance->finish_reading();
}

LoadedModel load(Session& session, const std::filesystem::path& path,
                 const std::vector<std::string>& sets,
                 const std::function<void(InstanceOptions&)>& change) {
  LoadedModel loaded;
  Checkpoint checkpoint;
  int ep_size = 1;
  session.together([&] {
    loaded.path = locate_checkpoint(path);
    checkpoint = naming_others(loaded.path, [&] { return open_checkpoint(loaded.path); });
    loaded.info = checkpoint.info;
    loaded.config = from_toml(loaded.info.config_text, loaded.path.string() + " (configuration)");
    forget_layout(loaded.config);
    for (const std::string& assignment : sets) {
      ARCUS_REQUIRE(
          !assignment.starts_with("model."), ExitCode::usage,
          "--set {}: {} holds the model as it was trained, which no option changes; leave "
          "it out",
          assignment, loaded.path.string());
      apply_set(loaded.config, assignment);
    }
    validate(loaded.config);
    check_device(loaded.config);
    ep_size = resolve_ep_size(loaded.config.parallel.ep_size, session.comm().size(),
                              loaded.config.model.num_experts);
  });
  loaded.stream = std::make_unique<Stream>(
      set_up_threads(loaded.config.parallel, session.comm(), session.stream()));
  InstanceOptions options =
      instance_options(trainer_options(loaded.config, resolve_model(loaded.config, nullptr)));
  options.training = false;
  options.num_micro_batches = 1;
  change(options);
  loaded.instance = std::make_unique<ModelInstance>(make_process_groups(session.comm(), ep_size),
                                                    *loaded.stream, options);
  load_weights(session, checkpoint, loaded);
  loaded.instance->build_primitives();
  return loaded;
}

}  // namespace

LoadedModel load_model(Session& session, const std::filesystem::path& path,
                       const std::vector<std::string>& sets) {
  return load(session, path, sets, [](InstanceOptions&) {});
}

LoadedModel load_generator(Session& session, const std::filesystem::path& path,
                           const std::vector<std::string>& sets, std::int64_t num_prompts) {
  return load(session, path, sets, [=](InstanceOptions& options) {
    options = dropless_outside_training(std::move(options));
    options.micro_batch_seqs = num_prompts;
    options.seq_len = 1;
  });
}

LoadedModel load_for_logits(Session& session, const std::filesystem::path& path,
                            const std::vector<std::string>& sets, std::int64_t seq_len,
                            bool exact) {
  return load(session, path, sets, [=](InstanceOptions& options) {
    options = dropless_outside_training(std::move(options));
    options.micro_batch_seqs = 1;
    options.seq_len = seq_len;
    if (exact) options.compute = DType::f32;
  });
}

}  // namespace arcus
