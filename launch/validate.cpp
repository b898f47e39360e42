#include <optional>
#include <regex>
#include <set>

#include "launch/run_config.hpp"
#include "src/base/error.hpp"
#include "src/model/routing_rules.hpp"
#include "src/train/schedule.hpp"

namespace arcus {
namespace {

void validate_regex(const std::string& key, const std::string& text) {
  try {
    const std::regex pattern(text, std::regex::ECMAScript);
  } catch (const std::regex_error& error) {
    ARCUS_FAIL(ExitCode::usage,
               "{} = \"{}\" is no regular expression: {}; a plain part of the name such as "
               "\"experts\" will do",
               key, text, error.what());
  }
}

void validate_groups(const std::vector<ParamGroupConfig>& groups) {
  for (std::size_t i = 0; i < groups.size(); ++i) {
    ARCUS_REQUIRE(!groups[i].match.empty() || groups[i].part != kAnyPart, ExitCode::usage,
                  "train.group.{0}.match is missing; give a regular expression such as \"embed\", "
                  "or a train.group.{0}.part such as \"experts\"",
                  i);
    validate_regex(fmt::format("train.group.{}.match", i), groups[i].match);
  }
}

void validate_domains(const std::vector<DomainConfig>& domains) {
  std::set<std::string> names;
  for (std::size_t i = 0; i < domains.size(); ++i) {
    ARCUS_REQUIRE(!domains[i].name.empty(), ExitCode::usage,
                  "data.domain.{}.name is missing; give the name of a domain of the prepared data",
                  i);
    ARCUS_REQUIRE(names.insert(domains[i].name).second, ExitCode::usage,
                  "data.domain \"{}\" is given twice; add the two weights", domains[i].name);
  }
}

/// Keeps every product of sizes far from an overflow.
void validate_sizes(const Config& config) {
  const ModelConfig& m = config.model;
  const auto d = [](std::int64_t n) { return static_cast<double>(n); };
  const double head_dim = m.head_dim > 0 ? d(m.head_dim) : d(m.hidden_size) / d(m.num_heads);
  const double attention = d(m.hidden_size) * head_dim * 2 * (d(m.num_heads) + d(m.num_kv_heads));
  const double experts =
      3 * d(m.hidden_size) * d(m.expert_ff_size) * (d(m.num_experts) + d(m.num_shared_experts));
  const double parameters =
      (d(m.vocab_size) + (m.position == "learned" ? d(m.max_positions) : 0)) * d(m.hidden_size) +
      d(m.num_layers) * (attention + experts);
  constexpr double kMostParameters = 1e15;
  ARCUS_REQUIRE(parameters < kMostParameters, ExitCode::usage,
                "the model would have {:.1e} parameters; lower model.hidden_size ({}), "
                "model.num_layers ({}), model.num_experts ({}), model.expert_ff_size ({}) or "
                "model.vocab_size ({})",
                parameters, m.hidden_size, m.num_layers, m.num_experts, m.expert_ff_size,
                m.vocab_size);
  const double slots = d(config.train.seq_len) * d(config.train.micro_batch_seqs) * d(m.topk);
  ARCUS_REQUIRE(slots < 2147483648.0, ExitCode::usage,
                "a micro-batch would have {:.1e} assignments of tokens to experts, more than 2^31; "
                "lower train.micro_batch_seqs ({}), train.seq_len ({}) or model.topk ({})",
                slots, config.train.micro_batch_seqs, config.train.seq_len, m.topk);
}

void validate_capacity(const Config& config, const RoutingConfig& routing) {
  const std::int64_t tokens = config.train.seq_len * config.train.micro_batch_seqs;
  ARCUS_REQUIRE(
      routing.min_capacity <= tokens, ExitCode::usage,
      "routing.min_capacity ({}) exceeds the {} tokens of a micro-batch (train.seq_len {} "
      "x train.micro_batch_seqs {}); set it to {} or less",
      routing.min_capacity, tokens, config.train.seq_len, config.train.micro_batch_seqs, tokens);
}

/// The first rule of routing that `config` breaks, in [routing] or in a row of
/// [[routing.override]].
struct BrokenRule {
  Refusal refusal;
  std::optional<std::size_t> row;
};
BrokenRule first_broken_rule(const Config& config) {
  BrokenRule broken{first_refusal(config.model, config.routing), {}};
  const std::vector<RoutingOverride> overrides = resolve_overrides(config);
  for (std::size_t i = 0; i < overrides.size() && broken.refusal.empty(); ++i) {
    ModelConfig model = config.model;
    model.topk = overrides[i].with.topk;
    broken = {first_refusal(model, overrides[i].with.routing), i};
  }
  return broken;
}

/// What must be set beside the first remedy of a refusal before the configuration is accepted: a
/// rule that does not hold is seldom alone. Empty where that remedy is enough.
std::string settings_beyond_the_first(const Config& config) {
  constexpr int kMostRounds = 32;  // more than there are rules
  Config trial = config;
  std::string text;
  for (int round = 0; round < kMostRounds; ++round) {
    const BrokenRule broken = first_broken_rule(trial);
    if (broken.refusal.empty()) {
      validate(trial.model, trial.routing);
      return text;
    }
    for (const Setting& setting : broken.refusal.remedies.front()) {
      apply_set(trial, setting.key_in(broken.row) + "=" + setting.value);
      if (round == 0) continue;
      text += fmt::format("{}{} = {}{}", text.empty() ? "; with the first, then also " : " and ",
                          setting.key_in(broken.row), setting.value, setting.remark);
    }
  }
  return {};
}

void validate_routing(const Config& config) {
  try {
    validate(config.model, config.routing);
    validate(config.model, resolve_overrides(config));
  } catch (const Error& error) {
    std::string more;
    try {
      more = settings_beyond_the_first(config);
    } catch (const Error&) {
      // Something else is wrong with it, and comes to light once this is mended.
    }
    throw Error(error.code(), error.what() + more, error.file(), error.line());
  }
}

}  // namespace

void validate(const Config& config) {
  validate_routing(config);
  validate(config.train);
  ARCUS_REQUIRE(config.run.spike_factor == 0 || config.checkpoint.every > 0, ExitCode::usage,
                "run.spike_factor ({}) goes back to checkpoints, and checkpoint.every is 0; set it "
                "to a number of steps, such as 100",
                config.run.spike_factor);
  validate_groups(config.groups);
  validate_regex("train.lora.match", config.lora.match);
  validate_domains(config.data.domains);
  validate_sizes(config);
  check_positions(config.model, config.train.seq_len);
  validate_capacity(config, config.routing);
  for (const RoutingOverride& o : resolve_overrides(config)) {
    validate_capacity(config, o.with.routing);
  }
}

}  // namespace arcus
