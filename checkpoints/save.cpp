#include <algorithm>

#include "checkpoints/files.hpp"
#include "checkpoints/layout.hpp"
#include "checkpoints/writer.hpp"
#include "src/base/hash.hpp"
#include "src/base/log.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;

fs::path temporary_name(const fs::path& folder, std::int64_t step) {
  return folder / (layout::step_name(step) + layout::kTemporarySuffix);
}

/// Makes the temporary folder; what killed saves left goes first.
void prepare_folder(const fs::path& folder, const fs::path& temporary) {
  std::error_code error;
  fs::create_directories(folder, error);
  ARCUS_REQUIRE(!error, ExitCode::checkpoint, "cannot create {}: {}", folder.string(),
                error.message());
  layout::finish_replacements(folder);
  for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() == layout::kTemporarySuffix) fs::remove_all(entry.path(), error);
  }
  ARCUS_REQUIRE(fs::create_directory(temporary, error), ExitCode::checkpoint,
                "cannot create {}: {}", temporary.string(), error.message());
}

void tell(const SaveOptions& options, std::string_view stage) {
  if (options.on_stage) options.on_stage(stage);
}

/// Index, checksums, the final name, `latest`; on rank 0. `latest` is written before the rename and
/// put in its place after, so that a full disk shows while nothing has changed.
void publish(const fs::path& temporary, const fs::path& path, Checkpoint& checkpoint,
             const SaveOptions& options) {
  const fs::path folder = path.parent_path();
  const fs::path latest = folder / layout::kLatestName;
  const fs::path new_latest = latest.string() + layout::kTemporarySuffix;
  tell(options, "index");
  layout::write_index(temporary, checkpoint);
  const fs::path index = temporary / layout::kIndexName;
  files::sync(index);
  checkpoint.files.insert(
      checkpoint.files.begin(),
      {layout::kIndexName, static_cast<std::int64_t>(fs::file_size(index)), files::hash(index)});
  tell(options, "checksums");
  files::write_synced(temporary / layout::kChecksumsName,
                      layout::format_checksums(checkpoint.files));
  files::sync(temporary);
  files::write_synced(new_latest, path.filename().string() + "\n");
  tell(options, "rename");
  layout::replace_folder(temporary, path);
  tell(options, "latest");
  files::rename_synced(new_latest, latest);
}

/// Removes what is old, and what an exchange left. A failure here costs disk space, not the save.
void retire(const fs::path& run_dir, const fs::path& temporary, std::int64_t step,
            const SaveOptions& options) {
  std::error_code error;
  fs::remove_all(temporary, error);
  layout::finish_replacements(layout::checkpoints_folder(run_dir));
  std::int64_t kept = 0;
  for (const fs::path& path : list_checkpoints(run_dir)) {
    const std::int64_t other = *layout::step_of_name(path.filename().string());
    if (other > step) continue;
    ++kept;
    const bool milestone = options.keep_every > 0 && other % options.keep_every == 0;
    if (options.keep < 1 || kept <= options.keep || milestone) continue;
    // Gone under its final name at once: a removal cut short must not leave half a checkpoint.
    const fs::path doomed = path.string() + layout::kTemporarySuffix;
    fs::rename(path, doomed, error);
    if (!error) fs::remove_all(doomed, error);
    if (error) spdlog::warn("cannot remove {}: {}", path.string(), error.message());
  }
}

void write_and_publish(Communicator& world, Stream& stream, const fs::path& path,
                       const fs::path& temporary, const CheckpointInfo& info,
                       std::span<const StateView> views, const SaveOptions& options,
                       SaveReport& result) {
  std::string report;
  writer::ShardContent content;
  agree_on_errors(world, stream, [&] {
    tell(options, "collect");
    content = writer::collect(world.rank(), views);
    tell(options, "write");
    report = writer::pack_report(content,
                                 writer::write_shard(temporary, world.rank(), info.step, content));
    tell(options, "report");
  });
  const auto reports = gather_texts(world, stream, report);
  agree_on_errors(world, stream, [&] {
    if (world.rank() != 0) return;
    Checkpoint checkpoint = writer::assemble(reports, content.specs);
    checkpoint.info = info;
    checkpoint.info.num_ranks = world.size();
    publish(temporary, path, checkpoint, options);
    result = {path, checkpoint.bytes(), checkpoint.digest()};
  });
}

}  // namespace

SaveReport save_checkpoint(Communicator& world, Stream& stream, const fs::path& run_dir,
                           const CheckpointInfo& info, std::span<const StateView> views,
                           const SaveOptions& options) {
  const fs::path folder = layout::checkpoints_folder(run_dir);
  const fs::path path = folder / layout::step_name(info.step);
  const fs::path temporary = temporary_name(folder, info.step);
  SaveReport result;
  agree_on_errors(world, stream, [&] {
    if (world.rank() == 0) prepare_folder(folder, temporary);
  });
  try {
    write_and_publish(world, stream, path, temporary, info, views, options, result);
  } catch (const Error&) {
    // All ranks are here, so nobody writes any more.
    std::error_code ignored;
    if (world.rank() == 0) {
      fs::remove_all(temporary, ignored);
      layout::finish_replacements(folder);
      fs::remove(folder / (std::string(layout::kLatestName) + layout::kTemporarySuffix), ignored);
    }
    throw;
  }
  if (world.rank() == 0) {
    tell(options, "retire");
    retire(run_dir, temporary, info.step, options);
  }
  const std::string numbers =
      broadcast_text(world, stream, fmt::format("{} {}", result.bytes, result.digest));
  const std::size_t space = numbers.find(' ');
  return {path, std::stoll(numbers.substr(0, space)), std::stoull(numbers.substr(space + 1))};
}

std::uint64_t state_digest(Communicator& world, Stream& stream, std::span<const StateView> views) {
  std::string report;
  writer::ShardContent content;
  agree_on_errors(world, stream, [&] {
    content = writer::collect(world.rank(), views);
    report = writer::pack_report(content, {});
  });
  const auto reports = gather_texts(world, stream, report);
  return writer::assemble(reports, content.specs).digest();
}

}  // namespace arcus
