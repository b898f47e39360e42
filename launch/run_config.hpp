#pragma once

#include <cstdint>
#include <filesystem>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "comm/process_groups.hpp"
#include "src/data/config.hpp"
#include "src/model/config.hpp"
#include "src/train/config.hpp"

namespace arcus {

/// A row of [[routing.override]]: the keys of [routing], and topk, that other layers than the rest
/// use. Keys that are not given keep the model's values.
struct RoutingOverrideRow {
  std::string layers;  ///< "4-7" or "4"; 0-based, inclusive, dense layers counted
  std::int64_t topk = 1;
  RoutingConfig routing;
  std::set<std::string> given;  ///< keys other than `layers`
};

/// The configuration of a run. Each folder owns its struct; option_table() lists the keys.
struct Config {
  RunConfig run;
  ModelConfig model;
  RoutingConfig routing;
  std::vector<RoutingOverrideRow> routing_overrides;
  TrainConfig train;
  std::vector<ParamGroupConfig> groups;
  LoraConfig lora;
  DataConfig data;
  ParallelConfig parallel;
  EvalConfig eval;
  CheckpointConfig checkpoint;
};

/// Reads TOML text on top of `base`. `source` names it in messages. Throws (usage) naming
/// every unknown key, wrong type and value out of range, with its line and what would do.
Config from_toml(std::string_view text, const std::string& source, const Config& base = {});
/// from_toml of a file, then each of `sets` ("section.key=value") in order; not yet validated.
Config load_config(const std::filesystem::path& file, std::span<const std::string> sets,
                   const Config& base = {});
/// One `--set`: the value in TOML syntax, a bare word stands for text. Rows of an array are
/// `section.N.key=value` (N counts from 0; the next free N adds a row) or `section=[{...}]`.
void apply_set(Config& config, const std::string& assignment);

/// Canonical text: every key, in table order; from_toml(to_toml(c)) equals c bit for bit.
std::string to_toml(const Config& config);
/// The keys whose values are not the defaults, one "section.key = value" a line.
std::string changed_from_defaults(const Config& config);
/// The keys whose values differ, one "section.key: before -> after" a line; rows of an array count
/// as one where their number differs.
std::string differences(const Config& before, const Config& after);
/// Every key with its default, meaning and allowed values; itself a valid configuration file.
std::string config_help();

/// The rows of [[routing.override]] on top of [model] and [routing]. Throws (usage) where `layers`
/// is no range of numbers.
std::vector<RoutingOverride> resolve_overrides(const Config& config);

/// Keys of [routing] and its overrides that differ from their defaults but that other keys leave
/// without effect, each with what it would need. The configuration must be valid.
std::vector<std::string> keys_without_effect(const Config& config);

/// Cross-field rules. Throws (usage) naming the fields, their values and a value that would do.
/// Rules that need the data or the number of ranks are checked where those are known.
void validate(const Config& config);

}  // namespace arcus
