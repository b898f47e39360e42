#include "comm/node_map.hpp"

#include <algorithm>

namespace arcus {

int NodeMap::relay(int source, int node) const {
  const std::vector<int>& there = ranks_of(node);
  return there[static_cast<std::size_t>(place_of[static_cast<std::size_t>(source)]) % there.size()];
}

std::vector<int> NodeMap::relayed_by(int relay_rank) const {
  const int node = node_of[static_cast<std::size_t>(relay_rank)];
  std::vector<int> sources;
  for (int source = 0; source < num_ranks(); ++source) {
    if (node_of[static_cast<std::size_t>(source)] != node && relay(source, node) == relay_rank) {
      sources.push_back(source);
    }
  }
  return sources;
}

NodeMap map_nodes(Communicator& comm, Communicator& node) {
  Stream stream(1);
  // Every rank's first neighbour names its node.
  std::int64_t first = comm.rank();
  stream.wait(node.broadcast(stream, {{&first, DType::i64, 1, 1}, 0}));
  const auto size = static_cast<std::size_t>(comm.size());
  std::vector<std::int64_t> firsts(size);
  std::vector<std::int64_t> ones(size, 1);
  std::vector<std::int64_t> indices(size);
  for (std::size_t r = 0; r < size; ++r) indices[r] = static_cast<std::int64_t>(r);
  firsts[static_cast<std::size_t>(comm.rank())] = first;
  stream.wait(
      comm.all_gather_v(stream, {{firsts.data(), DType::i64, 1, comm.size()}, ones, indices}));

  NodeMap map;
  map.rank = comm.rank();
  map.node_of.resize(size);
  map.place_of.resize(size);
  std::vector<std::int64_t> names;
  for (std::size_t r = 0; r < size; ++r) {
    auto found = std::find(names.begin(), names.end(), firsts[r]);
    if (found == names.end()) {
      found = names.insert(names.end(), firsts[r]);
      map.ranks.emplace_back();
    }
    const auto n = static_cast<std::size_t>(found - names.begin());
    map.node_of[r] = static_cast<int>(n);
    map.place_of[r] = static_cast<int>(map.ranks[n].size());
    map.ranks[n].push_back(static_cast<int>(r));
  }
  ARCUS_CHECK(static_cast<int>(map.mine().size()) == node.size(),
              "{} ranks name the same first neighbour, the node has {}", map.mine().size(),
              node.size());
  return map;
}

}  // namespace arcus
