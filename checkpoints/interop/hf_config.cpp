#include "checkpoints/interop/hf_config.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <regex>

#include "src/base/error.hpp"
#include "src/data/checked_json.hpp"

namespace arcus {
namespace {

using json = nlohmann::json;
using ordered = nlohmann::ordered_json;

/// The keys of one config.json, each asked for by name: what nobody asked for is an error.
class Keys {
 public:
  Keys(json object, std::string source) : object_(std::move(object)), source_(std::move(source)) {
    ARCUS_REQUIRE(object_.is_object(), ExitCode::data, "{}: it is no JSON object", source_);
  }

  bool has(const std::string& key) {
    used_.insert(key);
    return object_.contains(key) && !object_[key].is_null();
  }
  std::int64_t integer(const std::string& key, std::optional<std::int64_t> otherwise = {}) {
    const json* value = find(key, otherwise.has_value());
    if (value == nullptr) return *otherwise;
    require(value->is_number_integer(), key, "a whole number");
    const auto number = value->get<std::int64_t>();
    require(number >= 0 && number <= (std::int64_t{1} << 40), key, "a size");
    return number;
  }
  double number(const std::string& key, std::optional<double> otherwise = {}) {
    const json* value = find(key, otherwise.has_value());
    if (value == nullptr) return *otherwise;
    require(value->is_number(), key, "a number");
    return value->get<double>();
  }
  bool flag(const std::string& key, std::optional<bool> otherwise = {}) {
    const json* value = find(key, otherwise.has_value());
    if (value == nullptr) return *otherwise;
    require(value->is_boolean(), key, "true or false");
    return value->get<bool>();
  }
  std::string text(const std::string& key, std::optional<std::string> otherwise = {}) {
    const json* value = find(key, otherwise.has_value());
    if (value == nullptr) return *otherwise;
    require(value->is_string(), key, "a text");
    return value->get<std::string>();
  }
  const json* find(const std::string& key, bool optional = true) {
    used_.insert(key);
    if (object_.contains(key) && !object_[key].is_null()) return &object_[key];
    ARCUS_REQUIRE(optional, ExitCode::data, "{}: the key {} is missing", source_, key);
    return nullptr;
  }
  /// Throws unless the condition holds: the file asks for what Arcus does not do.
  void refuse_unless(bool supported, const std::string& key, const std::string& remedy) {
    used_.insert(key);
    if (supported) return;
    ARCUS_FAIL(ExitCode::data, "{}: {} = {} is not supported{}", source_, key, shown(object_[key]),
               remedy.empty() ? "" : "; " + remedy);
  }
  void require(bool good, const std::string& key, const char* what) {
    ARCUS_REQUIRE(good, ExitCode::data, "{}: {} is {}; it must be {}", source_, key,
                  shown(object_[key]), what);
  }
  /// Keys that nobody asked for and that say something.
  std::vector<std::string> unused() const {
    std::vector<std::string> names;
    for (const auto& [key, value] : object_.items()) {
      if (!used_.contains(key) && !says_nothing(value)) names.push_back(key);
    }
    return names;
  }
  std::string shown(const json& value) const {
    std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
    if (text.size() > 60) text = text.substr(0, 57) + "...";
    return text;
  }
  const json& value(const std::string& key) const { return object_.at(key); }
  const std::string& source() const { return source_; }

 private:
  static bool says_nothing(const json& value) {
    return value.is_null() || value == false || value == 0 || value == 0.0 || value == "" ||
           ((value.is_array() || value.is_object()) && value.empty());
  }
  json object_;
  std::string source_;
  std::set<std::string> used_;
};

/// Keys that do not change what the model computes.
bool changes_nothing(const std::string& key) {
  static const std::set<std::string> keys = {"_name_or_path",
                                             "architectures",
                                             "auto_map",
                                             "attention_dropout",
                                             "attn_pdrop",
                                             "aux_loss_alpha",
                                             "output_past",
                                             "seq_aux",
                                             "bos_token_id",
                                             "chunk_size_feed_forward",
                                             "dtype",
                                             "embd_pdrop",
                                             "embedding_dropout",
                                             "eos_token_id",
                                             "ep_size",
                                             "hidden_dropout",
                                             "initializer_factor",
                                             "initializer_range",
                                             "id2label",
                                             "is_decoder",
                                             "label2id",
                                             "language",
                                             "max_window_layers",
                                             "mlp_dropout",
                                             "moe_router_topk_scaling_factor",
                                             "norm_softmax",
                                             "num_nextn_predict_layers",
                                             "num_mtp_layers",
                                             "mtp_loss_scaling_factor",
                                             "output_attentions",
                                             "output_dropout",
                                             "output_hidden_states",
                                             "output_router_logits",
                                             "pad_token_id",
                                             "pretraining_tp",
                                             "problem_type",
                                             "resid_pdrop",
                                             "return_dict",
                                             "router_dtype",
                                             "router_jitter_noise",
                                             "summary_activation",
                                             "summary_first_dropout",
                                             "summary_proj_to_labels",
                                             "summary_type",
                                             "summary_use_proj",
                                             "task_specific_params",
                                             "tokenizer_class",
                                             "torch_dtype",
                                             "transformers_version",
                                             "unsloth_version",
                                             "unsloth_fixed",
                                             "use_cache",
                                             "vocab_padded"};
  return keys.contains(key);
}

/// One of the two objects that may say how positions are rotated.
void read_rope_object(Keys& keys, const std::string& key, ModelConfig& m) {
  const json* rope = keys.find(key);
  if (rope == nullptr) return;
  keys.require(rope->is_object(), key, "an object");
  const auto number = [&](const char* name, double otherwise) {
    const auto found = rope->find(name);
    if (found == rope->end() || found->is_null()) return otherwise;
    keys.require(found->is_number(), key, "an object of numbers");
    return found->get<double>();
  };
  const auto type_key = rope->contains("rope_type") ? "rope_type" : "type";
  const auto type = rope->find(type_key);
  const std::string kind = type == rope->end() || !type->is_string() ? "default" : *type;
  keys.refuse_unless(kind == "default" || kind == "linear" || kind == "llama3", key,
                     "the types default, linear and llama3 are");
  const double theta = number("rope_theta", m.rope_theta);
  keys.refuse_unless(!keys.has("rope_theta") || theta == m.rope_theta, "rope_theta",
                     fmt::format("{} says {}; one of the two is wrong", key, theta));
  m.rope_theta = theta;
  m.partial_rotary_factor = number("partial_rotary_factor", m.partial_rotary_factor);
  if (kind == "default") return;
  m.rope_scaling = kind;
  m.rope_factor = number("factor", 1);
  if (kind == "linear") return;
  m.rope_low_freq_factor = number("low_freq_factor", 1);
  m.rope_high_freq_factor = number("high_freq_factor", 4);
  m.rope_original_context =
      static_cast<std::int64_t>(number("original_max_position_embeddings", 8192));
}

void read_rope(Keys& keys, ModelConfig& m, double default_rotary_factor) {
  m.rope_theta = keys.number("rope_theta", 10000.0);
  m.partial_rotary_factor = keys.number("partial_rotary_factor", default_rotary_factor);
  read_rope_object(keys, "rope_scaling", m);
  read_rope_object(keys, "rope_parameters", m);
}

void read_attention(Keys& keys, const Family& f, DescribedModel& d) {
  ModelConfig& m = d.model.model;
  m.hidden_size = keys.integer("hidden_size");
  m.num_layers = keys.integer("num_hidden_layers");
  m.num_heads = keys.integer("num_attention_heads");
  keys.require(m.num_heads > 0, "num_attention_heads", "at least 1");
  m.num_kv_heads = keys.integer("num_key_value_heads", m.num_heads);
  m.head_dim = keys.integer("head_dim", m.hidden_size / m.num_heads);
  m.norm_eps = keys.number("rms_norm_eps", 1e-6);
  m.vocab_size = keys.integer("vocab_size");
  m.tie_embeddings = keys.flag("tie_word_embeddings", false);
  d.model.context_length = keys.integer("max_position_embeddings", 0);
  keys.refuse_unless(keys.text("hidden_act", "silu") == "silu", "hidden_act",
                     "only \"silu\" (SwiGLU) is");
  // Programs differ in what a missing one means for bailing_moe_v2.
  if (f.name == "bailing_moe_v2" && !keys.has("rope_parameters")) {
    keys.number("partial_rotary_factor");
  }
  read_rope(keys, m, f.name == "glm4_moe" ? 0.5 : 1.0);
  m.qk_norm = f.qk_norm == "any"
                  ? (keys.flag("use_qk_norm", f.name == "bailing_moe_v2") ? "head" : "none")
                  : std::string(f.qk_norm);
  // A bias of q, k and v: built into qwen2 and qwen2_moe, a switch elsewhere.
  if (f.name == "qwen2" || f.name == "qwen2_moe") {
    m.qkv_bias = keys.flag("qkv_bias", true);
  } else if (f.name == "glm4_moe") {
    m.qkv_bias = keys.flag("attention_bias", false);
  } else if (f.name == "bailing_moe_v2") {
    m.qkv_bias = keys.flag("use_qkv_bias", false);
    keys.refuse_unless(!keys.flag("use_bias", false), "use_bias",
                       "biases of the other linear layers are not read");
    keys.refuse_unless(keys.flag("use_rmsnorm", true), "use_rmsnorm", "only RMSNorm is");
    const auto rotated =
        static_cast<std::int64_t>(static_cast<double>(m.head_dim) * m.partial_rotary_factor);
    keys.refuse_unless(keys.integer("rotary_dim", rotated) == rotated, "rotary_dim",
                       "it must be head_dim times partial_rotary_factor");
  } else {
    // A bias of the output projection comes with it.
    m.qkv_bias = m.o_bias = keys.flag("attention_bias", false);
    keys.refuse_unless(!m.o_bias || f.name == "llama" || f.name == "qwen3" ||
                           f.name == "qwen3_moe" || f.name == "olmoe" || f.name == "dots1",
                       "attention_bias", "this family has none");
  }
  m.mlp_bias = keys.flag("mlp_bias", false);
  keys.refuse_unless(!m.mlp_bias || f.name == "llama", "mlp_bias", "this family has none");
}

/// GPT-2's names for sizes, and its blocks.
void read_gpt2(Keys& keys, DescribedModel& d) {
  ModelConfig& m = d.model.model;
  m.hidden_size = keys.integer("n_embd");
  m.num_layers = keys.integer("n_layer");
  m.num_heads = keys.integer("n_head");
  keys.require(m.num_heads > 0, "n_head", "at least 1");
  m.num_kv_heads = m.num_heads;
  m.head_dim = m.hidden_size / m.num_heads;
  m.dense_ff_size = keys.integer("n_inner", 4 * m.hidden_size);
  m.vocab_size = keys.integer("vocab_size");
  m.max_positions = keys.integer("n_positions", keys.integer("n_ctx", 1024));
  d.model.context_length = m.max_positions;
  m.norm_eps = keys.number("layer_norm_epsilon", 1e-5);
  m.tie_embeddings = keys.flag("tie_word_embeddings", true);
  const std::string activation = keys.text("activation_function", "gelu_new");
  keys.refuse_unless(
      activation == "gelu_new" || activation == "gelu_pytorch_tanh" || activation == "gelu",
      "activation_function", "gelu and its tanh form are");
  m.activation = activation == "gelu" ? "gelu" : "gelu_new";
  m.norm = "layer";
  m.position = "learned";
  m.qk_norm = "none";
  m.qkv_bias = m.o_bias = m.mlp_bias = true;
  keys.refuse_unless(keys.flag("scale_attn_weights", true), "scale_attn_weights", "");
  keys.refuse_unless(!keys.flag("add_cross_attention", false), "add_cross_attention", "");
}

/// What Arcus does not do, whatever the family: refused where it is on.
void refuse_features(Keys& keys, const DescribedModel& d) {
  keys.refuse_unless(!keys.has("quantization_config"), "quantization_config",
                     "give the unquantised model (F32, F16 or BF16)");
  for (const char* key : {"q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"}) {
    keys.refuse_unless(!keys.has(key), key, "multi-head latent attention (MLA) is another model");
  }
  keys.refuse_unless(!keys.has("clip_qkv"), "clip_qkv", "");
  keys.refuse_unless(!keys.has("attn_logit_softcapping"), "attn_logit_softcapping", "");
  keys.refuse_unless(!keys.has("final_logit_softcapping"), "final_logit_softcapping", "");
  if (keys.has("sliding_window")) {
    const bool used = keys.flag("use_sliding_window", true);
    const std::int64_t window = keys.integer("sliding_window");
    keys.refuse_unless(!used || (d.model.context_length > 0 && window >= d.model.context_length),
                       "sliding_window",
                       "attention sees all of a text here; if texts stay shorter than the window, "
                       "set the key to null in a copy of the file");
  } else {
    keys.flag("use_sliding_window", false);
  }
  if (const json* types = keys.find("layer_types"); types != nullptr) {
    const bool full = types->is_array() && std::all_of(types->begin(), types->end(), [](auto& t) {
                        return t == "full_attention";
                      });
    keys.refuse_unless(full, "layer_types", "only full_attention is");
  }
}

/// Dense layers in front of those with experts, as far as the family can say so.
std::int64_t leading_dense_layers(Keys& keys) {
  keys.refuse_unless(keys.integer("decoder_sparse_step", 1) == 1, "decoder_sparse_step",
                     "every layer after the dense ones has experts here");
  const json* dense = keys.find("mlp_only_layers");
  if (dense == nullptr) return 0;
  std::int64_t count = 0;
  for (const json& layer : *dense) {
    keys.refuse_unless(layer == count, "mlp_only_layers",
                       "dense layers are supported in front of the others only");
    ++count;
  }
  return count;
}

/// transformers 5 may write them under Mixtral's name.
std::int64_t number_of_experts(Keys& keys, const char* key) {
  return keys.integer(keys.has(key) || !keys.has("num_local_experts") ? key : "num_local_experts");
}

void read_experts(Keys& keys, const Family& f, DescribedModel& d) {
  ModelConfig& m = d.model.model;
  RoutingConfig& r = d.model.routing;
  m.topk = keys.integer("num_experts_per_tok");
  r.aux_loss = keys.number("router_aux_loss_coef", 0.0);
  r.renormalize = true;
  if (f.name == "mixtral") {
    m.num_experts = keys.integer("num_local_experts");
    m.expert_ff_size = keys.integer("intermediate_size");
    m.dense_ff_size = m.expert_ff_size;
    return;
  }
  r.renormalize = keys.flag("norm_topk_prob", f.name == "bailing_moe_v2" || f.name == "glm4_moe");
  if (f.name == "olmoe") {
    m.num_experts = number_of_experts(keys, "num_experts");
    m.expert_ff_size = keys.integer("intermediate_size");
    m.dense_ff_size = m.expert_ff_size;
    return;
  }
  m.expert_ff_size = keys.integer("moe_intermediate_size");
  m.dense_ff_size = keys.integer("intermediate_size", m.expert_ff_size * m.topk);
  if (f.name == "qwen3_moe" || f.name == "qwen2_moe") {
    m.num_experts = number_of_experts(keys, "num_experts");
    m.first_k_dense = leading_dense_layers(keys);
    if (f.name == "qwen3_moe") return;
    const std::int64_t shared = keys.integer("shared_expert_intermediate_size");
    keys.refuse_unless(m.expert_ff_size > 0 && shared % m.expert_ff_size == 0 && shared > 0,
                       "shared_expert_intermediate_size",
                       "it must be a multiple of moe_intermediate_size");
    m.num_shared_experts = shared / m.expert_ff_size;
    m.shared_expert_gate = true;
    return;
  }
  // Sigmoid scores with a bias that selects, and groups.
  m.num_experts = keys.integer(f.name == "bailing_moe_v2" ? "num_experts" : "n_routed_experts");
  m.num_shared_experts =
      keys.integer(f.name == "bailing_moe_v2" ? "num_shared_experts" : "n_shared_experts", 0);
  m.first_k_dense = keys.integer("first_k_dense_replace", 0);
  r.score = "sigmoid";
  for (const char* key : {"scoring_func", "score_function"}) {
    // dots1 calls it by the name of the method.
    const std::string score = keys.text(key, "sigmoid");
    keys.refuse_unless(score == "sigmoid" || (f.name == "dots1" && score == "noaux_tc"), key,
                       "only \"sigmoid\" is");
  }
  keys.refuse_unless(keys.text("topk_method", "noaux_tc") == "noaux_tc", "topk_method",
                     "only \"noaux_tc\" is");
  if (f.name == "bailing_moe_v2") {
    keys.refuse_unless(keys.flag("moe_router_enable_expert_bias", true),
                       "moe_router_enable_expert_bias", "the family's gates have a bias");
    const std::int64_t shared =
        keys.integer("moe_shared_expert_intermediate_size", m.expert_ff_size);
    keys.refuse_unless(shared == m.expert_ff_size, "moe_shared_expert_intermediate_size",
                       "it must be moe_intermediate_size");
  }
  keys.refuse_unless(keys.integer("moe_layer_freq", 1) == 1, "moe_layer_freq", "");
  r.routed_scaling_factor = keys.number("routed_scaling_factor", 1.0);
  r.n_group = keys.integer("n_group", 1);
  r.topk_group = keys.integer("topk_group", 1);
  if (r.n_group > 1 && r.topk_group == r.n_group) r.n_group = r.topk_group = 1;  // no choice
  r.expert_bias_rate = 0.001;
  r.aux_loss = 0;
}

const Family& find_family(Keys& keys) {
  const std::string type = keys.text("model_type");
  std::string known;
  for (const Family& family : families()) {
    if (family.name == type) return family;
    known += fmt::format("{}{}", known.empty() ? "" : ", ", family.name);
  }
  ARCUS_FAIL(ExitCode::data, "{}: model_type {} is not supported; these are: {}", keys.source(),
             keys.shown(type), known);
}

}  // namespace

DescribedModel read_hf_config(std::string_view text, const std::string& source,
                              const std::set<std::string>& ignored) {
  Keys keys(parse_checked_json(source, text), source);
  DescribedModel d;
  d.family = &find_family(keys);
  const bool gpt2 = d.family->spelling == Spelling::gpt2;
  if (gpt2) {
    read_gpt2(keys, d);
  } else {
    read_attention(keys, *d.family, d);
  }
  ModelConfig& m = d.model.model;
  if (d.family->experts) {
    read_experts(keys, *d.family, d);
  } else {
    m.first_k_dense = m.num_layers;
    if (!gpt2) m.dense_ff_size = keys.integer("intermediate_size");
    // No layer uses them; sizes of what upcycling would make.
    m.expert_ff_size = m.dense_ff_size;
    m.num_experts = 2;
    m.topk = 2;
  }
  refuse_features(keys, d);
  for (const std::string& key : ignored) {
    ARCUS_REQUIRE(keys.has(key), ExitCode::usage, "--ignore-key {}: {} has no such key", key,
                  source);
    if (!changes_nothing(key)) d.notes.push_back(fmt::format("{} was ignored as asked", key));
  }
  for (const std::string& key : keys.unused()) {
    if (changes_nothing(key)) continue;
    ARCUS_FAIL(ExitCode::data,
               "{}: the key {} = {} is unknown, so the model may compute what Arcus does not; "
               "if it has no part in that, give --ignore-key {}",
               source, key, keys.shown(keys.value(key)), key);
  }
  check_described(d, source);
  return d;
}

void check_described(const DescribedModel& described, const std::string& source) {
  const PortableModel& p = described.model;
  ARCUS_REQUIRE(p.model.num_layers <= 10000 && p.model.num_experts <= (1 << 20), ExitCode::data,
                "{}: {} layers of {} experts is no model that can be", source, p.model.num_layers,
                p.model.num_experts);
  ARCUS_REQUIRE(p.model.vocab_size > 0 && p.model.vocab_size < (std::int64_t{1} << 31) &&
                    p.model.dense_ff_size > 0,
                ExitCode::data, "{}: a vocabulary of {} and dense layers {} wide are no model",
                source, p.model.vocab_size, p.model.dense_ff_size);
  try {
    validate(p.model, p.routing);
  } catch (const Error& error) {
    throw Error(ExitCode::data, fmt::format("{}: {}", source, error.what()), error.file(),
                error.line());
  }
}

namespace {

void write_common(ordered& j, const PortableModel& p, const Family& f, std::string_view dtype,
                  std::int32_t eos_id) {
  const ModelConfig& m = p.model;
  j["architectures"] = {f.hf_class};
  j["model_type"] = f.name;
  j["torch_dtype"] = dtype;
  j["dtype"] = dtype;
  j["vocab_size"] = m.vocab_size;
  j["hidden_size"] = m.hidden_size;
  j["num_hidden_layers"] = m.num_layers;
  j["num_attention_heads"] = m.num_heads;
  j["num_key_value_heads"] = m.num_kv_heads;
  if (f.name != "qwen2_moe" && f.name != "olmoe") j["head_dim"] = m.head_dim;
  j["max_position_embeddings"] = p.context_length;
  j["rms_norm_eps"] = m.norm_eps;
  j["hidden_act"] = "silu";
  j["tie_word_embeddings"] = m.tie_embeddings;
  j["attention_dropout"] = 0.0;
  j["initializer_range"] = 0.02;
  j["use_cache"] = true;
  j["bos_token_id"] = nullptr;
  if (eos_id >= 0) {
    j["eos_token_id"] = eos_id;
  } else {
    j["eos_token_id"] = nullptr;
  }
  j["pad_token_id"] = nullptr;
  // Older and newer readers' spelling.
  j["rope_theta"] = m.rope_theta;
  j["partial_rotary_factor"] = m.partial_rotary_factor;
  ordered scaling{{"rope_type", m.rope_scaling == "none" ? "default" : m.rope_scaling}};
  if (m.rope_scaling != "none") scaling["factor"] = m.rope_factor;
  if (m.rope_scaling == "llama3") {
    scaling["low_freq_factor"] = m.rope_low_freq_factor;
    scaling["high_freq_factor"] = m.rope_high_freq_factor;
    scaling["original_max_position_embeddings"] = m.rope_original_context;
  }
  j["rope_scaling"] = m.rope_scaling == "none" ? ordered() : scaling;
  scaling["rope_theta"] = m.rope_theta;
  scaling["partial_rotary_factor"] = m.partial_rotary_factor;
  j["rope_parameters"] = scaling;
}

void write_own(ordered& j, const PortableModel& p, const Family& f) {
  const ModelConfig& m = p.model;
  const RoutingConfig& r = p.routing;
  j["num_experts_per_tok"] = m.topk;
  if (f.name == "mixtral") {
    j["num_local_experts"] = m.num_experts;
    j["intermediate_size"] = m.expert_ff_size;
    j["sliding_window"] = nullptr;
    j["router_jitter_noise"] = 0.0;
  } else if (f.name == "olmoe") {
    j["num_experts"] = m.num_experts;
    j["intermediate_size"] = m.expert_ff_size;
    j["norm_topk_prob"] = r.renormalize;
    j["clip_qkv"] = nullptr;
    j["attention_bias"] = false;
  } else if (f.name == "glm4_moe") {
    j["n_routed_experts"] = m.num_experts;
    j["n_shared_experts"] = std::max<std::int64_t>(1, m.num_shared_experts);
    j["moe_intermediate_size"] = m.expert_ff_size;
    j["intermediate_size"] = m.dense_ff_size;
    j["first_k_dense_replace"] = m.first_k_dense;
    j["norm_topk_prob"] = r.renormalize;
    j["routed_scaling_factor"] = r.routed_scaling_factor;
    j["n_group"] = r.n_group;
    j["topk_group"] = r.topk_group;
    j["use_qk_norm"] = m.qk_norm == "head";
    j["attention_bias"] = m.qkv_bias;
    j["num_nextn_predict_layers"] = 0;
  } else {  // qwen3_moe, qwen2_moe
    j["num_experts"] = m.num_experts;
    j["moe_intermediate_size"] = m.expert_ff_size;
    j["intermediate_size"] = m.dense_ff_size;
    j["norm_topk_prob"] = r.renormalize;
    j["decoder_sparse_step"] = 1;
    j["mlp_only_layers"] = json::array();
    j["use_sliding_window"] = false;
    j["sliding_window"] = nullptr;
    if (f.name == "qwen3_moe") {
      j["attention_bias"] = false;
    } else {
      j["qkv_bias"] = true;
      j["shared_expert_intermediate_size"] = m.expert_ff_size * m.num_shared_experts;
    }
  }
}

}  // namespace

std::string hf_config_text(const PortableModel& model, const Family& family, std::string_view dtype,
                           std::int32_t eos_id) {
  ordered j;
  write_common(j, model, family, dtype, eos_id);
  write_own(j, model, family);
  return j.dump(2) + "\n";
}

std::string hf_generation_config_text(std::int32_t eos_id) {
  ordered j;
  j["bos_token_id"] = nullptr;
  if (eos_id >= 0) j["eos_token_id"] = eos_id;
  j["pad_token_id"] = nullptr;
  j["do_sample"] = false;
  return j.dump(2) + "\n";
}

}  // namespace arcus
