#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "comm/communicator.hpp"
#include "src/base/state.hpp"

/// Checkpoints: folders of HDF5 files that hold named tensors, whole whatever the ranks were.
/// FORMAT.md describes them. Functions with a Communicator are collective and fail on all ranks
/// together; the others serve a single process. Failures are Errors with ExitCode::checkpoint.
namespace arcus {

/// Keys of CheckpointInfo::extra that Arcus itself writes.
namespace extra_key {
inline constexpr const char* kTokenizerKind = "tokenizer_kind";
inline constexpr const char* kTokenizer = "tokenizer";  ///< Tokenizer::serialized()
inline constexpr const char* kDataFingerprint = "data_fingerprint";
inline constexpr const char* kPairTemplate = "pair_template";  ///< PairTemplate, of its pairs
inline constexpr const char* kInitFrom = "init_from";  ///< where the run's first weights came from
inline constexpr const char* kEpSize = "ep_size";
inline constexpr const char* kGradientScaleBits = "gradient_scale_bits";  ///< S: sums hold g * 2^S
}  // namespace extra_key

/// What a checkpoint says about its run.
struct CheckpointInfo {
  std::int64_t step = 0;    ///< optimizer steps done
  std::string config_text;  ///< the whole configuration, TOML
  std::string fingerprint;
  std::string run_id;
  std::string created_by;                    ///< program and version
  std::int64_t num_ranks = 0;                ///< filled in by save_checkpoint
  std::map<std::string, std::string> extra;  ///< any bytes; keys without '/'
};

/// Consecutive rows of a tensor in one shard.
struct StoredRange {
  RowRange rows;
  std::int64_t shard = 0;      ///< of rank-NNNNN.h5
  std::int64_t shard_row = 0;  ///< first row in the shard's dataset
  std::int64_t offset = 0;     ///< byte offset of the first row in the shard's file
};

struct StoredTensor {
  TensorSpec spec;
  std::vector<std::uint64_t> block_hashes;
  std::vector<StoredRange> ranges;  ///< ascending; together all rows

  std::uint64_t hash() const;
  std::uint64_t unit_hash(std::int64_t unit) const;
  std::int64_t bytes() const;
};

/// A line of CHECKSUMS.
struct StoredFile {
  std::string name;
  std::int64_t size = 0;
  std::uint64_t hash = 0;  ///< xxh3 of the whole file
};

/// A checkpoint's description, without the data.
struct Checkpoint {
  std::filesystem::path path;
  CheckpointInfo info;
  std::vector<StoredTensor> tensors;  ///< in the registry's order
  std::vector<StoredFile> files;      ///< index.h5, then the shards in order

  const StoredTensor* find(std::string_view name) const;
  /// One hash over all tensors, from the stored hashes; equal for every layout.
  std::uint64_t digest() const;
  std::int64_t bytes() const;  ///< of all tensors
};

struct SaveOptions {
  std::int64_t keep = 2;        ///< newest checkpoints kept; < 1 = all
  std::int64_t keep_every = 0;  ///< also keep those at multiples of n steps; 0 = none
  std::int64_t also = -1;       ///< also keep the one of this step; -1 = none
  /// Told on each rank as it enters "collect", "write", "report"; on rank 0 also "index",
  /// "checksums", "rename", "latest", "retire".
  std::function<void(std::string_view stage)> on_stage;
};

struct SaveReport {
  std::filesystem::path path;
  std::int64_t bytes = 0;    ///< of all tensors
  std::uint64_t digest = 0;  ///< Checkpoint::digest()
};

/// Saves the state as `<run_dir>/checkpoints/step-NNNNNNNN`. When it returns, the checkpoint is on
/// disk and `latest` names it; when it throws, earlier checkpoints are as they were.
SaveReport save_checkpoint(Communicator& world, Stream& stream,
                           const std::filesystem::path& run_dir, const CheckpointInfo& info,
                           std::span<const StateView> views, const SaveOptions& options = {});

/// The state in memory as a checkpoint saved now would describe it: tensors and hashes.
Checkpoint describe_state(Communicator& world, Stream& stream, std::span<const StateView> views);
/// Its digest.
std::uint64_t state_digest(Communicator& world, Stream& stream, std::span<const StateView> views);

/// Whether the views must name all tensors of a checkpoint, or may leave some out (evaluation wants
/// the weights alone).
enum class Match { exact, subset };

/// Fills the views from the checkpoint at `path`, each block verified. After a throw the views'
/// contents are undefined.
CheckpointInfo load_checkpoint(Communicator& world, Stream& stream,
                               const std::filesystem::path& path, std::span<const StateView> views,
                               Match match = Match::exact);

/// Whether the checkpoint at `path` fits the views and every block that they need is sound; they
/// are not touched. The reason why not is a warning. Collective.
bool is_usable(Communicator& world, Stream& stream, const std::filesystem::path& path,
               std::span<const StateView> views, const std::function<void()>& while_reading = {});

/// Reads the description; checks CHECKSUMS, the index, presence and sizes of the shards.
Checkpoint open_checkpoint(const std::filesystem::path& path);
/// Reads all data and compares each block's hash, then each file's.
void verify_checkpoint(const Checkpoint& checkpoint);

/// Reads rows of a checkpoint's tensors, each block verified. Keeps shards open; `checkpoint` must
/// outlive it. Not for several threads at once.
class TensorReader {
 public:
  explicit TensorReader(const Checkpoint& checkpoint) : checkpoint_(checkpoint) {}
  ~TensorReader();
  TensorReader(const TensorReader&) = delete;
  TensorReader& operator=(const TensorReader&) = delete;
  /// `rows` must begin and end at blocks (whole units do).
  void read(const StoredTensor& tensor, RowRange rows, void* out);
  void read(const StoredTensor& tensor, void* out) {
    read(tensor, {0, tensor.spec.num_rows()}, out);
  }
  std::int64_t bytes_read() const { return bytes_read_; }

 private:
  int open_shard(std::int64_t shard);
  const Checkpoint& checkpoint_;
  std::map<std::int64_t, int> descriptors_;  ///< by shard
  std::int64_t bytes_read_ = 0;
};

/// Checkpoints of a run with their final names, newest step first.
std::vector<std::filesystem::path> list_checkpoints(const std::filesystem::path& run_dir);
/// Where the checkpoint of a step stands, and the step of a checkpoint's folder by its name.
std::filesystem::path checkpoint_path(const std::filesystem::path& run_dir, std::int64_t step);
std::optional<std::int64_t> step_of_checkpoint(const std::filesystem::path& path);
/// The one saved last: what `latest` names, or the newest where that file is of no use.
std::optional<std::filesystem::path> find_latest(const std::filesystem::path& run_dir);
/// The checkpoint that `path` means: a checkpoint's folder, or a run's (its latest).
std::filesystem::path locate_checkpoint(const std::filesystem::path& path);

struct Resumed {
  std::filesystem::path path;
  CheckpointInfo info;
  std::int64_t bytes_read = 0;  ///< of tensors, by this rank
};
/// Finds the checkpoint to go on from and fills the views from it, all of its data verified.
/// `spec`: "none"; "auto": the run's latest, with a warning the one before where it is damaged,
/// none where there are none; else a path for locate_checkpoint, damage to which is an error. One
/// that does not fit the views is an error under "auto" too. `while_reading` is called now and
/// then.
std::optional<Resumed> resume_checkpoint(Communicator& world, Stream& stream,
                                         const std::filesystem::path& run_dir,
                                         std::string_view spec, std::span<const StateView> views,
                                         const std::function<void()>& while_reading = {});

}  // namespace arcus
