#include <algorithm>

#include "checkpoints/files.hpp"
#include "checkpoints/layout.hpp"
#include "src/base/log.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;

/// Opened on all ranks; rank 0 looks at the shards first, for all.
Checkpoint open_on_all(Communicator& world, Stream& stream, const fs::path& path) {
  Checkpoint checkpoint;
  agree_on_errors(world, stream, [&] {
    if (world.rank() == 0) checkpoint = layout::open(path, true);
  });
  agree_on_errors(world, stream, [&] {
    if (world.rank() != 0) checkpoint = layout::open(path, false);
  });
  return checkpoint;
}

/// Checkpoints of a run to try in turn: the latest, then older ones.
std::vector<fs::path> candidates(const fs::path& run_dir) {
  layout::finish_replacements(layout::checkpoints_folder(run_dir));
  const auto latest = find_latest(run_dir);
  std::vector<fs::path> paths = list_checkpoints(run_dir);
  if (latest) paths.erase(paths.begin(), std::find(paths.begin(), paths.end(), *latest));
  return paths;
}

std::vector<fs::path> candidates_on_all(Communicator& world, Stream& stream,
                                        const fs::path& run_dir) {
  std::string names;
  agree_on_errors(world, stream, [&] {
    if (world.rank() != 0) return;
    for (const fs::path& path : candidates(run_dir)) names += path.filename().string() + "\n";
  });
  names = broadcast_text(world, stream, names);
  std::vector<fs::path> paths;
  for (std::size_t begin = 0; begin < names.size();) {
    const std::size_t end = names.find('\n', begin);
    paths.push_back(layout::checkpoints_folder(run_dir) / names.substr(begin, end - begin));
    begin = end + 1;
  }
  return paths;
}

fs::path locate_on_all(Communicator& world, Stream& stream, const fs::path& path) {
  std::string found;
  agree_on_errors(world, stream, [&] {
    if (world.rank() == 0) found = locate_checkpoint(path).string();
  });
  return broadcast_text(world, stream, found);
}

/// Opens what `spec` names and calls `match`, which may throw and end the search, then `read`,
/// which throws (checkpoint) on all ranks where data is damaged.
using Step = std::function<void(const Checkpoint&)>;
std::optional<Resumed> search(Communicator& world, Stream& stream, const fs::path& run_dir,
                              std::string_view spec, const Step& match, const Step& read) {
  if (spec == "none") return std::nullopt;
  const bool automatic = spec == "auto";
  const auto paths = automatic ? candidates_on_all(world, stream, run_dir)
                               : std::vector{locate_on_all(world, stream, fs::path(spec))};
  for (const fs::path& path : paths) {
    bool matching = false;
    try {
      const Checkpoint checkpoint = open_on_all(world, stream, path);
      matching = true;
      match(checkpoint);
      matching = false;
      read(checkpoint);
      return Resumed{checkpoint.path, checkpoint.info};
    } catch (const Error& error) {
      if (!automatic || matching || error.code() != ExitCode::checkpoint) throw;
      if (world.rank() == 0) {
        spdlog::warn("checkpoint {} is not usable: {}; trying the one before", path.string(),
                     error.what());
      }
    }
  }
  ARCUS_REQUIRE(paths.empty(), ExitCode::checkpoint,
                "none of the {} checkpoints in {} is usable; --resume none starts anew",
                paths.size(), layout::checkpoints_folder(run_dir).string());
  return std::nullopt;
}

}  // namespace

std::vector<fs::path> list_checkpoints(const fs::path& run_dir) {
  const fs::path folder = layout::checkpoints_folder(run_dir);
  std::vector<std::pair<std::int64_t, fs::path>> found;
  std::error_code error;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    const auto step = layout::step_of_name(it->path().filename().string());
    if (step) found.emplace_back(*step, it->path());
  }
  ARCUS_REQUIRE(!error || error == std::errc::no_such_file_or_directory, ExitCode::checkpoint,
                "cannot read {}: {}; make it readable, or --resume none starts anew",
                folder.string(), error.message());
  std::sort(found.begin(), found.end(),
            [](const auto& a, const auto& b) { return a.first > b.first; });
  std::vector<fs::path> paths;
  paths.reserve(found.size());
  for (auto& [step, path] : found) paths.push_back(std::move(path));
  return paths;
}

fs::path checkpoint_path(const fs::path& run_dir, std::int64_t step) {
  return layout::checkpoints_folder(run_dir) / layout::step_name(step);
}

std::optional<std::int64_t> step_of_checkpoint(const fs::path& path) {
  return layout::step_of_name(path.filename().string());
}

std::optional<fs::path> find_latest(const fs::path& run_dir) {
  const auto paths = list_checkpoints(run_dir);
  if (paths.empty()) return std::nullopt;
  const fs::path pointer = layout::checkpoints_folder(run_dir) / layout::kLatestName;
  if (fs::is_regular_file(pointer)) {
    std::string name = files::read_text(pointer);
    while (!name.empty() && name.back() == '\n') name.pop_back();
    for (const fs::path& path : paths) {
      if (path.filename() == name) return path;
    }
  }
  return paths.front();
}

fs::path locate_checkpoint(const fs::path& path) {
  fs::path folder = layout::normalized(path);
  ARCUS_REQUIRE(fs::exists(folder), ExitCode::checkpoint, "{} does not exist", folder.string());
  if (layout::step_of_name(folder.filename().string()) ||
      fs::exists(folder / layout::kChecksumsName) || fs::exists(folder / layout::kIndexName)) {
    return folder;
  }
  const bool inside = layout::checkpoints_folder(folder.parent_path()) == folder;
  const auto latest = find_latest(inside ? folder.parent_path() : folder);
  ARCUS_REQUIRE(latest, ExitCode::checkpoint,
                "{} is neither a checkpoint (a folder with CHECKSUMS and index.h5) nor the folder "
                "of a run that has one",
                folder.string());
  return *latest;
}

CheckpointInfo load_checkpoint(Communicator& world, Stream& stream, const fs::path& path,
                               std::span<const StateView> views, Match match) {
  const Checkpoint checkpoint = open_on_all(world, stream, path);
  agree_on_errors(world, stream, [&] { layout::require_match(checkpoint, views, match); });
  agree_on_errors(world, stream, [&] { layout::read_views(checkpoint, views); });
  return checkpoint.info;
}

bool is_usable(Communicator& world, Stream& stream, const fs::path& path,
               std::span<const StateView> views, const std::function<void()>& while_reading) {
  try {
    const Checkpoint checkpoint = open_on_all(world, stream, path);
    agree_on_errors(world, stream, [&] {
      layout::require_match(checkpoint, views, Match::exact);
      layout::check_views(checkpoint, views, while_reading);
    });
    return true;
  } catch (const Error& error) {
    if (error.code() != ExitCode::checkpoint) throw;
    if (world.rank() == 0) {
      spdlog::warn("checkpoint {} is not usable: {}", path.string(), error.what());
    }
    return false;
  }
}

std::optional<Resumed> resume_checkpoint(Communicator& world, Stream& stream,
                                         const fs::path& run_dir, std::string_view spec,
                                         std::span<const StateView> views,
                                         const std::function<void()>& while_reading) {
  std::int64_t bytes_read = 0;
  auto resumed = search(
      world, stream, run_dir, spec,
      [&](const Checkpoint& checkpoint) {
        agree_on_errors(world, stream,
                        [&] { layout::require_match(checkpoint, views, Match::exact); });
      },
      [&](const Checkpoint& checkpoint) {
        agree_on_errors(world, stream,
                        [&] { bytes_read = layout::read_views(checkpoint, views, while_reading); });
      });
  if (resumed) resumed->bytes_read = bytes_read;
  return resumed;
}

}  // namespace arcus
