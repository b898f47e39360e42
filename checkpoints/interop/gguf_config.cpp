#include "checkpoints/interop/gguf_config.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <span>

#include "src/base/error.hpp"

namespace arcus {
namespace {

std::uint32_t u32(std::int64_t value) { return static_cast<std::uint32_t>(value); }
float f32(double value) { return static_cast<float>(value); }

/// The number that was meant by a fp32 of a file: its shortest decimal form.
double decimal(double value) {
  return std::strtod(fmt::format("{}", static_cast<float>(value)).c_str(), nullptr);
}

constexpr std::int64_t kSoftmax = 1;
constexpr std::int64_t kSigmoid = 2;

/// Reads the keys of one architecture and remembers which.
class ArchKeys {
 public:
  ArchKeys(const GgufFile& file, std::string arch)
      : file_(file), source_(file.path().string()), prefix_(std::move(arch) + '.') {}

  std::int64_t integer(const std::string& key, std::optional<std::int64_t> otherwise = {}) {
    // Per-layer arrays of equal numbers are a number.
    const std::string name = use(key);
    if (otherwise && !file_.has(name)) return *otherwise;
    if (!file_.has(name)) return file_.integer(name);
    const std::vector<std::int64_t> values = file_.integers(name);
    ARCUS_REQUIRE(
        !values.empty() && std::ranges::all_of(values, [&](auto v) { return v == values.front(); }),
        ExitCode::data, "{}: {} differs from layer to layer, which is not supported", source_,
        name);
    ARCUS_REQUIRE(values.front() >= 0 && values.front() <= (std::int64_t{1} << 40), ExitCode::data,
                  "{}: {} is {}; it must be a size", source_, name, values.front());
    return values.front();
  }
  double number(const std::string& key, std::optional<double> otherwise = {}) {
    return decimal(file_.number(use(key), otherwise));
  }
  bool flag(const std::string& key, bool otherwise) { return file_.flag(use(key), otherwise); }
  std::string text(const std::string& key, const std::string& otherwise) {
    return file_.text(use(key), otherwise);
  }
  bool has(const std::string& key) { return file_.has(use(key)); }
  void refuse_unless(bool supported, const std::string& key, const std::string& remedy) {
    ARCUS_REQUIRE(supported, ExitCode::data, "{}: {} is not supported{}", source_, use(key),
                  remedy.empty() ? "" : "; " + remedy);
  }
  std::vector<std::string> unused() const {
    std::vector<std::string> names;
    for (const auto& [key, value] : file_.keys()) {
      if (key.starts_with(prefix_) && !used_.contains(key)) names.push_back(key);
    }
    return names;
  }
  const std::string& source() const { return source_; }

 private:
  std::string use(const std::string& key) {
    const std::string name = prefix_ + key;
    used_.insert(name);
    return name;
  }
  const GgufFile& file_;
  std::string source_, prefix_;
  std::set<std::string> used_;
};

const Family& find_family(const GgufFile& file) {
  const std::string arch = file.text("general.architecture");
  const bool experts = file.integer(arch + ".expert_count", 0) > 0;
  std::string known;
  for (const Family& family : families()) {
    if (family.gguf_arch == arch && family.experts == experts) return family;
    if (family.gguf_arch.empty() || known.find(family.gguf_arch) != std::string::npos) continue;
    known += fmt::format("{}{}", known.empty() ? "" : ", ", family.gguf_arch);
  }
  ARCUS_FAIL(ExitCode::data, "{}: general.architecture \"{}\"{} is not supported; these are: {}",
             file.path().string(), arch, experts ? " with experts" : " without experts", known);
}

/// The llama3 rule whose factors `rope_freqs.weight` holds: the file does not name it, but models
/// use few.
bool find_llama3(std::span<const float> factors, ModelConfig& m) {
  ModelConfig plain = m;
  plain.rope_scaling = "none";
  const std::vector<double> before = rope_inv_freq(plain);
  m.rope_scaling = "llama3";
  for (const double factor : {8.0, 32.0, 16.0, 4.0, 2.0}) {
    m.rope_factor = factor;
    const std::vector<double> after = rope_inv_freq(m);
    bool same = after.size() == factors.size();
    for (std::size_t i = 0; same && i < after.size(); ++i) {
      const auto given = static_cast<double>(factors[i]);
      same = std::abs(before[i] / after[i] - given) <= 1e-5 * given;
    }
    if (same) return true;
  }
  return false;
}

void read_rope_scaling(ArchKeys& keys, const GgufFile& file, ModelConfig& m) {
  const std::string type = keys.text("rope.scaling.type", "none");
  keys.refuse_unless(type == "none" || type == "linear", "rope.scaling.type",
                     "none, linear and llama3's factors are");
  double factor = keys.number("rope.scaling.factor", 1.0);
  if (keys.has("rope.scale_linear")) factor = keys.number("rope.scale_linear");
  if (factor > 0 && factor != 1) {
    m.rope_scaling = "linear";
    m.rope_factor = factor;
  }
  const FileTensor* factors = file.find("rope_freqs.weight");
  if (factors == nullptr) return;
  keys.refuse_unless(factors->num_elements() <= m.head_dim && m.rope_scaling == "none",
                     "rope_freqs.weight (a tensor)", "");
  std::vector<float> values(static_cast<std::size_t>(factors->num_elements()));
  file.read(*factors, 0, values);
  keys.refuse_unless(find_llama3(values, m), "rope_freqs.weight (a tensor)",
                     "its factors are not those of a llama3 rule of 8192 tokens");
}

void read_attention(ArchKeys& keys, const GgufFile& file, DescribedModel& d) {
  ModelConfig& m = d.model.model;
  m.hidden_size = keys.integer("embedding_length");
  m.num_layers = keys.integer("block_count");
  m.num_heads = keys.integer("attention.head_count");
  ARCUS_REQUIRE(m.num_heads > 0, ExitCode::data, "{}: attention.head_count is 0", keys.source());
  m.num_kv_heads = keys.integer("attention.head_count_kv", m.num_heads);
  m.head_dim = keys.integer("attention.key_length", m.hidden_size / m.num_heads);
  keys.refuse_unless(keys.integer("attention.value_length", m.head_dim) == m.head_dim,
                     "attention.value_length", "it must equal attention.key_length");
  const bool gpt2 = d.family->spelling == Spelling::gpt2;
  m.norm_eps =
      keys.number(gpt2 ? "attention.layer_norm_epsilon" : "attention.layer_norm_rms_epsilon");
  m.rope_theta = keys.number("rope.freq_base", 10000.0);
  const std::int64_t rotated = keys.integer("rope.dimension_count", m.head_dim);
  m.partial_rotary_factor =
      m.head_dim > 0 ? static_cast<double>(rotated) / static_cast<double>(m.head_dim) : 1;
  read_rope_scaling(keys, file, m);
  d.model.context_length = keys.integer("context_length");
  keys.refuse_unless(!keys.has("attention.sliding_window") ||
                         keys.integer("attention.sliding_window") == 0 ||
                         keys.integer("attention.sliding_window") >= d.model.context_length,
                     "attention.sliding_window", "attention sees all of a text here");
  for (const char* key : {"attention.q_lora_rank", "attention.kv_lora_rank"}) {
    keys.refuse_unless(!keys.has(key), key, "multi-head latent attention (MLA) is another model");
  }
  const FileTensor* embedding = file.find("token_embd.weight");
  ARCUS_REQUIRE(embedding != nullptr && embedding->shape.size() == 2, ExitCode::data,
                "{}: the tensor token_embd.weight is missing", keys.source());
  m.vocab_size = embedding->shape[0];
  const std::int64_t vocab = keys.integer("vocab_size", m.vocab_size);
  ARCUS_REQUIRE(vocab == m.vocab_size, ExitCode::data,
                "{}: vocab_size is {}, token_embd.weight has {} rows", keys.source(), vocab,
                m.vocab_size);
  const auto has = [&](const char* name) { return file.find(name) != nullptr; };
  m.tie_embeddings = !has("output.weight");
  if (gpt2) {
    m.norm = "layer";
    m.position = "learned";
    m.activation = "gelu_new";
    m.max_positions = d.model.context_length;
    m.o_bias = m.mlp_bias = true;
  }
  m.qkv_bias = has("blk.0.attn_q.bias") || has("blk.0.attn_qkv.bias");
  m.qk_norm = std::string(d.family->qk_norm);
  if (m.qk_norm == "any") m.qk_norm = has("blk.0.attn_q_norm.weight") ? "head" : "none";
}

void read_experts(ArchKeys& keys, DescribedModel& d) {
  const Family& f = *d.family;
  ModelConfig& m = d.model.model;
  RoutingConfig& r = d.model.routing;
  m.num_experts = keys.integer("expert_count");
  m.topk = keys.integer("expert_used_count");
  const std::int64_t ff = keys.integer("feed_forward_length", 0);
  // Architectures of one width call it by the dense one's name.
  m.expert_ff_size = keys.integer("expert_feed_forward_length", ff);
  m.dense_ff_size = ff > 0 ? ff : m.expert_ff_size * m.topk;
  m.first_k_dense = keys.integer("leading_dense_block_count", 0);
  r.aux_loss = 0;
  r.n_group = std::max<std::int64_t>(1, keys.integer("expert_group_count", 1));
  r.topk_group = std::max<std::int64_t>(1, keys.integer("expert_group_used_count", r.n_group));
  if (r.n_group == r.topk_group) r.n_group = r.topk_group = 1;
  const bool by_keys = f.expert_bias;  // the others have all of it built in
  if (!by_keys) {
    r.score = "softmax";
    r.renormalize = f.gguf_arch == "llama" || f.gguf_arch == "qwen3moe";
    const double scale = keys.number("expert_weights_scale", 1.0);
    keys.refuse_unless(scale == 1 || scale == 0, "expert_weights_scale",
                       "engines ignore it for this architecture");
    keys.refuse_unless(keys.flag("expert_weights_norm", r.renormalize) == r.renormalize,
                       "expert_weights_norm", "engines ignore it for this architecture");
    const std::int64_t gating = keys.integer("expert_gating_func", kSoftmax);
    keys.refuse_unless(gating == kSoftmax || gating == 0, "expert_gating_func",
                       "engines ignore it for this architecture");
  } else {
    const std::int64_t gating = f.name == "glm4_moe" ? keys.integer("expert_gating_func", kSigmoid)
                                                     : keys.integer("expert_gating_func");
    keys.refuse_unless(gating == kSoftmax || gating == kSigmoid, "expert_gating_func",
                       "softmax (1) and sigmoid (2) are");
    r.score = gating == kSoftmax ? "softmax" : "sigmoid";
    r.renormalize = keys.flag("expert_weights_norm", false);
    const double scale = keys.number("expert_weights_scale", 0.0);
    r.routed_scaling_factor = scale == 0 ? 1 : scale;
    r.expert_bias_rate = 0.001;
    m.num_shared_experts = keys.integer("expert_shared_count", 0);
    ARCUS_REQUIRE(f.name != "glm4_moe" || m.num_shared_experts > 0, ExitCode::data,
                  "{}: expert_shared_count is 0: engines load such a file and compute nonsense",
                  keys.source());
    const std::int64_t shared = keys.integer("expert_shared_feed_forward_length", m.expert_ff_size);
    keys.refuse_unless(shared == m.expert_ff_size, "expert_shared_feed_forward_length",
                       "it must be expert_feed_forward_length");
  }
  if (!f.shared_gate) return;
  const std::int64_t shared = keys.integer("expert_shared_feed_forward_length");
  keys.refuse_unless(shared > 0 && m.expert_ff_size > 0 && shared % m.expert_ff_size == 0,
                     "expert_shared_feed_forward_length",
                     "it must be a multiple of expert_feed_forward_length");
  m.num_shared_experts = shared / m.expert_ff_size;
  m.shared_expert_gate = true;
}

}  // namespace

DescribedModel read_gguf_config(const GgufFile& file, const std::set<std::string>& ignored) {
  DescribedModel d;
  d.family = &find_family(file);
  ArchKeys keys(file, std::string(d.family->gguf_arch));
  read_attention(keys, file, d);
  ModelConfig& m = d.model.model;
  if (d.family->experts) {
    read_experts(keys, d);
  } else {
    keys.integer("expert_count", 0);
    keys.integer("expert_used_count", 0);
    m.first_k_dense = m.num_layers;
    m.dense_ff_size = keys.integer("feed_forward_length");
    m.expert_ff_size = m.dense_ff_size;
    m.num_experts = 2;
    m.topk = 2;
  }
  for (const std::string& key : ignored) {
    ARCUS_REQUIRE(file.has(key), ExitCode::usage, "--ignore-key {}: {} has no such key", key,
                  keys.source());
  }
  for (const std::string& key : keys.unused()) {
    ARCUS_REQUIRE(ignored.contains(key), ExitCode::data,
                  "{}: the key {} is unknown, so the model may compute what Arcus does not; if it "
                  "has no part in that, give --ignore-key {}",
                  keys.source(), key, key);
    d.notes.push_back(fmt::format("{} was ignored as asked", key));
  }
  check_described(d, keys.source());
  return d;
}

GgufKeys gguf_model_keys(const PortableModel& p, const Family& f, FileType file_type,
                         std::string_view name) {
  const ModelConfig& m = p.model;
  const RoutingConfig& r = p.routing;
  const bool glm = f.name == "glm4_moe";
  GgufKeys keys;
  const std::string arch(f.gguf_arch);
  keys.emplace_back("general.architecture", arch);
  keys.emplace_back("general.type", std::string("model"));
  keys.emplace_back("general.name", std::string(name));
  const std::uint32_t types[] = {0, 1, 32};  // F32, F16, BF16
  keys.emplace_back("general.file_type", types[static_cast<std::size_t>(file_type)]);
  const auto add = [&](const char* key, GgufValue value) {
    keys.emplace_back(fmt::format("{}.{}", arch, key), std::move(value));
  };
  add("vocab_size", u32(m.vocab_size));
  add("context_length", u32(p.context_length));
  add("embedding_length", u32(m.hidden_size));
  add("block_count", u32(m.num_layers));
  const bool one_width = arch == "llama" || arch == "olmoe";
  add("feed_forward_length", u32(one_width ? m.expert_ff_size : m.dense_ff_size));
  add("attention.head_count", u32(m.num_heads));
  add("attention.head_count_kv", u32(m.num_kv_heads));
  add("attention.key_length", u32(m.head_dim));
  add("attention.value_length", u32(m.head_dim));
  add("attention.layer_norm_rms_epsilon", f32(m.norm_eps));
  add("rope.freq_base", f32(m.rope_theta));
  add("rope.dimension_count",
      u32(static_cast<std::int64_t>(static_cast<double>(m.head_dim) * m.partial_rotary_factor)));
  if (m.rope_scaling == "linear") {
    add("rope.scaling.type", std::string("linear"));
    add("rope.scaling.factor", f32(m.rope_factor));
  }
  add("expert_count", u32(m.num_experts));
  add("expert_used_count", u32(m.topk));
  add("expert_feed_forward_length", u32(m.expert_ff_size));
  if (f.shared_gate) {
    add("expert_shared_feed_forward_length", u32(m.expert_ff_size * m.num_shared_experts));
  }
  if (!glm) return keys;
  add("expert_shared_count", u32(std::max<std::int64_t>(1, m.num_shared_experts)));
  add("leading_dense_block_count", u32(m.first_k_dense));
  add("expert_gating_func", u32(r.score == "softmax" ? kSoftmax : kSigmoid));
  add("expert_weights_norm", r.renormalize);
  add("expert_weights_scale", f32(r.routed_scaling_factor));
  if (r.n_group > 1) {
    add("expert_group_count", u32(r.n_group));
    add("expert_group_used_count", u32(r.topk_group));
  }
  return keys;
}

}  // namespace arcus
