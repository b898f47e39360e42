#pragma once

#include <atomic>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "checkpoints/checkpoint.hpp"

/// The parts of a save. Only the last ones need the other ranks, so that those before them can run
/// beside training. `progress` grows while they get on.
namespace arcus::writer {

using Progress = std::atomic<std::int64_t>;

/// Rows of one tensor that this rank writes.
struct ShardTensor {
  TensorSpec spec;
  std::int64_t tensor_idx = 0;     ///< in the registry's order
  std::vector<StateSlice> slices;  ///< not empty ones
  std::vector<std::uint64_t> block_hashes;
  std::int64_t offset = 0;  ///< of the first row in the shard's file

  std::int64_t num_rows() const;
};

/// This rank's part of a checkpoint. Points into the state, or into a copy of it.
struct ShardContent {
  std::vector<TensorSpec> specs;     ///< of all tensors
  std::vector<ShardTensor> tensors;  ///< those with rows here
};

/// Checks the views and notes what this rank writes.
ShardContent collect(int rank, std::span<const StateView> views);
/// Bytes of all rows.
std::int64_t bytes_of(const ShardContent& content);
/// Copies all rows to `memory` (bytes_of long), where `content` points from then on.
void copy_state(ShardContent& content, char* memory, Progress& progress);
/// Notes the hashes of all blocks.
void hash_state(ShardContent& content, Progress& progress);

/// Writes the shard into `folder`, forces it to disk, and notes offsets and hashes in `content`.
StoredFile write_shard(const std::filesystem::path& folder, int rank, std::int64_t step,
                       ShardContent& content, Progress& progress);

/// What a rank tells the others about its shard, as bytes.
std::string pack_report(const ShardContent& content, const StoredFile& file);

/// The whole checkpoint from all ranks' reports. Throws (internal) where ranks name other tensors
/// or where rows are missing or written twice.
Checkpoint assemble(std::span<const std::string> reports, std::span<const TensorSpec> specs);

}  // namespace arcus::writer
