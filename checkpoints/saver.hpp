#pragma once

#include <atomic>
#include <condition_variable>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>

#include "checkpoints/checkpoint.hpp"
#include "checkpoints/writer.hpp"
#include "kernels/arena.hpp"

namespace arcus {

/// Saves while training goes on: a thread copies the state, then hashes and writes the copy,
/// without a call into MPI. One save at a time. All ranks make the same calls in the same order,
/// except for busy(), wait_copied() and read_state().
///
///     start ... (steps; before each update of the state: wait_copied) ... no rank is busy: advance
///     ... no rank is busy: advance, which returns the report
class CheckpointSaver {
 public:
  CheckpointSaver(Communicator& world, Stream& stream, std::filesystem::path run_dir);
  /// Lets the thread end. What it wrote of an unfinished save goes with the next one.
  ~CheckpointSaver();
  CheckpointSaver(const CheckpointSaver&) = delete;
  CheckpointSaver& operator=(const CheckpointSaver&) = delete;

  /// Begins a save as save_checkpoint describes it. The state may be read at once and until
  /// wait_copied returns; with `copy` false until the save ends. Where no thread can be started the
  /// work is done at once. Collective.
  void start(const CheckpointInfo& info, std::span<const StateView> views,
             const SaveOptions& options, bool copy);
  /// Returns when the state may change again.
  void wait_copied();
  /// A save has begun and not ended, the same on all ranks.
  bool under_way() const { return stage_ != Stage::idle; }
  /// This rank's thread is at work on it.
  bool busy() const;
  /// To be called while no rank is busy: what the ranks wrote becomes a checkpoint, whose report is
  /// returned when it is complete. Throws what a thread threw; nothing is under way then, and
  /// earlier checkpoints are as they were. Collective.
  std::optional<SaveReport> advance();
  /// Waits for the save under way; `while_waiting` is called now and then as long as its thread
  /// gets on. Collective.
  SaveReport finish(const std::function<void()>& while_waiting = {});

 private:
  enum class Stage { idle, writing, publishing };

  void run(std::function<void()> work);
  void join();
  void write();
  void publish();
  void fail();
  void tell(std::string_view stage);

  Communicator& world_;
  Stream& stream_;
  std::filesystem::path run_dir_, folder_;

  Stage stage_ = Stage::idle;
  CheckpointInfo info_;
  SaveOptions options_;
  std::filesystem::path path_, temporary_;
  writer::ShardContent content_;
  std::unique_ptr<Arena> copy_;
  char* copy_to_ = nullptr;  ///< null: the state is written as it stands
  std::string report_;
  Checkpoint checkpoint_;  ///< rank 0

  std::thread thread_;
  std::optional<Error> error_;  ///< of the thread, once it is joined
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool copied_ = true;
  bool working_ = false;
  std::atomic<std::int64_t> progress_{0};  ///< grows while the thread gets on
};

}  // namespace arcus
