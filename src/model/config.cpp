#include "src/model/config.hpp"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <numbers>
#include <numeric>
#include <optional>
#include <string_view>
#include <utility>

#include "src/base/error.hpp"
#include "src/model/routing.hpp"
#include "src/model/routing_rules.hpp"

namespace arcus {
namespace {

__extension__ typedef __int128 Wide;

void require_positive(const char* name, std::int64_t value) {
  ARCUS_REQUIRE(value > 0, ExitCode::usage, "model.{} is {}; it must be at least 1", name, value);
}

void require_one_of(const char* name, const std::string& value,
                    std::initializer_list<std::string_view> choices) {
  ARCUS_REQUIRE(std::find(choices.begin(), choices.end(), value) != choices.end(), ExitCode::usage,
                "model.{} is \"{}\"; it must be one of \"{}\"", name, value,
                fmt::join(choices, "\", \""));
}

void validate_rope_scaling(const ModelConfig& m) {
  ARCUS_REQUIRE(
      m.rope_scaling == "none" || m.rope_scaling == "linear" || m.rope_scaling == "llama3",
      ExitCode::usage,
      "model.rope_scaling is \"{}\"; it must be \"none\", \"linear\" or \"llama3\"",
      m.rope_scaling);
  ARCUS_REQUIRE(m.rope_factor >= 1, ExitCode::usage,
                "model.rope_factor is {}; it must be at least 1", m.rope_factor);
  ARCUS_REQUIRE(m.rope_scaling != "none" || m.rope_factor == 1, ExitCode::usage,
                "model.rope_factor ({}) needs model.rope_scaling (now \"none\"); set it to "
                "\"linear\" or \"llama3\", or rope_factor to 1",
                m.rope_factor);
  ARCUS_REQUIRE(m.rope_low_freq_factor > 0 && m.rope_high_freq_factor > m.rope_low_freq_factor,
                ExitCode::usage,
                "model.rope_low_freq_factor ({}) must be positive and below "
                "model.rope_high_freq_factor ({}); 1 and 4 are usual",
                m.rope_low_freq_factor, m.rope_high_freq_factor);
  ARCUS_REQUIRE(m.rope_original_context > 0, ExitCode::usage,
                "model.rope_original_context is {}; it must be at least 1",
                m.rope_original_context);
}

/// The llama3 rule for one angle: by how often it turns in the original length.
double stretched_llama3(const ModelConfig& m, double inv_freq) {
  const double turns =
      static_cast<double>(m.rope_original_context) * inv_freq / (2 * std::numbers::pi);
  if (turns > m.rope_high_freq_factor) return inv_freq;
  if (turns < m.rope_low_freq_factor) return inv_freq / m.rope_factor;
  const double smooth =
      (turns - m.rope_low_freq_factor) / (m.rope_high_freq_factor - m.rope_low_freq_factor);
  return (1 - smooth) * inv_freq / m.rope_factor + smooth * inv_freq;
}

void validate_rope(const ModelConfig& m, std::int64_t head_dim) {
  ARCUS_REQUIRE(
      head_dim % 2 == 0, ExitCode::usage,
      "model.head_dim ({}) must be even (rotary embedding pairs dimensions); set it to {}",
      head_dim, head_dim + 1);
  ARCUS_REQUIRE(m.partial_rotary_factor > 0 && m.partial_rotary_factor <= 1, ExitCode::usage,
                "model.partial_rotary_factor is {}; it must be in (0, 1]", m.partial_rotary_factor);
  ARCUS_REQUIRE(static_cast<double>(head_dim) * m.partial_rotary_factor >= 2, ExitCode::usage,
                "model.partial_rotary_factor ({}) of model.head_dim ({}) rotates no pair of "
                "dimensions; set it to at least {}",
                m.partial_rotary_factor, head_dim, 2.0 / static_cast<double>(head_dim));
  ARCUS_REQUIRE(m.rope_theta > 1, ExitCode::usage, "model.rope_theta is {}; it must exceed 1",
                m.rope_theta);
  validate_rope_scaling(m);
}

void validate_positions(const ModelConfig& m) {
  require_one_of("position", m.position, {"rope", "learned", "none"});
  const bool learned = m.position == "learned";
  ARCUS_REQUIRE(!learned || m.max_positions > 0, ExitCode::usage,
                "model.position is \"learned\" and model.max_positions is {}; set max_positions to "
                "the longest sequence that the model is to see, at least train.seq_len",
                m.max_positions);
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
  ARCUS_REQUIRE(m.qk_norm == "none" || m.qk_norm == "head" || m.qk_norm == "full", ExitCode::usage,
                "model.qk_norm is \"{}\"; it must be \"none\", \"head\" or \"full\"", m.qk_norm);
  if (m.position == "rope") validate_rope(m, head_dim);
}

void validate_experts(const ModelConfig& m) {
  ARCUS_REQUIRE(m.first_k_dense >= 0 && m.first_k_dense <= m.num_layers, ExitCode::usage,
                "model.first_k_dense ({}) must be between 0 and model.num_layers ({})",
                m.first_k_dense, m.num_layers);
  ARCUS_REQUIRE(m.num_shared_experts >= 0, ExitCode::usage,
                "model.num_shared_experts is {}; it must not be negative", m.num_shared_experts);
  ARCUS_REQUIRE(!m.shared_expert_gate || m.num_shared_experts > 0, ExitCode::usage,
                "model.shared_expert_gate is on but model.num_shared_experts is 0; set it to 1 or "
                "turn the gate off");
}

}  // namespace

namespace {

/// `row` of the overrides, where the routing is one of those.
void validate(const ModelConfig& m, const RoutingConfig& r, std::optional<std::size_t> row) {
  require_positive("hidden_size", m.hidden_size);
  require_positive("num_layers", m.num_layers);
  require_positive("num_heads", m.num_heads);
  require_positive("num_kv_heads", m.num_kv_heads);
  require_positive("num_experts", m.num_experts);
  require_positive("topk", m.topk);
  require_positive("expert_ff_size", m.expert_ff_size);
  ARCUS_REQUIRE(m.norm_eps > 0, ExitCode::usage, "model.norm_eps is {}; it must be positive",
                m.norm_eps);
  require_one_of("norm", m.norm, {"rms", "layer"});
  require_one_of("activation", m.activation, {"swiglu", "gelu_new", "gelu"});
  validate_positions(m);
  validate_attention(m);
  validate_experts(m);
  find_score(r.score);
  check_routing(m, r, row);
}

}  // namespace

void validate(const ModelConfig& model, const RoutingConfig& routing) {
  validate(model, routing, std::nullopt);
}

void validate(const ModelConfig& model, const std::vector<RoutingOverride>& overrides) {
  std::vector<bool> named(static_cast<std::size_t>(model.num_layers));
  for (std::size_t row = 0; row < overrides.size(); ++row) {
    const RoutingOverride& o = overrides[row];
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
      validate(own, o.with.routing, row);
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

std::vector<double> rope_inv_freq(const ModelConfig& m) {
  if (m.position != "rope") return {};
  const auto pairs =
      static_cast<std::int64_t>(static_cast<double>(m.head_dim) * m.partial_rotary_factor / 2);
  std::vector<double> inv_freq;
  for (std::int64_t i = 0; i < pairs; ++i) {
    const double plain =
        std::pow(m.rope_theta, -static_cast<double>(i) / static_cast<double>(pairs));
    inv_freq.push_back(m.rope_scaling == "llama3"   ? stretched_llama3(m, plain)
                       : m.rope_scaling == "linear" ? plain / m.rope_factor
                                                    : plain);
  }
  return inv_freq;
}

std::int64_t num_slots(const ModelConfig& model, const RoutingConfig& routing) {
  return find_select(routing.select).slot_per_expert ? model.num_experts : model.topk;
}

void check_positions(const ModelConfig& model, std::int64_t seq_len) {
  ARCUS_REQUIRE(model.position != "learned" || seq_len <= model.max_positions, ExitCode::usage,
                "train.seq_len ({}) exceeds model.max_positions ({}), the positions that the model "
                "learns; set seq_len to at most {}, or max_positions of a new model to {}",
                seq_len, model.max_positions, model.max_positions, seq_len);
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
