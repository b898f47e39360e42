#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace arcus {

/// Keys of [model]. Names and layouts of the parameters are Hugging Face's (glm4_moe spelling).
struct ModelConfig {
  std::int64_t vocab_size = 0;  ///< 0 = "auto": the data's
  std::int64_t hidden_size = 512;
  std::int64_t num_layers = 4;
  std::int64_t num_heads = 8;
  std::int64_t num_kv_heads = 4;
  std::int64_t head_dim = 0;     ///< 0 = hidden_size / num_heads
  std::string qk_norm = "head";  ///< "none" | "head" | "full"
  bool qkv_bias = false;
  bool o_bias = false;
  std::string position = "rope";  ///< "rope" | "learned" | "none"
  /// Longest text, in tokens: rows of the table of learned positions; else what exported files say,
  /// 0 = train.seq_len.
  std::int64_t max_positions = 0;
  double rope_theta = 10000;
  double partial_rotary_factor = 1;  ///< share of head_dim that is rotated
  /// How the angles were stretched for longer texts: "none" | "linear" (all by rope_factor) |
  /// "llama3" (slow ones by rope_factor, fast ones not, in between a mean).
  std::string rope_scaling = "none";
  double rope_factor = 1;
  double rope_low_freq_factor = 1;            ///< llama3: turns in the original length below which
                                              ///< an angle is slow
  double rope_high_freq_factor = 4;           ///< llama3: above which it is fast
  std::int64_t rope_original_context = 8192;  ///< llama3: the original length, in tokens
  std::string norm = "rms";                   ///< "rms" | "layer"
  double norm_eps = 1e-6;
  std::string activation = "swiglu";  ///< "swiglu" (gated) | "gelu_new" (tanh) | "gelu" (erf)
  bool mlp_bias = false;
  std::int64_t first_k_dense = 0;  ///< leading layers with a dense feed-forward
  std::int64_t dense_ff_size = 0;  ///< 0 = topk * expert_ff_size
  std::int64_t num_experts = 8;
  std::int64_t topk = 2;
  std::int64_t expert_ff_size = 1024;
  std::int64_t num_shared_experts = 0;
  bool shared_expert_gate = false;
  bool tie_embeddings = false;
};

/// Keys of [routing]: score x select x balance as orthogonal choices, plus noise, groups and
/// capacity. ROUTING.md defines what they compute.
struct RoutingConfig {
  std::string score = "softmax";  ///< a row of the score table
  std::string select = "topk";    ///< a row of the select table
  bool renormalize = true;
  bool gate_bias = false;
  double routed_scaling_factor = 1;
  std::int64_t n_group = 1;
  std::int64_t topk_group = 1;
  std::string group_score = "top2_sum";  ///< "top2_sum" | "max"
  double capacity_factor = 0;            ///< 0 = dropless
  std::int64_t min_capacity = 0;
  double eval_capacity_factor = 0;       ///< 0 = dropless
  std::string drop_policy = "position";  ///< "position" | "probs"
  bool pad_to_capacity = false;          ///< in training every expert gets as many rows as it may
  bool renormalize_after_drop = false;
  double aux_loss = 0.01;                 ///< coefficient; 0 = off
  std::string aux_scope = "micro_batch";  ///< of aux_loss: "micro_batch" | "sequence" | "global"
  double aux_loss_sequence = 0;           ///< coefficients beside aux_loss
  double aux_loss_global = 0;
  double z_loss = 0;
  double importance_loss = 0;
  double load_loss = 0;
  double expert_bias_rate = 0;
  bool center_bias = false;
  double quantile_rate = 0;
  double jitter = 0;
  double noise = 0;
  std::int64_t sinkhorn_iterations = 8;
  bool allow_future_leak = false;
  std::string stream = "none";  ///< a row of the stream table: who goes through the experts at all
  double stream_theta = 0.5;
  double stream_capacity_factor = 0.5;
  double stream_target_share = 0.5;
  double stream_target_loss = 0;
};

/// Keys of [train.lora]: low-rank adapters of weights that stay as they are (src/model/lora.hpp).
struct LoraConfig {
  std::int64_t rank = 0;  ///< 0 = no adapters
  double alpha = 0;       ///< what they add is multiplied by alpha / rank; 0 = rank
  std::string match =
      R"(self_attn\.[qkvo]_proj)";  ///< regular expression, searched in the weight's name

  bool active() const { return rank > 0; }
  double scale() const { return alpha > 0 ? alpha / static_cast<double>(rank) : 1; }
};

/// How one layer routes.
struct LayerRouting {
  std::int64_t topk = 0;
  RoutingConfig routing;
};
/// Layers first..last (dense ones counted) that route in another way than the rest.
struct RoutingOverride {
  std::int64_t first_layer = 0;
  std::int64_t last_layer = 0;
  LayerRouting with;
};
/// The routing of one layer: that of the override which names it, else the model's.
LayerRouting routing_of_layer(const ModelConfig& model, const RoutingConfig& routing,
                              const std::vector<RoutingOverride>& overrides, std::int64_t layer);

/// Over which tokens the aux loss takes its fractions.
enum class AuxScope { micro_batch, sequence, global };
/// Its coefficient: aux_loss where that is aux_scope, and the scope's own key.
double aux_coefficient(const RoutingConfig& routing, AuxScope scope);
/// Angle per position of each rotated pair of dimensions, [head_dim * partial_rotary_factor / 2]:
/// rope_theta^(-i / pairs), stretched as rope_scaling says; empty without rotary positions.
std::vector<double> rope_inv_freq(const ModelConfig& model);

/// Slots per token: topk, or num_experts where every expert may take every token.
std::int64_t num_slots(const ModelConfig& model, const RoutingConfig& routing);

/// Cross-field rules, defaults resolved (vocab_size and head_dim filled in). Throws (usage) naming
/// the fields, their values and a value that would do.
void validate(const ModelConfig& model, const RoutingConfig& routing);
/// The same for the layers that overrides name, which must exist, be MoE layers and be named once.
void validate(const ModelConfig& model, const std::vector<RoutingOverride>& overrides);
/// Refuses (usage) sequences longer than the table of learned positions.
void check_positions(const ModelConfig& model, std::int64_t seq_len);
/// 0-valued "derive it" fields replaced by their values. `data_vocab_size` serves "auto".
ModelConfig resolve(ModelConfig model, std::int64_t data_vocab_size);

/// Rows per (expert, micro-batch) of T tokens: min(T, max(min_capacity, ceil(cf K T / E))), cf in
/// units of 1e-6, in integers. 0 when dropless.
std::int64_t expert_capacity(double capacity_factor, std::int64_t min_capacity, std::int64_t topk,
                             std::int64_t tokens, std::int64_t num_experts);

}  // namespace arcus
