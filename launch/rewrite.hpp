#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "checkpoints/checkpoint.hpp"
#include "launch/run_config.hpp"
#include "launch/session.hpp"

namespace arcus {

/// What becomes of a checkpoint's tensors in the first checkpoint of a new run.
class Rewriting {
 public:
  virtual ~Rewriting() = default;
  /// The description of what `before` becomes; nothing where it is left out.
  virtual std::optional<TensorSpec> rewritten(const TensorSpec& before) const = 0;
  /// Its bytes, as `after` describes them.
  virtual std::vector<char> read(TensorReader& reader, const StoredTensor& tensor,
                                 const TensorSpec& after) const = 0;
};

/// Where a command that makes a new run starts.
struct RewriteRequest {
  std::string out;      ///< folder of the new run
  std::string command;  ///< for people
  Config config;        ///< of the new run
};

/// Writes the checkpoint, of the same step, through the memory of all ranks: each takes whole
/// tensors. Refuses a folder that holds checkpoints. Collective.
SaveReport rewrite_checkpoint(Session& session, const Checkpoint& checkpoint,
                              const RewriteRequest& request, const Rewriting& rewriting);

}  // namespace arcus
