#include "checkpoints/interop/family.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <optional>

#include "src/base/error.hpp"

namespace arcus {
namespace {

// The most specific ones first: choose_family takes the first that fits.
constexpr std::array kFamilies{
    Family{.name = "mixtral",
           .hf_class = "MixtralForCausalLM",
           .gguf_arch = "llama",
           .spelling = Spelling::mixtral,
           .exported = true,
           .qk_norm = "none"},
    Family{.name = "qwen3_moe",
           .hf_class = "Qwen3MoeForCausalLM",
           .gguf_arch = "qwen3moe",
           .exported = true,
           .qk_norm = "head"},
    Family{.name = "olmoe",
           .hf_class = "OlmoeForCausalLM",
           .gguf_arch = "olmoe",
           .exported = true,
           .qk_norm = "full"},
    Family{.name = "qwen2_moe",
           .hf_class = "Qwen2MoeForCausalLM",
           .gguf_arch = "qwen2moe",
           .exported = true,
           .shared = "shared_expert",
           .shared_gate = true,
           .qk_norm = "none",
           .qkv_bias = true,
           .always_qkv_bias = true},
    Family{.name = "glm4_moe",
           .hf_class = "Glm4MoeForCausalLM",
           .gguf_arch = "glm4moe",
           .exported = true,
           .shared = "shared_experts",
           .expert_bias = true,
           .qk_norm = "any",
           .qkv_bias = true},
    Family{.name = "dots1",
           .hf_class = "Dots1ForCausalLM",
           .gguf_arch = "dots1",
           .shared = "shared_experts",
           .expert_bias = true,
           .qk_norm = "head",
           .qkv_bias = true},
    Family{.name = "bailing_moe_v2",
           .hf_class = "BailingMoeV2ForCausalLM",
           .gguf_arch = "bailingmoe2",
           .spelling = Spelling::bailing,
           .shared = "shared_experts",
           .expert_bias = true,
           .qk_norm = "any",
           .qkv_bias = true},
    Family{.name = "llama",
           .hf_class = "LlamaForCausalLM",
           .gguf_arch = "llama",
           .experts = false,
           .qk_norm = "none",
           .qkv_bias = true},
    Family{.name = "mistral",
           .hf_class = "MistralForCausalLM",
           .gguf_arch = "llama",
           .experts = false,
           .qk_norm = "none"},
    Family{.name = "qwen2",
           .hf_class = "Qwen2ForCausalLM",
           .gguf_arch = "qwen2",
           .experts = false,
           .qk_norm = "none",
           .qkv_bias = true},
    Family{.name = "qwen3",
           .hf_class = "Qwen3ForCausalLM",
           .gguf_arch = "qwen3",
           .experts = false,
           .qk_norm = "head",
           .qkv_bias = true},
    Family{.name = "gpt2",
           .hf_class = "GPT2LMHeadModel",
           .gguf_arch = "gpt2",
           .spelling = Spelling::gpt2,
           .experts = false,
           .qk_norm = "none",
           .qkv_bias = true},
};

std::string text(bool value) { return value ? "true" : "false"; }
std::string text(std::int64_t value) { return fmt::format("{}", value); }
std::string text(double value) { return fmt::format("{}", value); }
std::string text(std::string_view value) { return fmt::format("\"{}\"", value); }
std::string text(const char* value) { return text(std::string_view(value)); }

/// Collects misfits; `require` reads like the rule.
class Rules {
 public:
  template <class T, class Wanted>
  void require(bool fits, const char* key, const T& value, const Wanted& wanted) {
    if (!fits) found_.push_back({key, text(value), text(wanted)});
  }
  template <class T>
  void refuse(bool wrong, const char* key, const T& value) {
    if (wrong) found_.push_back({key, text(value), ""});
  }
  std::vector<Misfit> take() { return std::move(found_); }

 private:
  std::vector<Misfit> found_;
};

/// Whether two layers compute alike outside training.
bool same_in_evaluation(const LayerRouting& a, const LayerRouting& b) {
  const RoutingConfig& x = a.routing;
  const RoutingConfig& y = b.routing;
  return a.topk == b.topk && x.score == y.score && x.select == y.select &&
         x.renormalize == y.renormalize && x.gate_bias == y.gate_bias &&
         x.routed_scaling_factor == y.routed_scaling_factor && x.n_group == y.n_group &&
         x.topk_group == y.topk_group && (x.n_group == 1 || x.group_score == y.group_score) &&
         x.stream == y.stream && has_expert_bias(x) == has_expert_bias(y);
}

/// What no program's files can say.
void check_any_family(const PortableModel& p, Rules& rules) {
  const ModelConfig& m = p.model;
  const RoutingConfig& r = p.routing;
  rules.require(m.norm == "rms", "model.norm", m.norm, "rms");
  rules.require(m.activation == "swiglu", "model.activation", m.activation, "swiglu");
  rules.require(m.position == "rope", "model.position", m.position, "rope");
  rules.require(!m.mlp_bias, "model.mlp_bias", m.mlp_bias, false);
  rules.require(!m.o_bias, "model.o_bias", m.o_bias, false);
  // In evaluation these take the topk largest scores.
  const bool takes_largest =
      r.select == "topk" || r.select == "second_sampled" || r.select == "sinkhorn";
  rules.require(takes_largest, "routing.select", r.select, "topk");
  rules.require(r.score == "softmax" || r.score == "sigmoid", "routing.score", r.score, "softmax");
  rules.require(!r.gate_bias, "routing.gate_bias", r.gate_bias, false);
  rules.require(r.stream == "none", "routing.stream.mode", r.stream, "none");
  rules.require(r.n_group == 1 || r.group_score == "top2_sum", "routing.group_score", r.group_score,
                "top2_sum");
  for (const RoutingOverride& o : p.overrides) {
    if (same_in_evaluation(o.with, {m.topk, r})) continue;
    rules.refuse(true, "routing.override layers",
                 fmt::format("{}-{}", o.first_layer, o.last_layer));
  }
}

void check_attention(const PortableModel& p, const Family& f, Target target, Rules& rules) {
  const ModelConfig& m = p.model;
  const bool any_norm = f.qk_norm == "any" && m.qk_norm != "full";
  rules.require(any_norm || m.qk_norm == f.qk_norm, "model.qk_norm", m.qk_norm,
                f.qk_norm == "any" ? "head" : f.qk_norm);
  rules.require(f.qkv_bias || !m.qkv_bias, "model.qkv_bias", m.qkv_bias, false);
  rules.require(f.name == "glm4_moe" || m.partial_rotary_factor == 1, "model.partial_rotary_factor",
                m.partial_rotary_factor, 1.0);
  if (target == Target::gguf && f.gguf_arch != "llama") {
    // Its factors are a tensor that one architecture reads.
    rules.require(m.rope_scaling != "llama3", "model.rope_scaling", m.rope_scaling, "none");
  }
  if (f.name == "olmoe" || f.name == "qwen2_moe") {
    rules.require(m.head_dim * m.num_heads == m.hidden_size, "model.head_dim", m.head_dim,
                  m.hidden_size / m.num_heads);
  }
  if (f.name != "olmoe") return;
  rules.require(m.num_kv_heads == m.num_heads, "model.num_kv_heads", m.num_kv_heads, m.num_heads);
  // Engines have it built in.
  rules.require(m.norm_eps == 1e-5, "model.norm_eps", m.norm_eps, 1e-5);
}

void check_routing_of(const PortableModel& p, const Family& f, Target target, Rules& rules) {
  const ModelConfig& m = p.model;
  const RoutingConfig& r = p.routing;
  const bool glm = f.name == "glm4_moe";
  // The GGUF reader of glm4moe takes any score; the transformers class only the sigmoid.
  const std::string_view score = glm ? "sigmoid" : "softmax";
  rules.require(r.score == score || (glm && target == Target::gguf), "routing.score", r.score,
                score);
  if (f.name == "mixtral" || (f.name == "qwen3_moe" && target == Target::gguf)) {
    rules.require(r.renormalize, "routing.renormalize", r.renormalize, true);
  }
  if (f.name == "olmoe" || f.name == "qwen2_moe") {
    rules.require(!r.renormalize, "routing.renormalize", r.renormalize, false);
  }
  rules.require(f.expert_bias || !has_expert_bias(r),
                r.quantile_rate > 0 ? "routing.quantile_rate" : "routing.expert_bias_rate",
                r.quantile_rate > 0 ? r.quantile_rate : r.expert_bias_rate, 0.0);
  if (glm) {
    // transformers ignores layers of GLM's own predictor.
    rules.require(m.num_layers <= 46, "model.num_layers", m.num_layers, std::int64_t{46});
    return;
  }
  rules.require(r.routed_scaling_factor == 1, "routing.routed_scaling_factor",
                r.routed_scaling_factor, 1.0);
  rules.require(r.n_group == 1, "routing.n_group", r.n_group, std::int64_t{1});
  rules.require(m.first_k_dense == 0, "model.first_k_dense", m.first_k_dense, std::int64_t{0});
}

/// A model without experts is of no family that is written.
void require_experts(const PortableModel& p) {
  const ModelConfig& m = p.model;
  ARCUS_REQUIRE(m.first_k_dense < m.num_layers, ExitCode::usage,
                "the model has no layer with experts (model.first_k_dense {} of {} layers), and "
                "models with experts are what is exported; `arcus upcycle` makes one of it",
                m.first_k_dense, m.num_layers);
}

void check_shared(const PortableModel& p, const Family& f, Rules& rules) {
  const ModelConfig& m = p.model;
  if (f.shared.empty()) {
    rules.require(m.num_shared_experts == 0, "model.num_shared_experts", m.num_shared_experts,
                  std::int64_t{0});
  }
  if (f.shared_gate) {
    rules.require(m.num_shared_experts > 0, "model.num_shared_experts", m.num_shared_experts,
                  std::int64_t{1});
  }
  rules.require(m.shared_expert_gate == f.shared_gate, "model.shared_expert_gate",
                m.shared_expert_gate, f.shared_gate);
}

}  // namespace

std::span<const Family> families() { return kFamilies; }

Target target_from_name(std::string_view name) {
  ARCUS_REQUIRE(name == "hf" || name == "gguf", ExitCode::usage,
                "--to {}: must be hf (a Hugging Face directory) or gguf (one file)", name);
  return name == "hf" ? Target::hf : Target::gguf;
}

const Family& find_exported_family(std::string_view name) {
  std::string known;
  for (const Family& family : kFamilies) {
    if (!family.exported) continue;
    if (family.name == name) return family;
    known += fmt::format(", {}", family.name);
  }
  ARCUS_FAIL(ExitCode::usage, "--family {}: must be auto{}", name, known);
}

bool has_expert_bias(const RoutingConfig& routing) {
  return routing.expert_bias_rate > 0 || routing.quantile_rate > 0;
}

bool needs_empty_shared_expert(const PortableModel& model, const Family& family) {
  return !family.shared.empty() && family.experts && model.model.num_shared_experts == 0;
}

std::vector<Misfit> misfits(const PortableModel& model, const Family& family, Target target) {
  Rules rules;
  check_any_family(model, rules);
  check_attention(model, family, target, rules);
  check_routing_of(model, family, target, rules);
  check_shared(model, family, rules);
  return rules.take();
}

std::string describe(std::span<const Misfit> misfits) {
  std::string all;
  for (const Misfit& m : misfits) {
    all += fmt::format("{}{} = {} ({})", all.empty() ? "" : ", ", m.key, m.value,
                       m.wanted.empty() ? "train without it" : "train with " + m.wanted);
  }
  return all;
}

const Family& choose_family(const PortableModel& model, Target target) {
  require_experts(model);
  const Family* nearest = nullptr;
  std::vector<Misfit> fewest;
  for (const Family& family : kFamilies) {
    if (!family.exported) continue;
    std::vector<Misfit> found = misfits(model, family, target);
    if (found.empty()) return family;
    if (nearest == nullptr || found.size() < fewest.size()) {
      nearest = &family;
      fewest = std::move(found);
    }
  }
  std::string other;
  if (model.model.norm == "layer" || model.model.activation != "swiglu") {
    other =
        "; no inference engine has a mixture of experts with blocks of this shape (GPT-2's), so "
        "such a model can be trained and evaluated here, not exported";
  } else if (target == Target::hf) {
    const Family& universal = find_exported_family("glm4_moe");
    if (misfits(model, universal, Target::gguf).empty()) {
      other = "; as GGUF (--to gguf) it can be written as it is";
    }
  }
  ARCUS_FAIL(ExitCode::usage,
             "no family that other programs know computes what this model does. The nearest is {}; "
             "in its way stand {}{}",
             nearest->name, describe(fewest), other);
}

const Family& choose_family(const PortableModel& model, Target target, std::string_view name) {
  if (name == "auto") return choose_family(model, target);
  require_experts(model);
  const Family& family = find_exported_family(name);
  const std::vector<Misfit> found = misfits(model, family, target);
  ARCUS_REQUIRE(found.empty(), ExitCode::usage,
                "--family {} does not compute what this model does: {}; --family auto finds one "
                "that does, if there is one",
                name, describe(found));
  return family;
}

std::vector<std::string> export_notes(const PortableModel& model, const Family& family,
                                      Target target) {
  std::vector<std::string> notes;
  const ModelConfig& m = model.model;
  const auto multiple = [&](const char* what, std::int64_t size) {
    if (size % 32 != 0) {
      notes.push_back(
          fmt::format("{} ({}) is no multiple of 32: engines cannot quantise it", what, size));
    } else if (target == Target::gguf && size % 256 != 0) {
      notes.push_back(
          fmt::format("{} ({}) is no multiple of 256: 4-bit quantisation falls back to other types",
                      what, size));
    }
  };
  multiple("model.hidden_size", m.hidden_size);
  multiple("model.expert_ff_size", m.expert_ff_size);
  if (m.first_k_dense > 0) multiple("model.dense_ff_size", m.dense_ff_size);
  multiple("model.num_heads * head_dim", m.num_heads * m.head_dim);
  if (m.vocab_size % 64 != 0) {
    notes.push_back(fmt::format("model.vocab_size ({}) is no multiple of 64: some engines pad it",
                                m.vocab_size));
  }
  if (model.routing.eval_capacity_factor > 0) {
    notes.push_back(fmt::format("routing.eval_capacity_factor ({}): other programs drop nothing",
                                model.routing.eval_capacity_factor));
  }
  if (model.routing.noise > 0) {
    notes.push_back("routing.noise: the gate's noise weights serve training only and are left out");
  }
  if (needs_empty_shared_expert(model, family)) {
    notes.push_back(
        fmt::format("{} always has a shared expert: one of zeros is written, which "
                    "changes nothing and costs its time",
                    family.name));
  }
  return notes;
}

}  // namespace arcus
