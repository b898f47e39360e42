#pragma once

#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "checkpoints/checkpoint.hpp"

/// The three parts of a save. Only the first touches the state and only the last communicates, so
/// that the one between them can run beside training once `collect` copies.
namespace arcus::writer {

/// Rows of one tensor that this rank writes.
struct ShardTensor {
  TensorSpec spec;
  std::int64_t tensor_idx = 0;     ///< in the registry's order
  std::vector<StateSlice> slices;  ///< not empty ones
  std::vector<std::uint64_t> block_hashes;
  std::int64_t offset = 0;  ///< of the first row in the shard's file

  std::int64_t num_rows() const;
};

/// This rank's part of a checkpoint. Points into the state.
struct ShardContent {
  std::vector<TensorSpec> specs;     ///< of all tensors
  std::vector<ShardTensor> tensors;  ///< those with rows here
};

/// Checks the views and hashes this rank's blocks.
ShardContent collect(int rank, std::span<const StateView> views);

/// Writes the shard into `folder`, forces it to disk, and notes the offsets in `content`.
StoredFile write_shard(const std::filesystem::path& folder, int rank, std::int64_t step,
                       ShardContent& content);

/// What a rank tells the others about its shard, as bytes.
std::string pack_report(const ShardContent& content, const StoredFile& file);

/// The whole checkpoint from all ranks' reports. Throws (internal) where ranks name other tensors
/// or where rows are missing or written twice.
Checkpoint assemble(std::span<const std::string> reports, std::span<const TensorSpec> specs);

}  // namespace arcus::writer
