#pragma once

#include <exception>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "checkpoints/checkpoint.hpp"
#include "launch/init_source.hpp"
#include "launch/run_config.hpp"
#include "launch/session.hpp"
#include "src/data/dataset.hpp"
#include "src/train/trainer.hpp"

namespace arcus {

/// What a Trainer needs to know of a configuration; `model` is resolved.
TrainerOptions trainer_options(const Config& config, const ModelConfig& model);

/// The data's vocabulary put in for "auto"; throws (data) where the model's is too small for the
/// data, (usage) where there is neither.
ModelConfig resolve_model(const Config& config, const TokenDataset* dataset);

/// Opens the data set on every rank, all failing together; rank 0 compares checksums first unless
/// the data is larger than a few gigabytes (then it says how to do so).
TokenDataset open_dataset(Session& session, const std::filesystem::path& dir);

/// Refuses devices and transports that this build or machine does not have, before any work.
void check_device(const Config& config);

/// Checks that all ranks were given the same configuration; names those that were not.
void check_same_config(Session& session, const Config& config);

/// A configuration's file and `--set`s, or the error that reading them gave, to be thrown on all
/// ranks together: it is read before the ranks meet, since the communicator depends on it.
struct LoadedConfig {
  Config config;
  std::exception_ptr error;
};
LoadedConfig try_load_config(const std::filesystem::path& file,
                             const std::vector<std::string>& sets);
/// How a run begins.
struct RunStart {
  std::string resume = "auto";  ///< "auto", "none" or a checkpoint's path
  InitRequest init;             ///< where there is nothing to go on from
};
/// The same for `arcus train`: what the model is comes from the checkpoint that the run goes on
/// from if it was itself started with --init, else from that of `start.init`, if there is one.
LoadedConfig try_load_run_config(const std::filesystem::path& file,
                                 const std::vector<std::string>& sets, const RunStart& start);

/// A model in evaluation form, its weights read from a checkpoint: for `eval` and `generate`.
struct LoadedModel {
  std::filesystem::path path;
  CheckpointInfo info;
  Config config;
  std::unique_ptr<Stream> stream;
  std::unique_ptr<ModelInstance> instance;
};
/// `path`: a checkpoint or a run folder. Sequences and micro-batches as trained. Collective.
LoadedModel load_model(Session& session, const std::filesystem::path& path,
                       const std::vector<std::string>& sets);
/// The same for generating `num_prompts` texts at once: dropless, so that what a prompt gives does
/// not depend on its neighbours.
LoadedModel load_generator(Session& session, const std::filesystem::path& path,
                           const std::vector<std::string>& sets, std::int64_t num_prompts);

/// The same for the logits of whole texts of up to `seq_len` tokens, one at a time, dropless, in
/// fp32 where `exact`.
LoadedModel load_for_logits(Session& session, const std::filesystem::path& path,
                            const std::vector<std::string>& sets, std::int64_t seq_len, bool exact);

}  // namespace arcus
