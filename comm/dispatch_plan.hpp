#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "comm/process_groups.hpp"
#include "kernels/ffn.hpp"

namespace arcus {

/// Which step and layer a counts exchange belongs to; ranks that disagree are named.
struct PlanTag {
  std::int64_t step = 0;
  std::int64_t layer = 0;
};

/// Where every kept (token, choice) of one round goes and what arrives here. Made once a layer and
/// round, used four times: dispatch, combine and their gradients. Send order: by (owner rank,
/// expert, token, choice rank). Received rows: by (source rank, local expert, token, choice rank),
/// so that one peer's rows are contiguous; segments are sorted by (local expert, micro-batch). All
/// storage is reserved by the dispatcher's `make_plan_storage`; making a plan allocates nothing.
struct DispatchPlan {
  std::int64_t num_tokens = 0;          ///< T of this rank's micro-batch
  std::int64_t slots_per_token = 0;     ///< K
  std::int64_t micro_batch = -1;        ///< global number of this rank's micro-batch; -1 = idle
  std::span<std::int32_t> row_of_slot;  ///< [T, K]: row in send order, or -1 where dropped
  std::span<std::int32_t> slot_of_row;  ///< [num_send_rows]: t * K + k, its inverse; -1 = spare
  std::span<std::int64_t> send_counts, send_offsets;  ///< [P], [P] rows
  std::span<std::int64_t> recv_counts, recv_offsets;
  std::span<Segment> segments;  ///< those with rows > 0
  /// The same apart: rows of this rank's own tokens, which are there as soon as dispatch returns
  /// and need not travel back, and rows of other ranks'.
  std::span<Segment> own_segments, other_segments;
  std::int64_t num_send_rows = 0;
  std::int64_t num_recv_rows = 0;    ///< R
  std::int64_t num_padded_rows = 0;  ///< Rp: every segment rounded up to 32 rows

  // Of exchanges through shared memory alone. n = ranks of this node.
  /// [n, P] rows that each rank of the node gets from each source, and where they begin there.
  std::span<std::int64_t> node_counts, node_offsets;
  /// [num_send_rows] for a row that leaves the node: its token's place among the tokens that go to
  /// that node, each counted once; -1 = spare.
  std::span<std::int32_t> unique_of_row;
  std::span<std::int64_t> unique_counts;   ///< [nodes] such tokens
  std::span<std::int64_t> relayed_unique;  ///< the same of the sources that this rank relays

  /// What make_plan_storage reserved; the spans above are the parts of it in use.
  struct Storage {
    std::span<std::int32_t> row_of_slot, slot_of_row;
    std::span<std::int32_t> unique_tokens;  ///< node by node
    std::span<Segment> segments, own_then_others;
  };
  Storage storage;
};

}  // namespace arcus
