#include "launch/rewrite.hpp"

#include <map>

#include "launch/new_run.hpp"
#include "launch/run_folder.hpp"
#include "launch/version.hpp"

namespace arcus {

SaveReport rewrite_checkpoint(Session& session, const Checkpoint& checkpoint,
                              const RewriteRequest& request, const Rewriting& rewriting) {
  std::vector<TensorSpec> specs;
  std::map<std::string, const StoredTensor*> before;
  session.together([&] {
    for (const StoredTensor& tensor : checkpoint.tensors) {
      const std::optional<TensorSpec> after = rewriting.rewritten(tensor.spec);
      if (!after) continue;
      specs.push_back(*after);
      before[after->name] = &tensor;
    }
  });
  CheckpointInfo info = checkpoint.info;
  info.config_text = to_toml(request.config);
  info.run_id = new_run_id();
  info.created_by = "arcus " + version_line() + ", " + request.command;
  NewRun run(session, request.out);
  TensorReader reader(checkpoint);
  return run.save(info, specs, [&](const TensorSpec& spec) {
    return rewriting.read(reader, *before.at(spec.name), spec);
  });
}

}  // namespace arcus
