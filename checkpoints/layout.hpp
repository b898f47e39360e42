#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoints/checkpoint.hpp"

/// Names and files of the format: what writer and reader share.
namespace arcus::layout {

inline constexpr std::int64_t kFormatVersion = 1;
inline constexpr const char* kIndexName = "index.h5";
inline constexpr const char* kChecksumsName = "CHECKSUMS";
inline constexpr const char* kLatestName = "latest";
inline constexpr const char* kTemporarySuffix = ".tmp";
inline constexpr const char* kReplacedSuffix = ".old";

std::filesystem::path checkpoints_folder(const std::filesystem::path& run_dir);
/// The absolute path, without a slash at its end.
std::filesystem::path normalized(const std::filesystem::path& path);
std::string step_name(std::int64_t step);                         ///< "step-00000123"
std::optional<std::int64_t> step_of_name(std::string_view name);  ///< inverse of step_name
std::string shard_name(std::int64_t rank);                        ///< "rank-00001.h5"

/// Puts the whole folder `fresh` under the name `path`. Where a folder has that name already, it is
/// exchanged, or without `exchange` (file systems that cannot) first renamed to `path`.old, so that
/// one of the two is whole under a name that finish_replacements knows at any moment.
void replace_folder(const std::filesystem::path& fresh, const std::filesystem::path& path,
                    bool exchange = true);
/// Ends what a crash inside replace_folder left in the folder of checkpoints: an .old whose name is
/// free gets it back, any other is removed.
void finish_replacements(const std::filesystem::path& folder);

/// Index of the block that begins at `row`; throws (internal) when none does.
std::int64_t block_of_row(const TensorSpec& spec, std::int64_t row);
/// Blocks that `rows` consists of: [first, last). Throws (internal) unless they are whole.
struct BlockRange {
  std::int64_t first = 0;
  std::int64_t last = 0;
};
BlockRange blocks_of(const TensorSpec& spec, RowRange rows);
std::int64_t row_bytes(const TensorSpec& spec);
/// "2x3x4", "-" for a scalar.
std::string shape_text(const TensorSpec& spec);

/// CHECKSUMS as text, and back (checked against its last line; `path` is for messages).
std::string format_checksums(const std::vector<StoredFile>& files);
std::vector<StoredFile> parse_checksums(const std::string& text, const std::filesystem::path& path);

/// index.h5. Writing uses info and tensors of `checkpoint` and the shards in `folder`; reading
/// fills them in.
void write_index(const std::filesystem::path& folder, const Checkpoint& checkpoint);
void read_index(Checkpoint& checkpoint);

/// CHECKSUMS and index.h5 verified and read; presence and sizes of shards only with `check_shards`
/// (where many ranks open one checkpoint, one of them is enough).
Checkpoint open(const std::filesystem::path& path, bool check_shards);

/// Throws (checkpoint) where views and checkpoint name other tensors, types or shapes.
void require_match(const Checkpoint& checkpoint, std::span<const StateView> views, Match match);
/// Reads what read_views would, for the sake of its hashes; the views are not touched.
void check_views(const Checkpoint& checkpoint, std::span<const StateView> views,
                 const std::function<void()>& while_reading = {});
/// Fills this rank's views; returns the bytes read for them. `while_reading` may be empty.
std::int64_t read_views(const Checkpoint& checkpoint, std::span<const StateView> views,
                        const std::function<void()>& while_reading = {});

}  // namespace arcus::layout
