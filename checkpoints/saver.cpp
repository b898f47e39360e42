#include "checkpoints/saver.hpp"

#include <chrono>
#include <utility>

#include "checkpoints/files.hpp"
#include "checkpoints/layout.hpp"
#include "src/base/host.hpp"
#include "src/base/log.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;

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
                "cannot create {}: {}", temporary.string(),
                error ? error.message() : "it is there already; does another process save here?");
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
    if (options.keep < 1 || kept <= options.keep || milestone || other == options.also) continue;
    // Gone under its final name at once: a removal cut short must not leave half a checkpoint.
    const fs::path doomed = path.string() + layout::kTemporarySuffix;
    fs::rename(path, doomed, error);
    if (!error) fs::remove_all(doomed, error);
    if (error) spdlog::warn("cannot remove {}: {}", path.string(), error.message());
  }
}

}  // namespace

CheckpointSaver::CheckpointSaver(Communicator& world, Stream& stream, fs::path run_dir)
    : world_(world),
      stream_(stream),
      run_dir_(std::move(run_dir)),
      folder_(layout::checkpoints_folder(run_dir_)) {}

CheckpointSaver::~CheckpointSaver() { join(); }

void CheckpointSaver::tell(std::string_view stage) {
  ++progress_;
  if (options_.on_stage) options_.on_stage(stage);
}

/// `work` on the thread; what it throws is kept for advance.
void CheckpointSaver::run(std::function<void()> work) {
  working_ = true;
  error_.reset();
  auto and_tell = [this, work = std::move(work)] {
    std::optional<Error> error;
    try {
      work();
    } catch (const std::exception& exception) {
      error = as_error(exception);
    }
    const std::lock_guard lock(mutex_);
    error_ = std::move(error);
    copied_ = true;
    working_ = false;
    changed_.notify_all();
  };
  try {
    thread_ = std::thread([and_tell] {
      use_all_processors();
      and_tell();
    });
  } catch (const std::system_error&) {
    and_tell();
  }
}

void CheckpointSaver::join() {
  if (thread_.joinable()) thread_.join();
}

bool CheckpointSaver::busy() const {
  const std::lock_guard lock(mutex_);
  return working_;
}

void CheckpointSaver::wait_copied() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return copied_; });
}

void CheckpointSaver::start(const CheckpointInfo& info, std::span<const StateView> views,
                            const SaveOptions& options, bool copy) {
  ARCUS_CHECK(!under_way(), "a save of step {} began before that of step {} had ended", info.step,
              info_.step);
  info_ = info;
  options_ = options;
  path_ = folder_ / layout::step_name(info.step);
  temporary_ = path_.string() + layout::kTemporarySuffix;
  try {
    agree_on_errors(world_, stream_, [&] {
      if (world_.rank() == 0) prepare_folder(folder_, temporary_);
      content_ = writer::collect(world_.rank(), views);
      copy_to_ = nullptr;
      if (!copy) return;
      const std::int64_t bytes = writer::bytes_of(content_);
      if (!copy_ || copy_->capacity() < bytes) {
        copy_.reset();
        copy_ = std::make_unique<Arena>("copy of the state for a checkpoint", bytes);
      }
      copy_->reset();
      copy_to_ = static_cast<char*>(copy_->allocate_bytes(bytes));
    });
  } catch (const Error&) {
    fail();
    throw;
  }
  stage_ = Stage::writing;
  copied_ = copy_to_ == nullptr;
  run([this] { write(); });
}

/// This rank's shard; on the thread.
void CheckpointSaver::write() {
  tell("collect");
  if (copy_to_ != nullptr) {
    writer::copy_state(content_, copy_to_, progress_);
    const std::lock_guard lock(mutex_);
    copied_ = true;
    changed_.notify_all();
  }
  tell("write");
  report_ = writer::pack_report(
      content_, writer::write_shard(temporary_, world_.rank(), info_.step, content_, progress_));
  tell("report");
}

/// Index, checksums, the final name, `latest`; on rank 0's thread. `latest` is written before the
/// rename and put in its place after, so that a full disk shows while nothing has changed.
void CheckpointSaver::publish() {
  const fs::path latest = folder_ / layout::kLatestName;
  const fs::path new_latest = latest.string() + layout::kTemporarySuffix;
  tell("index");
  layout::write_index(temporary_, checkpoint_);
  const fs::path index = temporary_ / layout::kIndexName;
  files::sync(index);
  checkpoint_.files.insert(
      checkpoint_.files.begin(),
      {layout::kIndexName, static_cast<std::int64_t>(fs::file_size(index)), files::hash(index)});
  tell("checksums");
  files::write_synced(temporary_ / layout::kChecksumsName,
                      layout::format_checksums(checkpoint_.files));
  files::sync(temporary_);
  files::write_synced(new_latest, path_.filename().string() + "\n");
  tell("rename");
  layout::replace_folder(temporary_, path_);
  tell("latest");
  files::rename_synced(new_latest, latest);
  tell("retire");
  retire(run_dir_, temporary_, info_.step, options_);
}

/// All ranks are here, so nobody writes any more.
void CheckpointSaver::fail() {
  stage_ = Stage::idle;
  if (world_.rank() != 0) return;
  std::error_code ignored;
  fs::remove_all(temporary_, ignored);
  layout::finish_replacements(folder_);
  fs::remove(folder_ / (std::string(layout::kLatestName) + layout::kTemporarySuffix), ignored);
}

std::optional<SaveReport> CheckpointSaver::advance() {
  join();
  try {
    agree_on_errors(world_, stream_, [&] {
      if (error_) throw *error_;
    });
    if (stage_ == Stage::writing) {
      const auto reports = gather_texts(world_, stream_, report_);
      agree_on_errors(world_, stream_, [&] {
        if (world_.rank() != 0) return;
        checkpoint_ = writer::assemble(reports, content_.specs);
        checkpoint_.info = info_;
        checkpoint_.info.num_ranks = world_.size();
      });
      stage_ = Stage::publishing;
      if (world_.rank() == 0) run([this] { publish(); });
      return std::nullopt;
    }
  } catch (const Error&) {
    fail();
    throw;
  }
  stage_ = Stage::idle;
  const std::string numbers = broadcast_text(
      world_, stream_, fmt::format("{} {}", checkpoint_.bytes(), checkpoint_.digest()));
  const std::size_t space = numbers.find(' ');
  return SaveReport{path_, std::stoll(numbers.substr(0, space)),
                    std::stoull(numbers.substr(space + 1))};
}

SaveReport CheckpointSaver::finish(const std::function<void()>& while_waiting) {
  ARCUS_CHECK(under_way(), "no save is under way");
  constexpr std::chrono::milliseconds kLook{500};
  for (;;) {
    std::int64_t seen = progress_;
    std::unique_lock lock(mutex_);
    while (!changed_.wait_for(lock, kLook, [&] { return !working_; })) {
      lock.unlock();
      if (while_waiting && std::exchange(seen, progress_.load()) != progress_) while_waiting();
      lock.lock();
    }
    lock.unlock();
    if (const auto report = advance()) return *report;
  }
}

SaveReport save_checkpoint(Communicator& world, Stream& stream, const fs::path& run_dir,
                           const CheckpointInfo& info, std::span<const StateView> views,
                           const SaveOptions& options) {
  CheckpointSaver saver(world, stream, run_dir);
  saver.start(info, views, options, /*copy=*/false);
  return saver.finish();
}

Checkpoint describe_state(Communicator& world, Stream& stream, std::span<const StateView> views) {
  std::string report;
  writer::ShardContent content;
  std::atomic<std::int64_t> progress{0};
  agree_on_errors(world, stream, [&] {
    content = writer::collect(world.rank(), views);
    writer::hash_state(content, progress);
    report = writer::pack_report(content, {});
  });
  const auto reports = gather_texts(world, stream, report);
  return writer::assemble(reports, content.specs);
}

std::uint64_t state_digest(Communicator& world, Stream& stream, std::span<const StateView> views) {
  return describe_state(world, stream, views).digest();
}

}  // namespace arcus
