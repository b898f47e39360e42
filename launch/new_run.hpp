#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "checkpoints/checkpoint.hpp"
#include "checkpoints/run_lock.hpp"
#include "launch/session.hpp"

namespace arcus {

/// A run whose first checkpoint is made by a command instead of by training. Collective.
class NewRun {
 public:
  /// Takes the folder's lock; throws (usage) where it holds checkpoints of a run already.
  NewRun(Session& session, std::string folder);
  /// A folder that was made for a run that was not saved is taken away again.
  ~NewRun();
  NewRun(const NewRun&) = delete;
  NewRun& operator=(const NewRun&) = delete;

  /// The numbers of one tensor, as bytes.
  using Maker = std::function<std::vector<char>(const TensorSpec& spec)>;
  /// Every rank makes and holds some of the tensors, whole ones, in turn to the rank with the
  /// fewest bytes so far; together they save them.
  SaveReport save(const CheckpointInfo& info, std::span<const TensorSpec> tensors,
                  const Maker& make);

 private:
  Session& session_;
  std::string folder_;
  std::unique_ptr<RunLock> lock_;  ///< rank 0
  bool made_folder_ = false;
  bool saved_ = false;
};

}  // namespace arcus
