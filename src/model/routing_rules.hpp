#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "src/model/config.hpp"

namespace arcus {

/// Which routing choices go with which, as data: what is refused, what would do instead, and which
/// keys other keys leave without effect. Messages, `arcus help routing` and ROUTING.md come from
/// it.

/// A key and a value, as `--set key=value` takes them.
struct Setting {
  std::string key;
  std::string value;   ///< as TOML text
  std::string remark;  ///< what a user should know before, "" = nothing

  /// The key; with `row`, that of the same setting in that row of [[routing.override]].
  std::string key_in(std::optional<std::size_t> row) const;
};

/// What is wrong with one combination.
struct Refusal {
  std::string problem;  ///< names the keys and their values
  /// Each set of settings alone makes the rule hold and breaks none that held.
  std::vector<std::vector<Setting>> remedies;

  bool empty() const { return problem.empty(); }
  /// What is wrong and what would do. With `row`, for that row of [[routing.override]], whose keys
  /// are named.
  std::string message(std::optional<std::size_t> row = {}) const;
};

struct RoutingRule {
  std::string_view rule;  ///< in words
  /// Empty: the rule holds. Else there is a remedy.
  Refusal (*check)(const ModelConfig& model, const RoutingConfig& routing);
};

std::span<const RoutingRule> routing_rules();

/// A key that does something only beside others.
struct KeyUse {
  std::string_view key;
  std::string_view needs;  ///< in words
  /// `every_expert`: topk is num_experts, so that nothing is chosen.
  bool (*used)(const RoutingConfig& routing, bool every_expert);
};

std::span<const KeyUse> key_uses();

/// Of the first rule that does not hold; empty where all do.
Refusal first_refusal(const ModelConfig& model, const RoutingConfig& routing);
/// Throws (usage) with the message of the first rule that does not hold; `row` as in message().
void check_routing(const ModelConfig& model, const RoutingConfig& routing,
                   std::optional<std::size_t> row = {});
/// What goes with what as Markdown: the properties of the select and stream rows, then every rule
/// and the keys that need others.
std::string combinations_text();

}  // namespace arcus
