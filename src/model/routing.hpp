#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "kernels/gate.hpp"
#include "src/model/config.hpp"
#include "src/model/pass.hpp"

namespace arcus {

/// A routing is three orthogonal choices, each a row of a table, plus capacity: *score* turns
/// logits into s, *select* picks K experts a token, *balance* adds losses or state. Adding one is a
/// row.

struct ScoreRow {
  std::string_view name;
  Score score;
};

struct SelectRow {
  std::string_view name;
  /// Fills routing.topk_idx from routing.s.
  void (*select)(PassContext& ctx, const ModelConfig& model, const RoutingConfig& config,
                 Routing& routing);
};

/// Numbers of one layer and micro-batch before coefficients and weights.
struct BalanceValues {
  double aux = 0;     ///< E sum_i f_i P_i
  double z_loss = 0;  ///< mean of logsumexp^2
};

/// One balancing term: its part of the loss, and its part in the gate's backward pass. A term whose
/// coefficient is 0 adds nothing.
struct BalanceRow {
  std::string_view name;
  void (*report)(const RoutingConfig& config, const MicroBatch& batch, const BalanceValues& values,
                 std::size_t layer, MicroBatchStats& stats);
  void (*add_gradient)(const RoutingConfig& config, const MicroBatch& batch, GateBackward& args);
};

std::span<const ScoreRow> score_table();
std::span<const SelectRow> select_table();
std::span<const BalanceRow> balance_table();

/// The row of that name; throws (usage), listing the names, for an unknown one.
const ScoreRow& find_score(std::string_view name);
const SelectRow& find_select(std::string_view name);

/// Tokens over which the aux loss's f and P are taken: the micro-batch, or each sequence.
std::int64_t aux_group_tokens(const RoutingConfig& config, const MicroBatch& batch);

}  // namespace arcus
