#pragma once

#include <filesystem>
#include <regex>
#include <string>
#include <vector>

#include "checkpoints/checkpoint.hpp"
#include "launch/run_config.hpp"

namespace arcus {

/// Where a run's first weights come from: `--init` and `--fresh`.
struct InitRequest {
  std::string path;                ///< a checkpoint or run folder; empty: the seed's initial values
  std::vector<std::string> fresh;  ///< regular expressions of tensors that keep those
};

/// A configuration file on top of what the model of `stored` is: keys of [model], [routing], its
/// overrides and [train.lora] that the file does not set are the checkpoint's. Throws (usage) where
/// the file sets one that decides what the model computes to another value, unless every gate is
/// fresh and the key is about the gate. `path` names the checkpoint.
Config load_config_on(const std::filesystem::path& file, const std::vector<std::string>& sets,
                      const Config& stored, const std::filesystem::path& path,
                      const std::vector<std::string>& fresh);

/// A checkpoint whose weights a new run starts from; its moments, counters and balancing counts are
/// not taken.
class InitSource {
 public:
  explicit InitSource(const InitRequest& request);

  const Checkpoint& checkpoint() const { return checkpoint_; }
  /// For the run's metadata: path, step and digest.
  std::string origin() const;

  /// What becomes of the tensors on either side.
  struct Choice {
    std::vector<StateView> read;
    std::vector<std::string> fresh;     ///< keep their initial values because --fresh says so
    std::vector<std::string> added;     ///< adapters that the checkpoint does not have
    std::vector<std::string> left_out;  ///< of the checkpoint, because --fresh says so
    bool bias_left_out = false;         ///< the checkpoint's expert bias has no place here
  };
  /// `state`: everything that a checkpoint of the run would hold. Throws (checkpoint) naming
  /// tensors that the checkpoint lacks, has in another shape, or holds for nothing; (usage) where
  /// --fresh names nothing.
  Choice choose(const std::vector<StateView>& state) const;

 private:
  bool is_fresh(const std::string& name) const;
  void require_used(const std::vector<StateView>& state, Choice& choice) const;
  void require_fresh_found(const Choice& choice) const;

  InitRequest request_;
  std::vector<std::regex> fresh_;
  Checkpoint checkpoint_;
};

/// Whether a checkpoint holds weights alone (imported, merged), from which no run can go on.
bool holds_weights_alone(const Checkpoint& checkpoint);

}  // namespace arcus
