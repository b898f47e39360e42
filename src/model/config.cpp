#include "src/model/config.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "src/base/error.hpp"
#include "src/model/routing.hpp"

namespace arcus {
namespace {

__extension__ typedef __int128 Wide;

void require_positive(const char* name, std::int64_t value) {
  ARCUS_REQUIRE(value > 0, ExitCode::usage, "model.{} is {}; it must be at least 1", name, value);
}

void validate_attention(const ModelConfig& m) {
  ARCUS_REQUIRE(m.num_heads % m.num_kv_heads == 0, ExitCode::usage,
                "model.num_heads ({}) must be a multiple of model.num_kv_heads ({}); set "
                "num_kv_heads to {}",
                m.num_heads, m.num_kv_heads, m.num_heads);
  ARCUS_REQUIRE(m.head_dim > 0 || m.hidden_size % m.num_heads == 0, ExitCode::usage,
                "model.hidden_size ({}) is no multiple of model.num_heads ({}); set model.head_dim "
                "(e.g. {})",
                m.hidden_size, m.num_heads, std::max<std::int64_t>(2, m.hidden_size / m.num_heads));
  const std::int64_t head_dim = m.head_dim > 0 ? m.head_dim : m.hidden_size / m.num_heads;
  ARCUS_REQUIRE(
      head_dim % 2 == 0, ExitCode::usage,
      "model.head_dim ({}) must be even (rotary embedding pairs dimensions); set it to {}",
      head_dim, head_dim + 1);
  ARCUS_REQUIRE(m.qk_norm == "none" || m.qk_norm == "head" || m.qk_norm == "full", ExitCode::usage,
                "model.qk_norm is \"{}\"; it must be \"none\", \"head\" or \"full\"", m.qk_norm);
  ARCUS_REQUIRE(m.partial_rotary_factor > 0 && m.partial_rotary_factor <= 1, ExitCode::usage,
                "model.partial_rotary_factor is {}; it must be in (0, 1]", m.partial_rotary_factor);
  ARCUS_REQUIRE(static_cast<double>(head_dim) * m.partial_rotary_factor >= 2, ExitCode::usage,
                "model.partial_rotary_factor ({}) of model.head_dim ({}) rotates no pair of "
                "dimensions; set it to at least {}",
                m.partial_rotary_factor, head_dim, 2.0 / static_cast<double>(head_dim));
  ARCUS_REQUIRE(m.rope_theta > 1, ExitCode::usage, "model.rope_theta is {}; it must exceed 1",
                m.rope_theta);
}

void validate_experts(const ModelConfig& m) {
  ARCUS_REQUIRE(m.topk <= m.num_experts, ExitCode::usage,
                "model.topk ({}) exceeds model.num_experts ({}); set topk to {} or less", m.topk,
                m.num_experts, m.num_experts);
  ARCUS_REQUIRE(m.first_k_dense >= 0 && m.first_k_dense <= m.num_layers, ExitCode::usage,
                "model.first_k_dense ({}) must be between 0 and model.num_layers ({})",
                m.first_k_dense, m.num_layers);
  ARCUS_REQUIRE(m.num_shared_experts >= 0, ExitCode::usage,
                "model.num_shared_experts is {}; it must not be negative", m.num_shared_experts);
  ARCUS_REQUIRE(!m.shared_expert_gate || m.num_shared_experts > 0, ExitCode::usage,
                "model.shared_expert_gate is on but model.num_shared_experts is 0; set it to 1 or "
                "turn the gate off");
}

void validate_groups(const ModelConfig& m, const RoutingConfig& r) {
  ARCUS_REQUIRE(r.group_score == "top2_sum" || r.group_score == "max", ExitCode::usage,
                "routing.group_score is \"{}\"; it must be \"top2_sum\" or \"max\"", r.group_score);
  ARCUS_REQUIRE(r.n_group >= 1 && r.topk_group >= 1, ExitCode::usage,
                "routing.n_group ({}) and routing.topk_group ({}) must be at least 1", r.n_group,
                r.topk_group);
  if (r.n_group == 1) {
    ARCUS_REQUIRE(r.topk_group == 1, ExitCode::usage,
                  "routing.topk_group ({}) needs groups; set routing.n_group to more than that, or "
                  "topk_group to 1",
                  r.topk_group);
    return;
  }
  ARCUS_REQUIRE(
      m.num_experts % r.n_group == 0, ExitCode::usage,
      "routing.n_group ({}) must divide model.num_experts ({}); set it and topk_group to 1 "
      "for no groups",
      r.n_group, m.num_experts);
  const std::int64_t width = m.num_experts / r.n_group;
  ARCUS_REQUIRE(
      r.topk_group < r.n_group, ExitCode::usage,
      "routing.topk_group ({}) must be smaller than routing.n_group ({}); set both to 1 for "
      "no groups",
      r.topk_group, r.n_group);
  ARCUS_REQUIRE(m.topk <= r.topk_group * width, ExitCode::usage,
                "model.topk ({}) exceeds the {} experts that routing.topk_group ({}) groups of {} "
                "hold; set topk to {}",
                m.topk, r.topk_group * width, r.topk_group, width, r.topk_group * width);
  ARCUS_REQUIRE(width > 1 || r.group_score == "max", ExitCode::usage,
                "routing.group_score \"top2_sum\" needs groups of two experts or more, but "
                "routing.n_group ({}) leaves {}; set group_score to \"max\"",
                r.n_group, width);
}

void validate_capacity(const RoutingConfig& r) {
  ARCUS_REQUIRE(r.drop_policy == "position" || r.drop_policy == "probs", ExitCode::usage,
                "routing.drop_policy is \"{}\"; it must be \"position\" or \"probs\"",
                r.drop_policy);
  for (const auto& [name, value] : {std::pair{"capacity_factor", r.capacity_factor},
                                    std::pair{"eval_capacity_factor", r.eval_capacity_factor}}) {
    ARCUS_REQUIRE(value == 0 || (value >= 1e-6 && value <= 1e6), ExitCode::usage,
                  "routing.{} is {}; it must be 0 (dropless) or between 0.000001 and 1000000", name,
                  value);
  }
  ARCUS_REQUIRE(r.min_capacity >= 0, ExitCode::usage,
                "routing.min_capacity is {}; it must not be negative", r.min_capacity);
  ARCUS_REQUIRE(!r.pad_to_capacity || r.capacity_factor > 0, ExitCode::usage,
                "routing.pad_to_capacity is true, but routing.capacity_factor is 0 (dropless); set "
                "pad_to_capacity to false, or capacity_factor to 1.25");
  ARCUS_REQUIRE(
      !r.pad_to_capacity || find_stream(r.stream).passes_all || find_stream(r.stream).predicts,
      ExitCode::usage,
      "routing.pad_to_capacity needs a number of tokens that is known in advance, but "
      "routing.stream \"{}\" lets any number pass by; set stream to \"weighted\", or "
      "pad_to_capacity to false",
      r.stream);
  ARCUS_REQUIRE(!r.renormalize_after_drop || r.renormalize, ExitCode::usage,
                "routing.renormalize_after_drop is true, but routing.renormalize is false; set "
                "renormalize_after_drop to false");
}

void validate_losses(const ModelConfig& m, const RoutingConfig& r) {
  ARCUS_REQUIRE(
      r.aux_scope == "micro_batch" || r.aux_scope == "sequence" || r.aux_scope == "global",
      ExitCode::usage,
      "routing.aux_scope is \"{}\"; it must be \"micro_batch\", \"sequence\" or \"global\"",
      r.aux_scope);
  for (const auto& [name, value] :
       {std::pair{"aux_loss", r.aux_loss}, std::pair{"aux_loss_sequence", r.aux_loss_sequence},
        std::pair{"aux_loss_global", r.aux_loss_global}, std::pair{"z_loss", r.z_loss},
        std::pair{"importance_loss", r.importance_loss}, std::pair{"load_loss", r.load_loss},
        std::pair{"expert_bias_rate", r.expert_bias_rate}, std::pair{"noise", r.noise}}) {
    ARCUS_REQUIRE(value >= 0, ExitCode::usage, "routing.{} is {}; it must not be negative", name,
                  value);
  }
  ARCUS_REQUIRE(r.jitter >= 0 && r.jitter < 1, ExitCode::usage,
                "routing.jitter is {}; it must be at least 0 and below 1", r.jitter);
  ARCUS_REQUIRE(r.sinkhorn_iterations >= 1, ExitCode::usage,
                "routing.sinkhorn_iterations is {}; it must be at least 1", r.sinkhorn_iterations);
  ARCUS_REQUIRE(r.load_loss == 0 || r.noise > 0, ExitCode::usage,
                "routing.load_loss ({}) counts chances under noise, but routing.noise is 0; set "
                "load_loss to 0, or noise to 1",
                r.load_loss);
  ARCUS_REQUIRE(r.load_loss == 0 || m.topk < m.num_experts, ExitCode::usage,
                "routing.load_loss ({}) needs model.topk ({}) below model.num_experts ({}); set "
                "load_loss to 0",
                r.load_loss, m.topk, m.num_experts);
  ARCUS_REQUIRE(r.quantile_rate >= 0 && r.quantile_rate <= 1, ExitCode::usage,
                "routing.quantile_rate is {}; it must be between 0 and 1", r.quantile_rate);
  ARCUS_REQUIRE(r.expert_bias_rate <= 1, ExitCode::usage,
                "routing.expert_bias_rate is {}; it must be between 0 and 1", r.expert_bias_rate);
  ARCUS_REQUIRE(
      r.quantile_rate == 0 || r.expert_bias_rate == 0, ExitCode::usage,
      "routing.quantile_rate ({}) and routing.expert_bias_rate ({}) set the same bias; set "
      "one of them to 0",
      r.quantile_rate, r.expert_bias_rate);
  ARCUS_REQUIRE(r.quantile_rate == 0 || (m.topk < m.num_experts && r.n_group == 1), ExitCode::usage,
                "routing.quantile_rate ({}) needs model.topk ({}) below model.num_experts ({}) and "
                "one group (routing.n_group is {}); set quantile_rate to 0",
                r.quantile_rate, m.topk, m.num_experts, r.n_group);
  ARCUS_REQUIRE(
      !r.center_bias || r.expert_bias_rate > 0, ExitCode::usage,
      "routing.center_bias is true, but routing.expert_bias_rate is 0; set center_bias to "
      "false, or expert_bias_rate to 0.001");
}

void validate_stream(const RoutingConfig& r) {
  const StreamRow& row = find_stream(r.stream);
  ARCUS_REQUIRE(r.stream_theta > 0 && r.stream_theta < 1, ExitCode::usage,
                "routing.stream_theta is {}; it must be above 0 and below 1", r.stream_theta);
  ARCUS_REQUIRE(r.stream_capacity_factor >= 1e-6 && r.stream_capacity_factor <= 1, ExitCode::usage,
                "routing.stream_capacity_factor is {}; it must be between 0.000001 and 1",
                r.stream_capacity_factor);
  ARCUS_REQUIRE(r.stream_target_share > 0 && r.stream_target_share <= 1, ExitCode::usage,
                "routing.stream_target_share is {}; it must be above 0 and at most 1",
                r.stream_target_share);
  ARCUS_REQUIRE(r.stream_target_loss >= 0, ExitCode::usage,
                "routing.stream_target_loss is {}; it must not be negative", r.stream_target_loss);
  ARCUS_REQUIRE(r.stream_target_loss == 0 || row.decides, ExitCode::usage,
                "routing.stream_target_loss ({}) needs a decision layer; set routing.stream to "
                "\"threshold\", or stream_target_loss to 0",
                r.stream_target_loss);
  ARCUS_REQUIRE(
      !row.predicts || r.allow_future_leak, ExitCode::usage,
      "routing.stream \"{}\" looks at later tokens: what a token gets in training depends on "
      "text that a causal model must not know; set routing.allow_future_leak to true if you "
      "accept that, or stream to \"threshold\"",
      row.name);
  ARCUS_REQUIRE(r.quantile_rate == 0 || row.passes_all, ExitCode::usage,
                "routing.quantile_rate ({}) needs all tokens at the gate, but routing.stream "
                "\"{}\" lets some pass by; set stream to \"weighted\" or quantile_rate to 0",
                r.quantile_rate, row.name);
}

void validate_routing(const ModelConfig& m, const RoutingConfig& r) {
  find_score(r.score);
  find_select(r.select);
  validate_stream(r);
  ARCUS_REQUIRE(
      !(m.topk == 1 && r.renormalize), ExitCode::usage,
      "routing.renormalize with model.topk = 1 makes every weight 1, so the gate would not "
      "learn; set routing.renormalize to false");
  ARCUS_REQUIRE(r.routed_scaling_factor > 0, ExitCode::usage,
                "routing.routed_scaling_factor is {}; it must be positive",
                r.routed_scaling_factor);
  // First what the selection takes at all: the others name ways out that it must go with.
  validate_combination(m, r);
  validate_groups(m, r);
  validate_capacity(r);
  validate_losses(m, r);
}

}  // namespace

void validate(const ModelConfig& m, const RoutingConfig& r) {
  require_positive("hidden_size", m.hidden_size);
  require_positive("num_layers", m.num_layers);
  require_positive("num_heads", m.num_heads);
  require_positive("num_kv_heads", m.num_kv_heads);
  require_positive("num_experts", m.num_experts);
  require_positive("topk", m.topk);
  require_positive("expert_ff_size", m.expert_ff_size);
  ARCUS_REQUIRE(m.norm_eps > 0, ExitCode::usage, "model.norm_eps is {}; it must be positive",
                m.norm_eps);
  validate_attention(m);
  validate_experts(m);
  validate_routing(m, r);
}

void validate(const ModelConfig& model, const std::vector<RoutingOverride>& overrides) {
  std::vector<bool> named(static_cast<std::size_t>(model.num_layers));
  for (const RoutingOverride& o : overrides) {
    const std::string layers = o.first_layer == o.last_layer
                                   ? fmt::format("{}", o.first_layer)
                                   : fmt::format("{}-{}", o.first_layer, o.last_layer);
    ARCUS_REQUIRE(o.first_layer <= o.last_layer, ExitCode::usage,
                  "routing.override: layers \"{}\" end before they begin; write \"{}-{}\"", layers,
                  o.last_layer, o.first_layer);
    ARCUS_REQUIRE(model.first_k_dense < model.num_layers, ExitCode::usage,
                  "routing.override: layers \"{}\", but no layer routes: model.first_k_dense ({}) "
                  "makes all {} dense",
                  layers, model.first_k_dense, model.num_layers);
    ARCUS_REQUIRE(o.first_layer >= model.first_k_dense && o.first_layer <= o.last_layer &&
                      o.last_layer < model.num_layers,
                  ExitCode::usage,
                  "routing.override: layers \"{}\" are not all MoE layers; those are {}-{} "
                  "(model.first_k_dense, model.num_layers - 1)",
                  layers, model.first_k_dense, model.num_layers - 1);
    for (std::int64_t l = o.first_layer; l <= o.last_layer; ++l) {
      ARCUS_REQUIRE(!named[static_cast<std::size_t>(l)], ExitCode::usage,
                    "routing.override: layer {} is named twice; put its keys into one row", l);
      named[static_cast<std::size_t>(l)] = true;
    }
    ModelConfig own = model;
    own.topk = o.with.topk;
    try {
      validate(own, o.with.routing);
    } catch (const Error& error) {
      throw Error(error.code(),
                  fmt::format("in layer{} {}: {}", o.first_layer == o.last_layer ? "" : "s", layers,
                              error.what()),
                  error.file(), error.line());
    }
  }
}

LayerRouting routing_of_layer(const ModelConfig& model, const RoutingConfig& routing,
                              const std::vector<RoutingOverride>& overrides, std::int64_t layer) {
  for (const RoutingOverride& o : overrides) {
    if (layer >= o.first_layer && layer <= o.last_layer) return o.with;
  }
  return {model.topk, routing};
}

double aux_coefficient(const RoutingConfig& routing, AuxScope scope) {
  const char* const name = scope == AuxScope::sequence ? "sequence"
                           : scope == AuxScope::global ? "global"
                                                       : "micro_batch";
  const double own = scope == AuxScope::sequence ? routing.aux_loss_sequence
                     : scope == AuxScope::global ? routing.aux_loss_global
                                                 : 0;
  return own + (routing.aux_scope == name ? routing.aux_loss : 0);
}

std::int64_t num_slots(const ModelConfig& model, const RoutingConfig& routing) {
  return find_select(routing.select).slot_per_expert ? model.num_experts : model.topk;
}

ModelConfig resolve(ModelConfig model, std::int64_t data_vocab_size) {
  if (model.vocab_size == 0) model.vocab_size = data_vocab_size;
  if (model.head_dim == 0) model.head_dim = model.hidden_size / model.num_heads;
  if (model.dense_ff_size == 0) model.dense_ff_size = model.topk * model.expert_ff_size;
  require_positive("vocab_size", model.vocab_size);
  return model;
}

std::int64_t expert_capacity(double capacity_factor, std::int64_t min_capacity, std::int64_t topk,
                             std::int64_t tokens, std::int64_t num_experts) {
  if (capacity_factor == 0) return 0;
  constexpr std::int64_t kUnit = 1'000'000;
  const auto factor = static_cast<std::int64_t>(std::llround(capacity_factor * kUnit));
  const std::int64_t wanted = static_cast<std::int64_t>(
      (static_cast<Wide>(factor) * topk * tokens + num_experts * kUnit - 1) /
      (num_experts * kUnit));
  return std::min(tokens, std::max(min_capacity, wanted));
}

}  // namespace arcus
