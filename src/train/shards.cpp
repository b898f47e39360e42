#include "src/train/shards.hpp"

#include <algorithm>

namespace arcus {

FlatShards make_shards(std::vector<ParamBlock> blocks, std::int64_t flat_size, int num_ranks) {
  FlatShards shards;
  shards.blocks = std::move(blocks);
  const auto ranks = static_cast<std::size_t>(num_ranks);
  // A block goes to the rank in whose equal share of the elements its middle lies.
  const auto owner = [&](const ParamBlock& block) {
    const std::int64_t middle = block.begin + block.count / 2;
    return std::min<std::int64_t>(num_ranks - 1,
                                  middle * num_ranks / std::max<std::int64_t>(1, flat_size));
  };
  shards.first_block.assign(ranks + 1, shards.blocks.size());
  shards.offsets.assign(ranks, flat_size);
  for (std::size_t r = 0; r < ranks; ++r) {
    const auto first = std::partition_point(
        shards.blocks.begin(), shards.blocks.end(),
        [&](const ParamBlock& block) { return owner(block) < static_cast<std::int64_t>(r); });
    shards.first_block[r] = static_cast<std::size_t>(first - shards.blocks.begin());
    if (r == 0) {
      shards.offsets[r] = 0;
    } else if (first != shards.blocks.end()) {
      shards.offsets[r] = first->begin;
    }
  }
  for (std::size_t r = 0; r < ranks; ++r) {
    const std::int64_t end = r + 1 < ranks ? shards.offsets[r + 1] : flat_size;
    shards.counts.push_back(end - shards.offsets[r]);
  }
  return shards;
}

}  // namespace arcus
