#pragma once

#include <memory>
#include <vector>

#include "comm/communicator.hpp"

namespace arcus {

/// Which ranks of a communicator share a node, and who passes on what comes from other nodes: what
/// rank r sends to a node goes to the rank there that has r's own place (a rail), so that every
/// link carries one message, and the work is spread over a node's ranks.
struct NodeMap {
  int rank = 0;
  std::vector<int> node_of;             ///< [P] nodes are numbered by their first rank
  std::vector<int> place_of;            ///< [P] place among the node's ranks
  std::vector<std::vector<int>> ranks;  ///< [nodes] their ranks, ascending

  int num_ranks() const { return static_cast<int>(node_of.size()); }
  int num_nodes() const { return static_cast<int>(ranks.size()); }
  int node() const { return node_of[static_cast<std::size_t>(rank)]; }
  const std::vector<int>& ranks_of(int node) const { return ranks[static_cast<std::size_t>(node)]; }
  /// This rank's node.
  const std::vector<int>& mine() const { return ranks_of(node()); }
  /// The rank of `node` that takes what `source` sends there.
  int relay(int source, int node) const;
  /// Ranks of other nodes that `relay` takes messages from, ascending.
  std::vector<int> relayed_by(int relay) const;
};

/// `names[r]` says which node rank r is on.
NodeMap number_nodes(int rank, const std::vector<std::int64_t>& names);
/// `node` = the ranks of `comm` on this rank's node (Communicator::split_by_node). Collective.
NodeMap map_nodes(Communicator& comm, Communicator& node);

}  // namespace arcus
