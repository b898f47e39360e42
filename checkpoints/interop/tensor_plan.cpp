#include "checkpoints/interop/tensor_plan.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <numeric>

#include "src/model/balance_state.hpp"
#include "src/model/transformer.hpp"

namespace arcus {
namespace {

/// Names in the model.
std::string layer_of(std::int64_t layer) { return fmt::format("model.layers.{}.", layer); }

/// Collects the tensors of one kind of file.
class Planner {
 public:
  Planner(const PortableModel& portable, const Family& family)
      : m_(portable.model), portable_(portable), family_(family) {}

  PlannedTensor& add(std::string name, std::vector<std::int64_t> shape,
                     std::vector<ModelUnit> pieces) {
    return tensors_.emplace_back(PlannedTensor{
        .name = std::move(name), .shape = std::move(shape), .pieces = std::move(pieces)});
  }
  PlannedTensor& add_f32(std::string name, std::vector<std::int64_t> shape,
                         std::vector<ModelUnit> pieces) {
    PlannedTensor& tensor = add(std::move(name), std::move(shape), std::move(pieces));
    tensor.always_f32 = true;
    return tensor;
  }
  std::vector<PlannedTensor> take() { return std::move(tensors_); }

  std::int64_t q_size() const { return m_.num_heads * m_.head_dim; }
  std::int64_t kv_size() const { return m_.num_kv_heads * m_.head_dim; }
  std::int64_t norm_size(std::int64_t full) const {
    return m_.qk_norm == "full" ? full : m_.head_dim;
  }
  std::int64_t shared_ff() const {
    return m_.expert_ff_size * std::max<std::int64_t>(1, m_.num_shared_experts);
  }
  bool is_dense(std::int64_t layer) const { return layer < m_.first_k_dense; }
  bool has_shared() const {
    return m_.num_shared_experts > 0 || needs_empty_shared_expert(portable_, family_);
  }
  /// The pieces of the shared expert's tensor `name`: none where it is empty.
  std::vector<ModelUnit> shared_pieces(const std::string& name) const {
    if (m_.num_shared_experts == 0) return {};
    return {{name}};
  }
  /// All experts of a layer's tensor, one after the other.
  std::vector<ModelUnit> every_expert(const std::string& name) const {
    std::vector<ModelUnit> pieces;
    for (std::int64_t e = 0; e < m_.num_experts; ++e) pieces.push_back({name, e});
    return pieces;
  }
  /// The bias of the choice; zeros where the family always has one and the model none.
  void add_expert_bias(std::string name, std::int64_t layer) {
    if (!family_.expert_bias) return;
    const bool has = has_expert_bias(portable_.routing);
    PlannedTensor& bias = add_f32(std::move(name), {m_.num_experts}, {});
    if (has) bias.pieces = {{layer_of(layer) + "mlp.gate.e_score_correction_bias"}};
    // Programs differ in what stands for experts of groups that are left out; where no bias is
    // below zero they agree.
    bias.shift_to_zero = has && portable_.routing.n_group > 1;
    bias.may_be_absent = true;
  }

  const ModelConfig& m_;
  const PortableModel& portable_;
  const Family& family_;

 private:
  std::vector<PlannedTensor> tensors_;
};

class HfPlanner : Planner {
 public:
  HfPlanner(const PortableModel& portable, const Family& family, const HfSpelling& spelling)
      : Planner(portable, family), spelling_(spelling) {}

  std::vector<PlannedTensor> plan() {
    const bool bailing = family_.spelling == Spelling::bailing;
    const std::int64_t h = m_.hidden_size;
    add(spelling_.prefix + (bailing ? "word_embeddings.weight" : "embed_tokens.weight"),
        {m_.vocab_size, h}, {{"model.embed_tokens.weight"}});
    for (std::int64_t l = 0; l < m_.num_layers; ++l) {
      const std::string from = layer_of(l);
      const std::string to = fmt::format("{}layers.{}.", spelling_.prefix, l);
      add_f32(to + "input_layernorm.weight", {h}, {{from + "input_layernorm.weight"}});
      if (bailing) {
        add_bailing_attention(from + "self_attn.", to + "attention.");
      } else {
        add_attention(from + "self_attn.", to + "self_attn.");
      }
      add_f32(to + "post_attention_layernorm.weight", {h},
              {{from + "post_attention_layernorm.weight"}});
      if (is_dense(l)) {
        add_ffn(from + "mlp.", to + "mlp.", m_.dense_ff_size);
      } else {
        add_moe(l, from + "mlp.", to + spelling_.moe_folder);
      }
    }
    add_f32(spelling_.prefix + "norm.weight", {h}, {{"model.norm.weight"}});
    if (!m_.tie_embeddings) add("lm_head.weight", {m_.vocab_size, h}, {{"lm_head.weight"}});
    return take();
  }

 private:
  void add_attention(const std::string& from, const std::string& to) {
    const std::int64_t h = m_.hidden_size;
    const auto project = [&](const std::string& name, std::int64_t size) {
      add(to + name + ".weight", {size, h}, {{from + name + ".weight"}});
      if (m_.qkv_bias) {
        add_f32(to + name + ".bias", {size}, {{from + name + ".bias"}});
      } else if (family_.always_qkv_bias) {
        add_f32(to + name + ".bias", {size}, {}).may_be_absent = true;
      }
    };
    project("q_proj", q_size());
    project("k_proj", kv_size());
    project("v_proj", kv_size());
    add(to + "o_proj.weight", {h, q_size()}, {{from + "o_proj.weight"}});
    if (m_.o_bias) add_f32(to + "o_proj.bias", {h}, {{from + "o_proj.bias"}});
    if (m_.qk_norm == "none") return;
    add_f32(to + "q_norm.weight", {norm_size(q_size())}, {{from + "q_norm.weight"}});
    add_f32(to + "k_norm.weight", {norm_size(kv_size())}, {{from + "k_norm.weight"}});
  }

  void add_bailing_attention(const std::string& from, const std::string& to) {
    const std::int64_t h = m_.hidden_size;
    const std::int64_t all = q_size() + 2 * kv_size();
    const auto parts = [&](const char* kind) {
      return std::vector<ModelUnit>{
          {from + "q_proj." + kind}, {from + "k_proj." + kind}, {from + "v_proj." + kind}};
    };
    add(to + "query_key_value.weight", {all, h}, parts("weight"));
    if (m_.qkv_bias) add_f32(to + "query_key_value.bias", {all}, parts("bias"));
    add(to + "dense.weight", {h, q_size()}, {{from + "o_proj.weight"}});
    if (m_.qk_norm == "none") return;
    add_f32(to + "query_layernorm.weight", {m_.head_dim}, {{from + "q_norm.weight"}});
    add_f32(to + "key_layernorm.weight", {m_.head_dim}, {{from + "k_norm.weight"}});
  }

  void add_ffn(const std::string& from, const std::string& to, std::int64_t ff) {
    const std::int64_t h = m_.hidden_size;
    const auto project = [&](const std::string& name, std::int64_t out, std::int64_t in) {
      add(to + name + ".weight", {out, in}, {{from + name + ".weight"}});
      if (m_.mlp_bias) add_f32(to + name + ".bias", {out}, {{from + name + ".bias"}});
    };
    project("gate_proj", ff, h);
    project("up_proj", ff, h);
    project("down_proj", h, ff);
  }

  void add_moe(std::int64_t layer, const std::string& from, const std::string& to) {
    const std::int64_t h = m_.hidden_size;
    const std::int64_t f = m_.expert_ff_size;
    add_f32(to + "gate.weight", {m_.num_experts, h}, {{from + "gate.weight"}});
    add_expert_bias(to + (family_.spelling == Spelling::bailing ? "gate.expert_bias"
                                                                : "gate.e_score_correction_bias"),
                    layer);
    const std::string gate = from + "experts.gate_proj.weight";
    const std::string up = from + "experts.up_proj.weight";
    const std::string down = from + "experts.down_proj.weight";
    if (spelling_.fused_experts) {
      std::vector<ModelUnit> both;
      for (std::int64_t e = 0; e < m_.num_experts; ++e) {
        both.push_back({gate, e});
        both.push_back({up, e});
      }
      add(to + "experts.gate_up_proj", {m_.num_experts, 2 * f, h}, std::move(both));
      add(to + "experts.down_proj", {m_.num_experts, h, f}, every_expert(down));
    } else {
      const bool w = spelling_.mixtral_experts;
      for (std::int64_t e = 0; e < m_.num_experts; ++e) {
        const std::string expert = fmt::format("{}experts.{}.", to, e);
        add(expert + (w ? "w1.weight" : "gate_proj.weight"), {f, h}, {{gate, e}});
        add(expert + (w ? "w3.weight" : "up_proj.weight"), {f, h}, {{up, e}});
        add(expert + (w ? "w2.weight" : "down_proj.weight"), {h, f}, {{down, e}});
      }
    }
    if (has_shared()) add_shared(from, to);
  }

  void add_shared(const std::string& from, const std::string& to) {
    const std::int64_t h = m_.hidden_size;
    const std::string inside = from + "shared_experts.";
    const std::string outside = fmt::format("{}{}.", to, family_.shared);
    add(outside + "gate_proj.weight", {shared_ff(), h}, shared_pieces(inside + "gate_proj.weight"));
    add(outside + "up_proj.weight", {shared_ff(), h}, shared_pieces(inside + "up_proj.weight"));
    add(outside + "down_proj.weight", {h, shared_ff()}, shared_pieces(inside + "down_proj.weight"));
    if (!family_.shared_gate) return;
    add_f32(to + "shared_expert_gate.weight", {1, h}, {{from + "shared_expert_gate.weight"}});
  }

  HfSpelling spelling_;
};

class GgufPlanner : Planner {
 public:
  using Planner::Planner;

  std::vector<PlannedTensor> plan() {
    const std::int64_t h = m_.hidden_size;
    add("token_embd.weight", {m_.vocab_size, h}, {{"model.embed_tokens.weight"}});
    for (std::int64_t l = 0; l < m_.num_layers; ++l) {
      const std::string from = layer_of(l);
      const std::string to = fmt::format("blk.{}.", l);
      add_f32(to + "attn_norm.weight", {h}, {{from + "input_layernorm.weight"}});
      add_attention(from + "self_attn.", to);
      add_f32(to + (family_.name == "glm4_moe" ? "post_attention_norm.weight" : "ffn_norm.weight"),
              {h}, {{from + "post_attention_layernorm.weight"}});
      if (is_dense(l)) {
        add_ffn(from + "mlp.", to);
      } else {
        add_moe(l, from + "mlp.", to);
      }
    }
    if (m_.rope_scaling == "llama3") add_rope_factors();
    add_f32("output_norm.weight", {h}, {{"model.norm.weight"}});
    // Not every reader takes the embedding where the head is missing.
    const bool needs_head = family_.gguf_arch == "olmoe" || family_.gguf_arch == "qwen2moe";
    if (!m_.tie_embeddings) {
      add("output.weight", {m_.vocab_size, h}, {{"lm_head.weight"}});
    } else if (needs_head) {
      add("output.weight", {m_.vocab_size, h}, {{"model.embed_tokens.weight"}});
    }
    return take();
  }

 private:
  void add_attention(const std::string& from, const std::string& to) {
    const std::int64_t h = m_.hidden_size;
    const std::int64_t paired = family_.gguf_arch == "llama" ? m_.head_dim : 0;
    if (family_.spelling == Spelling::bailing) {
      const auto parts = [&](const char* kind) {
        return std::vector<ModelUnit>{
            {from + "q_proj." + kind}, {from + "k_proj." + kind}, {from + "v_proj." + kind}};
      };
      const std::int64_t all = q_size() + 2 * kv_size();
      add(to + "attn_qkv.weight", {all, h}, parts("weight"));
      if (m_.qkv_bias) add_f32(to + "attn_qkv.bias", {all}, parts("bias"));
    } else {
      const auto project = [&](const char* outside, const char* inside, std::int64_t size,
                               std::int64_t head_dim) {
        add(fmt::format("{}{}.weight", to, outside), {size, h},
            {{fmt::format("{}{}.weight", from, inside)}})
            .paired_head_dim = head_dim;
        if (!m_.qkv_bias) return;
        add_f32(fmt::format("{}{}.bias", to, outside), {size},
                {{fmt::format("{}{}.bias", from, inside)}})
            .paired_head_dim = head_dim;
      };
      project("attn_q", "q_proj", q_size(), paired);
      project("attn_k", "k_proj", kv_size(), paired);
      project("attn_v", "v_proj", kv_size(), 0);
    }
    add(to + "attn_output.weight", {h, q_size()}, {{from + "o_proj.weight"}});
    if (m_.qk_norm == "none") return;
    add_f32(to + "attn_q_norm.weight", {norm_size(q_size())}, {{from + "q_norm.weight"}});
    add_f32(to + "attn_k_norm.weight", {norm_size(kv_size())}, {{from + "k_norm.weight"}});
  }

  /// By how much each angle is slower than without scaling.
  void add_rope_factors() {
    ModelConfig plain = m_;
    plain.rope_scaling = "none";
    const std::vector<double> before = rope_inv_freq(plain);
    const std::vector<double> after = rope_inv_freq(m_);
    PlannedTensor& factors = add_f32("rope_freqs.weight", {std::ssize(after)}, {});
    for (std::size_t i = 0; i < after.size(); ++i) {
      factors.constants.push_back(static_cast<float>(before[i] / after[i]));
    }
  }

  void add_ffn(const std::string& from, const std::string& to) {
    const std::int64_t h = m_.hidden_size;
    const std::int64_t ff = m_.dense_ff_size;
    add(to + "ffn_gate.weight", {ff, h}, {{from + "gate_proj.weight"}});
    add(to + "ffn_up.weight", {ff, h}, {{from + "up_proj.weight"}});
    add(to + "ffn_down.weight", {h, ff}, {{from + "down_proj.weight"}});
  }

  void add_moe(std::int64_t layer, const std::string& from, const std::string& to) {
    const std::int64_t h = m_.hidden_size;
    const std::int64_t e = m_.num_experts;
    const std::int64_t f = m_.expert_ff_size;
    add_f32(to + "ffn_gate_inp.weight", {e, h}, {{from + "gate.weight"}});
    add_expert_bias(to + "exp_probs_b.bias", layer);
    add(to + "ffn_gate_exps.weight", {e, f, h}, every_expert(from + "experts.gate_proj.weight"));
    add(to + "ffn_up_exps.weight", {e, f, h}, every_expert(from + "experts.up_proj.weight"));
    add(to + "ffn_down_exps.weight", {e, h, f}, every_expert(from + "experts.down_proj.weight"));
    if (!has_shared()) return;
    const std::string shared = from + "shared_experts.";
    add(to + "ffn_gate_shexp.weight", {shared_ff(), h}, shared_pieces(shared + "gate_proj.weight"));
    add(to + "ffn_up_shexp.weight", {shared_ff(), h}, shared_pieces(shared + "up_proj.weight"));
    add(to + "ffn_down_shexp.weight", {h, shared_ff()}, shared_pieces(shared + "down_proj.weight"));
    if (!family_.shared_gate) return;
    add_f32(to + "ffn_gate_inp_shexp.weight", {h}, {{from + "shared_expert_gate.weight"}});
  }
};

/// GPT-2, dense: its tensors are the same in both kinds of file but for their names, and that
/// Hugging Face has [in, out].
class Gpt2Planner : Planner {
 public:
  struct Names {
    const char *embedding, *positions, *layer, *norm1, *qkv, *out, *norm2, *up, *down, *last_norm;
    const char* head;
    bool transposed;
  };
  Gpt2Planner(const PortableModel& portable, const Family& family, const Names& names,
              std::string prefix)
      : Planner(portable, family), names_(names), prefix_(std::move(prefix)) {}

  std::vector<PlannedTensor> plan() {
    const std::int64_t h = m_.hidden_size;
    add(prefix_ + names_.embedding, {m_.vocab_size, h}, {{"model.embed_tokens.weight"}});
    add(prefix_ + names_.positions, {m_.max_positions, h}, {{"model.embed_positions.weight"}});
    for (std::int64_t l = 0; l < m_.num_layers; ++l) {
      const std::string from = layer_of(l);
      const std::string to = fmt::format("{}{}.{}.", prefix_, names_.layer, l);
      add_norm(to + names_.norm1, from + "input_layernorm");
      add_qkv(to + names_.qkv, from + "self_attn.");
      add_linear(to + names_.out, from + "self_attn.o_proj", h, q_size());
      add_norm(to + names_.norm2, from + "post_attention_layernorm");
      add_linear(to + names_.up, from + "mlp.up_proj", m_.dense_ff_size, h);
      add_linear(to + names_.down, from + "mlp.down_proj", h, m_.dense_ff_size);
    }
    add_norm(prefix_ + names_.last_norm, "model.norm");
    if (!m_.tie_embeddings) add(names_.head, {m_.vocab_size, h}, {{"lm_head.weight"}});
    return take();
  }

 private:
  void add_norm(const std::string& to, const std::string& from) {
    add_f32(to + ".weight", {m_.hidden_size}, {{from + ".weight"}});
    add_f32(to + ".bias", {m_.hidden_size}, {{from + ".bias"}});
  }
  void add_weight(const std::string& to, std::int64_t out, std::int64_t in,
                  std::vector<ModelUnit> pieces) {
    const bool transposed = names_.transposed;
    add(to, transposed ? std::vector{in, out} : std::vector{out, in}, std::move(pieces))
        .transposed = transposed;
  }
  void add_linear(const std::string& to, const std::string& from, std::int64_t out,
                  std::int64_t in) {
    add_weight(to + ".weight", out, in, {{from + ".weight"}});
    add_f32(to + ".bias", {out}, {{from + ".bias"}});
  }
  void add_qkv(const std::string& to, const std::string& from) {
    const auto parts = [&](const char* kind) {
      return std::vector<ModelUnit>{
          {from + "q_proj." + kind}, {from + "k_proj." + kind}, {from + "v_proj." + kind}};
    };
    const std::int64_t all = q_size() + 2 * kv_size();
    add_weight(to + ".weight", all, m_.hidden_size, parts("weight"));
    add_f32(to + ".bias", {all}, parts("bias"));
  }

  Names names_;
  std::string prefix_;
};

constexpr Gpt2Planner::Names kGpt2Hf{
    "wte.weight", "wpe.weight", "h",          "ln_1", "attn.c_attn",    "attn.c_proj",
    "ln_2",       "mlp.c_fc",   "mlp.c_proj", "ln_f", "lm_head.weight", true};
constexpr Gpt2Planner::Names kGpt2Gguf{
    "token_embd.weight", "position_embd.weight", "blk",           "attn_norm",
    "attn_qkv",          "attn_output",          "ffn_norm",      "ffn_up",
    "ffn_down",          "output_norm",          "output.weight", false};

void reorder_rows(std::int64_t head_dim, std::int64_t cols, std::vector<float>& values,
                  const std::function<std::int64_t(std::int64_t)>& source_of) {
  const std::vector<float> before = values;
  const std::int64_t rows = std::ssize(values) / cols;
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t head = row / head_dim * head_dim;
    const std::int64_t source = head + source_of(row - head);
    std::copy_n(before.begin() + source * cols, cols, values.begin() + row * cols);
  }
}

}  // namespace

std::int64_t PlannedTensor::num_elements() const {
  return std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
}

void fill_units(const StateView& view, const UnitReader& read) {
  const std::int64_t rows = view.spec.unit_rows();
  const std::int64_t size = rows * view.spec.cols();
  for (const StateSlice& slice : view.slices) {
    ARCUS_CHECK(view.spec.dtype == DType::f32, "{} is read as {}", view.spec.name,
                name_of(view.spec.dtype));
    auto* out = static_cast<float*>(slice.data);
    for (std::int64_t row = slice.rows.begin; row < slice.rows.end; row += rows, out += size) {
      read({view.spec.name, row / rows}, {out, static_cast<std::size_t>(size)});
    }
  }
}

HfSpelling written_spelling(const Family& family) {
  const bool mixtral = family.spelling == Spelling::mixtral;
  return {.moe_folder = mixtral ? "block_sparse_moe." : "mlp.", .mixtral_experts = mixtral};
}

std::vector<TensorSpec> portable_tensors(const PortableModel& portable) {
  const ModelConfig& m = portable.model;
  ParamRegistry registry(m.num_experts, 0, m.num_experts);
  const Transformer declares(m, portable.routing, portable.overrides, 0, registry);
  std::vector<TensorSpec> specs;
  for (const ParamRow& row : registry.rows()) {
    // Noise serves training alone.
    if (!row.name.ends_with(".gate.noise_weight")) specs.push_back(row.spec(DType::f32));
  }
  BalanceState balance(m, portable.routing, portable.overrides, {}, 0, 1);
  for (const StateView& view : balance.state()) {
    if (!view.spec.name.starts_with("balance/")) specs.push_back(view.spec);
  }
  return specs;
}

std::vector<PlannedTensor> hf_tensors(const PortableModel& model, const Family& family,
                                      const HfSpelling& spelling) {
  if (family.spelling == Spelling::gpt2) {
    return Gpt2Planner(model, family, kGpt2Hf, spelling.prefix).plan();
  }
  return HfPlanner(model, family, spelling).plan();
}

std::vector<PlannedTensor> gguf_tensors(const PortableModel& model, const Family& family) {
  if (family.spelling == Spelling::gpt2) return Gpt2Planner(model, family, kGpt2Gguf, "").plan();
  return GgufPlanner(model, family).plan();
}

void pair_rows(std::int64_t head_dim, std::int64_t cols, std::vector<float>& values) {
  reorder_rows(head_dim, cols, values,
               [=](std::int64_t row) { return row / 2 + row % 2 * (head_dim / 2); });
}

void unpair_rows(std::int64_t head_dim, std::int64_t cols, std::vector<float>& values) {
  const std::int64_t half = head_dim / 2;
  reorder_rows(head_dim, cols, values,
               [=](std::int64_t row) { return row < half ? 2 * row : 2 * (row - half) + 1; });
}

}  // namespace arcus
