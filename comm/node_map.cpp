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

NodeMap number_nodes(int rank, const std::vector<std::int64_t>& names) {
  NodeMap map;
  map.rank = rank;
  map.node_of.resize(names.size());
  map.place_of.resize(names.size());
  std::vector<std::int64_t> known;
  for (std::size_t r = 0; r < names.size(); ++r) {
    auto found = std::find(known.begin(), known.end(), names[r]);
    if (found == known.end()) {
      found = known.insert(known.end(), names[r]);
      map.ranks.emplace_back();
    }
    const auto n = static_cast<std::size_t>(found - known.begin());
    map.node_of[r] = static_cast<int>(n);
    map.place_of[r] = static_cast<int>(map.ranks[n].size());
    map.ranks[n].push_back(static_cast<int>(r));
  }
  return map;
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

  NodeMap map = number_nodes(comm.rank(), firsts);
  ARCUS_CHECK(static_cast<int>(map.mine().size()) == node.size(),
              "{} ranks name the same first neighbour, the node has {}", map.mine().size(),
              node.size());
  return map;
}

}  // namespace arcus
