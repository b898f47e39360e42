#pragma once

#include <cstdint>
#include <vector>

#include "src/model/param_registry.hpp"

namespace arcus {

/// How a flat is shared out over the ranks of a group (ZeRO-1): cuts at blocks only. Rank r owns
/// elements [offsets[r], offsets[r] + counts[r]), alignment gaps included.
struct FlatShards {
  std::vector<std::int64_t> counts, offsets;
  std::vector<ParamBlock> blocks;        ///< of the whole flat, in memory order
  std::vector<std::size_t> first_block;  ///< [ranks + 1]: rank r owns blocks [r], [r + 1)

  std::span<const ParamBlock> owned(int rank) const {
    const auto r = static_cast<std::size_t>(rank);
    return {blocks.data() + first_block[r], first_block[r + 1] - first_block[r]};
  }
};
FlatShards make_shards(std::vector<ParamBlock> blocks, std::int64_t flat_size, int num_ranks);

}  // namespace arcus
