#include "launch/rewrite.hpp"

#include <algorithm>
#include <memory>

#include "checkpoints/run_lock.hpp"
#include "launch/run_folder.hpp"
#include "launch/version.hpp"
#include "src/base/error.hpp"

namespace arcus {
namespace {

/// Which tensors a rank takes: whole ones, in turn to the rank with the fewest bytes so far.
std::vector<int> share_out(const std::vector<StoredTensor>& tensors, int num_ranks) {
  std::vector<std::int64_t> bytes(static_cast<std::size_t>(num_ranks));
  std::vector<int> owner;
  for (const StoredTensor& tensor : tensors) {
    const auto least = std::min_element(bytes.begin(), bytes.end());
    owner.push_back(static_cast<int>(least - bytes.begin()));
    *least += tensor.bytes();
  }
  return owner;
}

/// This rank's tensors, read and rewritten; the others' descriptions.
std::vector<StateView> read_share(const Checkpoint& checkpoint, const Rewriting& rewriting,
                                  int rank, int num_ranks, std::vector<std::vector<char>>& memory) {
  const std::vector<int> owner = share_out(checkpoint.tensors, num_ranks);
  TensorReader reader(checkpoint);
  std::vector<StateView> views;
  memory.reserve(checkpoint.tensors.size());
  for (std::size_t i = 0; i < checkpoint.tensors.size(); ++i) {
    const StoredTensor& tensor = checkpoint.tensors[i];
    const std::optional<TensorSpec> after = rewriting.rewritten(tensor.spec);
    if (!after) continue;
    StateView& view = views.emplace_back(StateView{*after, false, {}});
    if (owner[i] != rank || after->num_elements() == 0) continue;
    memory.push_back(rewriting.read(reader, tensor, *after));
    view.slices.push_back({{0, after->num_rows()}, memory.back().data()});
  }
  return views;
}

}  // namespace

SaveReport rewrite_checkpoint(Session& session, const Checkpoint& checkpoint,
                              const RewriteRequest& request, const Rewriting& rewriting) {
  std::unique_ptr<RunLock> lock;
  session.together([&] {
    if (!session.is_root()) return;
    lock = std::make_unique<RunLock>(request.out);
    ARCUS_REQUIRE(list_checkpoints(request.out).empty(), ExitCode::usage,
                  "{} holds checkpoints of a run already; --out must be another folder",
                  request.out);
  });
  std::vector<StateView> views;
  std::vector<std::vector<char>> memory;
  session.together([&] {
    views = read_share(checkpoint, rewriting, session.rank(), session.comm().size(), memory);
  });
  CheckpointInfo info = checkpoint.info;
  info.config_text = to_toml(request.config);
  info.run_id = new_run_id();
  info.created_by = "arcus " + version_line() + ", " + request.command;
  return save_checkpoint(session.comm(), session.stream(), request.out, info, views, {.keep = 0});
}

}  // namespace arcus
