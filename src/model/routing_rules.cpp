#include "src/model/routing_rules.hpp"

#include <array>
#include <utility>

#include "src/base/error.hpp"
#include "src/model/routing.hpp"

namespace arcus {
namespace {

using Settings = std::vector<Setting>;

Setting set(std::string key, std::string_view value) {
  return {std::move(key), fmt::format("\"{}\"", value), ""};
}
Setting set(std::string key, const char* value) {
  return set(std::move(key), std::string_view(value));
}
Setting set(std::string key, bool value) { return {std::move(key), value ? "true" : "false", ""}; }
Setting set(std::string key, std::int64_t value) {
  return {std::move(key), fmt::format("{}", value), ""};
}
Setting set(std::string key, double value) {
  return {std::move(key), fmt::format("{}", value), ""};
}

const Setting kAcceptLeak{"routing.allow_future_leak", "true", " if you accept that"};
const Setting kTopk = set("routing.select", "topk");

// ---- settings that only go together
// --------------------------------------------------------------

Settings no_groups() {
  return {set("routing.n_group", std::int64_t{1}), set("routing.topk_group", std::int64_t{1})};
}

Settings not_renormalized(const RoutingConfig& r) {
  Settings settings{set("routing.renormalize", false)};
  if (r.renormalize_after_drop) settings.push_back(set("routing.renormalize_after_drop", false));
  return settings;
}

Settings dropless(const RoutingConfig& r) {
  Settings settings{set("routing.capacity_factor", 0.0)};
  if (r.pad_to_capacity) settings.push_back(set("routing.pad_to_capacity", false));
  return settings;
}

Settings no_expert_bias(const RoutingConfig& r) {
  Settings settings{set("routing.expert_bias_rate", 0.0)};
  if (r.center_bias) settings.push_back(set("routing.center_bias", false));
  return settings;
}

/// A stream in which the tokens' number is known and all of them see the gate.
Settings all_tokens() { return {set("routing.stream", "weighted")}; }

/// A stream whose decisions look at no later token.
Settings causal_stream(const RoutingConfig& r) {
  if (r.pad_to_capacity || r.quantile_rate > 0) return all_tokens();
  return {set("routing.stream", "threshold")};
}

std::int64_t group_width(const ModelConfig& m, const RoutingConfig& r) {
  return m.num_experts / r.n_group;
}
/// Groups that the rules on their number leave to speak of.
bool has_groups(const ModelConfig& m, const RoutingConfig& r) {
  return r.n_group > 1 && m.num_experts % r.n_group == 0 && r.topk_group < r.n_group;
}

// ---- what a select row takes
// ---------------------------------------------------------------------

std::string given(std::string_view key, const auto& value) {
  return fmt::format("{} = {}", key, value);
}

/// A refusal of `settings` in the name of the select row: set `instead` (empty: there is nothing),
/// or take "topk", which goes with everything.
Refusal not_with_select(const RoutingConfig& r, std::string_view settings, Settings instead) {
  const SelectRow& select = find_select(r.select);
  Refusal refusal{fmt::format("routing.select \"{}\" ({}) does not go with {}", select.name,
                              select.what, settings),
                  {}};
  if (!instead.empty()) refusal.remedies.push_back(std::move(instead));
  refusal.remedies.push_back({kTopk});
  return refusal;
}

Refusal check_select_topk(const ModelConfig& m, const RoutingConfig& r) {
  const SelectRow& select = find_select(r.select);
  if (select.topk == 0 || m.topk == select.topk) return {};
  // More choices than now must fit into the groups and leave experts over.
  const bool all_chosen = m.num_experts == select.topk;
  const bool fits =
      m.topk > select.topk || (m.num_experts >= select.topk && r.n_group == 1 &&
                               (!all_chosen || (r.load_loss == 0 && r.quantile_rate == 0)));
  return not_with_select(r, given("model.topk", m.topk),
                         fits ? Settings{set("model.topk", select.topk)} : Settings());
}

Refusal check_all_experts(const ModelConfig& m, const RoutingConfig& r) {
  if (!find_select(r.select).all_experts || m.topk >= m.num_experts) return {};
  const bool fits = r.load_loss == 0 && r.quantile_rate == 0 && r.n_group == 1;
  return not_with_select(r, given("model.topk", m.topk),
                         fits ? Settings{set("model.topk", m.num_experts)} : Settings());
}

Refusal check_prediction_capacity(const ModelConfig&, const RoutingConfig& r) {
  if (!find_select(r.select).predicts || r.capacity_factor > 0) return {};
  return not_with_select(r, given("routing.capacity_factor", r.capacity_factor),
                         {set("routing.capacity_factor", 1.0)});
}

Refusal check_prediction_weights(const ModelConfig&, const RoutingConfig& r) {
  if (!find_select(r.select).predicts || !r.renormalize) return {};
  return not_with_select(r, given("routing.renormalize", r.renormalize), not_renormalized(r));
}

Refusal check_future_leak(const ModelConfig&, const RoutingConfig& r) {
  const SelectRow& select = find_select(r.select);
  if (!select.predicts || r.allow_future_leak) return {};
  return {fmt::format("routing.select \"{}\" looks at later tokens: what a token gets in training "
                      "depends on text that a causal model must not know, and "
                      "routing.allow_future_leak is false",
                      select.name),
          {{kAcceptLeak}, {kTopk}}};
}

Refusal check_select_groups(const ModelConfig&, const RoutingConfig& r) {
  if (find_select(r.select).takes_groups || r.n_group == 1) return {};
  return not_with_select(r, given("routing.n_group", r.n_group), no_groups());
}

Refusal check_select_bias(const ModelConfig&, const RoutingConfig& r) {
  if (find_select(r.select).takes_bias || r.expert_bias_rate == 0) return {};
  return not_with_select(r, given("routing.expert_bias_rate", r.expert_bias_rate),
                         no_expert_bias(r));
}

Refusal check_select_quantiles(const ModelConfig&, const RoutingConfig& r) {
  if (find_select(r.select).takes_bias || r.quantile_rate == 0) return {};
  return not_with_select(r, given("routing.quantile_rate", r.quantile_rate),
                         {set("routing.quantile_rate", 0.0)});
}

Refusal check_select_capacity(const ModelConfig&, const RoutingConfig& r) {
  if (find_select(r.select).takes_capacity || r.capacity_factor == 0) return {};
  return not_with_select(r, given("routing.capacity_factor", r.capacity_factor), dropless(r));
}

Refusal check_select_eval_capacity(const ModelConfig&, const RoutingConfig& r) {
  if (find_select(r.select).takes_capacity || r.eval_capacity_factor == 0) return {};
  return not_with_select(r, given("routing.eval_capacity_factor", r.eval_capacity_factor),
                         {set("routing.eval_capacity_factor", 0.0)});
}

Refusal check_select_noise(const ModelConfig&, const RoutingConfig& r) {
  if (find_select(r.select).steered || r.noise == 0) return {};
  Settings without{set("routing.noise", 0.0)};
  if (r.load_loss > 0) without.push_back(set("routing.load_loss", 0.0));
  return not_with_select(r, given("routing.noise", r.noise), std::move(without));
}

Refusal check_select_jitter(const ModelConfig&, const RoutingConfig& r) {
  if (find_select(r.select).steered || r.jitter == 0) return {};
  return not_with_select(r, given("routing.jitter", r.jitter), {set("routing.jitter", 0.0)});
}

Refusal check_select_losses(const ModelConfig&, const RoutingConfig& r) {
  if (find_select(r.select).steered) return {};
  using Loss = std::pair<std::string_view, double>;
  std::string given;
  Settings without;
  for (const auto& [key, value] : {Loss{"routing.aux_loss", r.aux_loss},
                                   Loss{"routing.aux_loss_sequence", r.aux_loss_sequence},
                                   Loss{"routing.aux_loss_global", r.aux_loss_global},
                                   Loss{"routing.importance_loss", r.importance_loss},
                                   Loss{"routing.load_loss", r.load_loss}}) {
    if (value == 0) continue;
    given += fmt::format("{}{} = {}", given.empty() ? "" : ", ", key, value);
    without.push_back(set(std::string(key), 0.0));
  }
  return without.empty() ? Refusal() : not_with_select(r, given, std::move(without));
}

// ---- weights, groups, capacity
// -------------------------------------------------------------------

Refusal check_topk(const ModelConfig& m, const RoutingConfig& r) {
  if (m.topk <= m.num_experts) return {};
  Settings settings{set("model.topk", m.num_experts)};
  if (m.num_experts == 1 && r.renormalize) {
    for (Setting& setting : not_renormalized(r)) settings.push_back(std::move(setting));
  }
  if (m.num_experts == 1 && find_select(r.select).topk > 1) settings.push_back(kTopk);
  return {fmt::format("model.topk ({}) exceeds model.num_experts ({})", m.topk, m.num_experts),
          {std::move(settings)}};
}

Refusal check_weights(const ModelConfig& m, const RoutingConfig& r) {
  if (m.topk > 1 || !r.renormalize) return {};
  return {
      "routing.renormalize with model.topk = 1 makes every weight 1, so the gate would not learn",
      {not_renormalized(r)}};
}

Refusal check_topk_group_alone(const ModelConfig&, const RoutingConfig& r) {
  if (r.n_group > 1 || r.topk_group == 1) return {};
  return {
      fmt::format("routing.topk_group ({}) needs groups, but routing.n_group is 1", r.topk_group),
      {{set("routing.topk_group", std::int64_t{1})}}};
}

Refusal check_n_group(const ModelConfig& m, const RoutingConfig& r) {
  if (m.num_experts % r.n_group == 0) return {};
  return {fmt::format("routing.n_group ({}) must divide model.num_experts ({})", r.n_group,
                      m.num_experts),
          {no_groups()}};
}

Refusal check_topk_group(const ModelConfig&, const RoutingConfig& r) {
  if (r.n_group == 1 || r.topk_group < r.n_group) return {};
  return {fmt::format("routing.topk_group ({}) must be smaller than routing.n_group ({})",
                      r.topk_group, r.n_group),
          {no_groups()}};
}

Refusal check_group_experts(const ModelConfig& m, const RoutingConfig& r) {
  if (!has_groups(m, r)) return {};
  const std::int64_t width = group_width(m, r);
  if (m.topk <= r.topk_group * width) return {};
  Refusal refusal{
      fmt::format(
          "model.topk ({}) exceeds the {} experts that routing.topk_group ({}) groups of {} "
          "hold",
          m.topk, r.topk_group * width, r.topk_group, width),
      {}};
  const std::int64_t needed = (m.topk + width - 1) / width;
  if (needed < r.n_group) refusal.remedies.push_back({set("routing.topk_group", needed)});
  refusal.remedies.push_back(no_groups());
  return refusal;
}

Refusal check_group_score(const ModelConfig& m, const RoutingConfig& r) {
  if (!has_groups(m, r) || group_width(m, r) > 1 || r.group_score == "max") return {};
  return {fmt::format("routing.group_score \"{}\" needs groups of two experts or more, but "
                      "routing.n_group ({}) leaves {}",
                      r.group_score, r.n_group, group_width(m, r)),
          {{set("routing.group_score", "max")}, no_groups()}};
}

Refusal check_factor(const RoutingConfig& r, const char* key, double factor, Settings instead) {
  // Factors are counted in millionths.
  if (factor == 0 || factor >= 1e-6) return {};
  return {fmt::format("{} is {}, less than 0.000001 and not 0 (dropless)", key, factor),
          {find_select(r.select).takes_capacity ? Settings{set(key, 1.25)} : std::move(instead)}};
}

Refusal check_capacity_factor(const ModelConfig&, const RoutingConfig& r) {
  return check_factor(r, "routing.capacity_factor", r.capacity_factor, dropless(r));
}

Refusal check_eval_capacity_factor(const ModelConfig&, const RoutingConfig& r) {
  return check_factor(r, "routing.eval_capacity_factor", r.eval_capacity_factor,
                      {set("routing.eval_capacity_factor", 0.0)});
}

Refusal check_padding(const ModelConfig&, const RoutingConfig& r) {
  if (!r.pad_to_capacity || r.capacity_factor > 0) return {};
  Refusal refusal{"routing.pad_to_capacity is true, but routing.capacity_factor is 0 (dropless)",
                  {{set("routing.pad_to_capacity", false)}}};
  if (find_select(r.select).takes_capacity) {
    refusal.remedies.push_back({set("routing.capacity_factor", 1.25)});
  }
  return refusal;
}

Refusal check_padded_stream(const ModelConfig&, const RoutingConfig& r) {
  const StreamRow& stream = find_stream(r.stream);
  if (!r.pad_to_capacity || stream.passes_all || stream.predicts) return {};
  return {fmt::format("routing.pad_to_capacity needs a number of tokens that is known in advance, "
                      "but routing.stream \"{}\" lets any number pass by",
                      r.stream),
          {all_tokens(), {set("routing.pad_to_capacity", false)}}};
}

Refusal check_weights_after_drop(const ModelConfig& m, const RoutingConfig& r) {
  if (!r.renormalize_after_drop || r.renormalize) return {};
  Refusal refusal{"routing.renormalize_after_drop is true, but routing.renormalize is false",
                  {{set("routing.renormalize_after_drop", false)}}};
  if (m.topk > 1 && !find_select(r.select).predicts) {
    refusal.remedies.push_back({set("routing.renormalize", true)});
  }
  return refusal;
}

// ---- balance
// -------------------------------------------------------------------------------------

Refusal check_load_noise(const ModelConfig&, const RoutingConfig& r) {
  if (r.load_loss == 0 || r.noise > 0) return {};
  Refusal refusal{
      fmt::format("routing.load_loss ({}) counts chances under noise, but routing.noise "
                  "is 0",
                  r.load_loss),
      {{set("routing.load_loss", 0.0)}}};
  if (find_select(r.select).steered) refusal.remedies.push_back({set("routing.noise", 1.0)});
  return refusal;
}

Refusal check_load_topk(const ModelConfig& m, const RoutingConfig& r) {
  if (r.load_loss == 0 || m.topk < m.num_experts) return {};
  return {fmt::format("routing.load_loss ({}) needs model.topk ({}) below model.num_experts ({})",
                      r.load_loss, m.topk, m.num_experts),
          {{set("routing.load_loss", 0.0)}}};
}

Refusal check_one_bias(const ModelConfig&, const RoutingConfig& r) {
  if (r.quantile_rate == 0 || r.expert_bias_rate == 0) return {};
  return {
      fmt::format("routing.quantile_rate ({}) and routing.expert_bias_rate ({}) set the same bias",
                  r.quantile_rate, r.expert_bias_rate),
      {{set("routing.quantile_rate", 0.0)}, no_expert_bias(r)}};
}

Refusal check_quantile_experts(const ModelConfig& m, const RoutingConfig& r) {
  if (r.quantile_rate == 0 || (m.topk < m.num_experts && r.n_group == 1)) return {};
  return {
      fmt::format("routing.quantile_rate ({}) needs model.topk ({}) below model.num_experts ({}) "
                  "and one group (routing.n_group is {})",
                  r.quantile_rate, m.topk, m.num_experts, r.n_group),
      {{set("routing.quantile_rate", 0.0)}}};
}

Refusal check_quantile_stream(const ModelConfig&, const RoutingConfig& r) {
  if (r.quantile_rate == 0 || find_stream(r.stream).passes_all) return {};
  return {fmt::format("routing.quantile_rate ({}) needs all tokens at the gate, but routing.stream "
                      "\"{}\" lets some pass by",
                      r.quantile_rate, r.stream),
          {all_tokens(), {set("routing.quantile_rate", 0.0)}}};
}

Refusal check_center_bias(const ModelConfig&, const RoutingConfig& r) {
  if (!r.center_bias || r.expert_bias_rate > 0) return {};
  Refusal refusal{"routing.center_bias is true, but routing.expert_bias_rate is 0",
                  {{set("routing.center_bias", false)}}};
  if (find_select(r.select).takes_bias && r.quantile_rate == 0) {
    refusal.remedies.push_back({set("routing.expert_bias_rate", 0.001)});
  }
  return refusal;
}

// ---- stream
// --------------------------------------------------------------------------------------

Refusal check_stream_target(const ModelConfig&, const RoutingConfig& r) {
  if (r.stream_target_loss == 0 || find_stream(r.stream).decides) return {};
  return {
      fmt::format("routing.stream_target_loss ({}) needs a decision layer, but routing.stream is "
                  "\"{}\"",
                  r.stream_target_loss, r.stream),
      {{set("routing.stream_target_loss", 0.0)}, causal_stream(r)}};
}

Refusal check_stream_leak(const ModelConfig&, const RoutingConfig& r) {
  const StreamRow& stream = find_stream(r.stream);
  if (!stream.predicts || r.allow_future_leak) return {};
  return {fmt::format("routing.stream \"{}\" looks at later tokens: what a token gets in training "
                      "depends on text that a causal model must not know, and "
                      "routing.allow_future_leak is false",
                      stream.name),
          {{kAcceptLeak}, causal_stream(r)}};
}

// ---- tables
// --------------------------------------------------------------------------------------

/// What the selection takes at all comes first: it is what a user named.
constexpr std::array kRules{
    RoutingRule{"topk is at most num_experts", check_topk},
    RoutingRule{"topk is what the select takes", check_select_topk},
    RoutingRule{"topk is num_experts where the select weighs all experts", check_all_experts},
    RoutingRule{"a select that looks at later tokens needs capacity_factor",
                check_prediction_capacity},
    RoutingRule{"a select that looks at later tokens does not take renormalize",
                check_prediction_weights},
    RoutingRule{"a select that looks at later tokens needs allow_future_leak", check_future_leak},
    RoutingRule{"n_group > 1 needs a select that takes groups", check_select_groups},
    RoutingRule{"expert_bias_rate needs a select that takes a bias", check_select_bias},
    RoutingRule{"quantile_rate needs a select that takes a bias", check_select_quantiles},
    RoutingRule{"capacity_factor needs a select that takes capacity", check_select_capacity},
    RoutingRule{"eval_capacity_factor needs a select that takes capacity",
                check_select_eval_capacity},
    RoutingRule{"noise needs a select that scores steer", check_select_noise},
    RoutingRule{"jitter needs a select that scores steer", check_select_jitter},
    RoutingRule{"aux, importance and load losses need a select that scores steer",
                check_select_losses},
    RoutingRule{"renormalize needs topk > 1: every weight would be 1", check_weights},
    RoutingRule{"topk_group > 1 needs n_group > 1", check_topk_group_alone},
    RoutingRule{"n_group divides num_experts", check_n_group},
    RoutingRule{"topk_group is below n_group, where there are groups", check_topk_group},
    RoutingRule{"topk is at most what the topk_group groups hold", check_group_experts},
    RoutingRule{"group_score `top2_sum` needs groups of two experts or more", check_group_score},
    RoutingRule{"capacity_factor is 0 or at least 0.000001", check_capacity_factor},
    RoutingRule{"eval_capacity_factor is 0 or at least 0.000001", check_eval_capacity_factor},
    RoutingRule{"pad_to_capacity needs capacity_factor", check_padding},
    RoutingRule{"pad_to_capacity needs a stream in which the number of tokens is known",
                check_padded_stream},
    RoutingRule{"renormalize_after_drop needs renormalize", check_weights_after_drop},
    RoutingRule{"load_loss needs noise", check_load_noise},
    RoutingRule{"load_loss needs topk < num_experts", check_load_topk},
    RoutingRule{"quantile_rate does not go with expert_bias_rate", check_one_bias},
    RoutingRule{"quantile_rate needs topk < num_experts and one group", check_quantile_experts},
    RoutingRule{"quantile_rate needs a stream in which all tokens go", check_quantile_stream},
    RoutingRule{"center_bias needs expert_bias_rate", check_center_bias},
    RoutingRule{"stream_target_loss needs a stream that decides", check_stream_target},
    RoutingRule{"a stream that looks at later tokens needs allow_future_leak", check_stream_leak}};

/// Experts that choose their tokens themselves drop none.
bool drops(const RoutingConfig& r, bool /*every_expert*/) {
  return (r.capacity_factor > 0 && !find_select(r.select).predicts) || r.eval_capacity_factor > 0;
}
bool has_capacity(const RoutingConfig& r, bool /*every_expert*/) {
  return r.capacity_factor > 0 || r.eval_capacity_factor > 0;
}

bool chooses(const RoutingConfig& /*r*/, bool every_expert) { return !every_expert; }

constexpr std::array kKeyUses{
    KeyUse{"group_score", "n_group > 1",
           [](const RoutingConfig& r, bool) { return r.n_group > 1; }},
    KeyUse{"min_capacity", "a capacity factor", has_capacity},
    KeyUse{"drop_policy", "a capacity factor that drops", drops},
    KeyUse{"renormalize_after_drop", "a capacity factor that drops", drops},
    KeyUse{"aux_scope", "aux_loss", [](const RoutingConfig& r, bool) { return r.aux_loss > 0; }},
    KeyUse{"aux_loss", "topk < num_experts", chooses},
    KeyUse{"aux_loss_sequence", "topk < num_experts", chooses},
    KeyUse{"aux_loss_global", "topk < num_experts", chooses},
    KeyUse{"expert_bias_rate", "topk < num_experts", chooses},
    KeyUse{"sinkhorn_iterations", "select \"sinkhorn\"",
           [](const RoutingConfig& r, bool) { return r.select == "sinkhorn"; }},
    KeyUse{"allow_future_leak", "select \"expert_choice\" or stream \"capacity\"",
           [](const RoutingConfig& r, bool) {
             return find_select(r.select).predicts || find_stream(r.stream).predicts;
           }},
    KeyUse{"stream_theta", "stream \"threshold\"",
           [](const RoutingConfig& r, bool) { return r.stream == "threshold"; }},
    KeyUse{"stream_capacity_factor", "stream \"capacity\"",
           [](const RoutingConfig& r, bool) { return r.stream == "capacity"; }},
    KeyUse{"stream_target_share", "stream_target_loss",
           [](const RoutingConfig& r, bool) { return r.stream_target_loss > 0; }}};

std::string_view mark(bool yes) { return yes ? "yes" : "-"; }

std::string topk_of(const SelectRow& select) {
  if (select.all_experts) return "num_experts";
  return select.topk == 0 ? "any" : fmt::format("{}", select.topk);
}

std::string select_table_text() {
  std::string text =
      "| select | what | topk | renormalize | groups | bias | capacity | noise, losses | "
      "allow_future_leak |\n|---|---|---|---|---|---|---|---|---|\n";
  for (const SelectRow& select : select_table()) {
    text += fmt::format("| {} | {} | {} | {} | {} | {} | {} | {} | {} |\n", select.name,
                        select.what, topk_of(select), mark(!select.predicts),
                        mark(select.takes_groups), mark(select.takes_bias),
                        select.predicts ? "needed" : mark(select.takes_capacity),
                        mark(select.steered), select.predicts ? "needed" : "-");
  }
  return text;
}

std::string stream_table_text() {
  std::string text =
      "| stream | what | quantile_rate | pad_to_capacity | target | allow_future_leak |\n"
      "|---|---|---|---|---|---|\n";
  for (const StreamRow& stream : stream_table()) {
    text += fmt::format("| {} | {} | {} | {} | {} | {} |\n", stream.name, stream.what,
                        mark(stream.passes_all), mark(stream.passes_all || stream.predicts),
                        mark(stream.decides), stream.predicts ? "needed" : "-");
  }
  return text;
}

}  // namespace

std::string Setting::key_in(std::optional<std::size_t> row) const {
  return row ? fmt::format("routing.override.{}.{}", *row, key.substr(key.rfind('.') + 1)) : key;
}

std::string Refusal::message(std::optional<std::size_t> row) const {
  std::string text = problem + "; ";
  for (std::size_t i = 0; i < remedies.size(); ++i) {
    text += i == 0 ? "set " : ", or set ";
    for (std::size_t j = 0; j < remedies[i].size(); ++j) {
      const Setting& setting = remedies[i][j];
      text += fmt::format("{}{} to {}{}", j == 0 ? "" : " and ", setting.key_in(row), setting.value,
                          setting.remark);
    }
  }
  return text;
}

std::span<const RoutingRule> routing_rules() { return kRules; }
std::span<const KeyUse> key_uses() { return kKeyUses; }

Refusal first_refusal(const ModelConfig& model, const RoutingConfig& routing) {
  ARCUS_CHECK(routing.n_group > 0 && routing.topk_group > 0 && model.num_experts > 0,
              "{} of {} groups of {} experts", routing.topk_group, routing.n_group,
              model.num_experts);
  for (const RoutingRule& rule : kRules) {
    Refusal refusal = rule.check(model, routing);
    ARCUS_CHECK(refusal.empty() == refusal.remedies.empty(), "\"{}\" names no remedy", rule.rule);
    if (!refusal.empty()) return refusal;
  }
  return {};
}

void check_routing(const ModelConfig& model, const RoutingConfig& routing,
                   std::optional<std::size_t> row) {
  const Refusal refusal = first_refusal(model, routing);
  ARCUS_REQUIRE(refusal.empty(), ExitCode::usage, "{}", refusal.message(row));
}

std::string combinations_text() {
  std::string text = select_table_text() + "\n" + stream_table_text() +
                     "\nRefused is what breaks one of these:\n\n";
  for (const RoutingRule& rule : kRules) text += fmt::format("- {}\n", rule.rule);
  text += "\nWithout effect, and said so at the start of a run:\n\n";
  for (const KeyUse& use : kKeyUses) text += fmt::format("- {} without {}\n", use.key, use.needs);
  return text;
}

}  // namespace arcus
