#include "launch/new_run.hpp"

#include <algorithm>
#include <filesystem>
#include <utility>

#include "src/base/error.hpp"

namespace arcus {
namespace {

/// A run goes into a folder of its own.
void require_own_folder(const std::filesystem::path& folder) {
  if (!std::filesystem::exists(folder)) return;
  ARCUS_REQUIRE(std::filesystem::is_directory(folder), ExitCode::usage,
                "{} is no folder; --out must name a new or an empty one", folder.string());
  ARCUS_REQUIRE(list_checkpoints(folder).empty(), ExitCode::usage,
                "{} holds checkpoints of a run already; --out must be another folder",
                folder.string());
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    ARCUS_REQUIRE(name == "lock" || name == "checkpoints", ExitCode::usage,
                  "{} holds other things than a run, such as {}; --out must name a new or an empty "
                  "folder",
                  folder.string(), name);
  }
}

}  // namespace

NewRun::NewRun(Session& session, std::string folder)
    : session_(session), folder_(std::move(folder)) {
  session_.together([&] {
    ARCUS_REQUIRE(!folder_.empty(), ExitCode::usage, "--out must name a folder");
    if (!session_.is_root()) return;
    made_folder_ = !std::filesystem::exists(folder_);
    require_own_folder(folder_);
    lock_ = std::make_unique<RunLock>(folder_);
  });
}

SaveReport NewRun::save(const CheckpointInfo& info, std::span<const TensorSpec> tensors,
                        const Maker& make) {
  std::vector<StateView> views;
  std::vector<std::vector<char>> memory;
  memory.reserve(tensors.size());
  session_.together([&] {
    std::vector<std::int64_t> bytes(static_cast<std::size_t>(session_.comm().size()));
    for (const TensorSpec& spec : tensors) {
      StateView& view = views.emplace_back(StateView{spec, false, {}});
      const auto least = std::min_element(bytes.begin(), bytes.end());
      *least += spec.num_elements() * static_cast<std::int64_t>(size_of(spec.dtype));
      if (least - bytes.begin() != session_.rank() || spec.num_elements() == 0) continue;
      memory.push_back(make(spec));
      view.slices.push_back({{0, spec.num_rows()}, memory.back().data()});
    }
  });
  const SaveReport report =
      save_checkpoint(session_.comm(), session_.stream(), folder_, info, views, {.keep = 0});
  saved_ = true;
  return report;
}

NewRun::~NewRun() {
  if (!lock_) return;
  lock_.reset();
  std::error_code ignored;
  if (made_folder_ && !saved_) std::filesystem::remove_all(folder_, ignored);
}

}  // namespace arcus
