#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "kernels/balance.hpp"
#include "kernels/gate.hpp"
#include "kernels/select.hpp"
#include "src/model/config.hpp"
#include "src/model/pass.hpp"

namespace arcus {

/// A routing is three orthogonal choices, each a row of a table, plus noise, groups and capacity:
/// *score* turns logits into s, *select* picks experts, *balance* adds losses or state. Adding one
/// is a row; its properties decide what it goes with. ROUTING.md defines every row.

/// Which layer of which model a row works for.
struct GateContext {
  PassContext& pass;
  const ModelConfig& model;
  const RoutingConfig& config;
  Routing& routing;  ///< of the real tokens

  std::size_t layer() const { return static_cast<std::size_t>(pass.layer); }
  /// The layer's random numbers of one kind.
  TokenDraws draws(std::string_view purpose) const;
};

struct ScoreRow {
  std::string_view name;
  std::string_view what;
  Score score;
  bool cosine;  ///< logits are scaled cosines
};

struct SelectRow {
  std::string_view name;
  std::string_view what;
  std::int64_t topk;     ///< the only topk it takes; 0 = any
  bool all_experts;      ///< topk must be num_experts
  bool slot_per_expert;  ///< a token may go to any number of experts
  bool predicts;         ///< looks at the whole micro-batch; evaluation asks a predictor
  bool steered;          ///< by scores: losses on them, and noise, change the selection
  bool takes_bias;       ///< expert_bias_rate, quantile_rate
  bool takes_groups;     ///< n_group > 1
  bool takes_capacity;   ///< capacity_factor > 0
  bool ascending;        ///< choices stand in ascending expert id
  /// Fills routing.topk_idx, and `wanted` where some choices are not asked for (it holds topk_idx
  /// otherwise: returns false).
  bool (*select)(const GateContext& gate, TensorView wanted);
};

/// Which tokens go through a block's experts at all: the first of two levels.
struct StreamRow {
  std::string_view name;
  std::string_view what;
  bool decides;      ///< there is a decision layer
  bool passes_all;   ///< every token goes
  bool predicts;     ///< looks at the whole micro-batch; evaluation asks a predictor
  bool holds_share;  ///< stream_target_loss holds the share that goes, not the mean gate value
};

/// One balancing term. A term that is not active adds nothing.
struct BalanceRow {
  std::string_view name;
  std::string_view what;
  bool needs_steering;  ///< refused where scores do not decide the selection
  double (*coefficient)(const RoutingConfig& config);  ///< 0 = off
  /// Adds its part of the loss to the statistics; keeps what backward needs in routing.
  void (*forward)(const GateContext& gate);
  /// Adds its gradient to ds [T, E]; null: none.
  void (*backward_scores)(const GateContext& gate, TensorView ds);

  bool active(const RoutingConfig& config) const { return coefficient(config) > 0; }
};

std::span<const ScoreRow> score_table();
std::span<const SelectRow> select_table();
std::span<const BalanceRow> balance_table();
std::span<const StreamRow> stream_table();

/// The row of that name; throws (usage), listing the names, for an unknown one.
const ScoreRow& find_score(std::string_view name);
const SelectRow& find_select(std::string_view name);
const StreamRow& find_stream(std::string_view name);

}  // namespace arcus
