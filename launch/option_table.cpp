#include "launch/option_table.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>

#include "launch/run_config.hpp"
#include "src/base/error.hpp"
#include "src/model/param_registry.hpp"
#include "src/model/routing.hpp"

namespace arcus {
namespace {

template <class T>
constexpr ValueType value_type_of() {
  if constexpr (std::is_same_v<T, bool>) return ValueType::boolean;
  if constexpr (std::is_floating_point_v<T>) return ValueType::number;
  if constexpr (std::is_integral_v<T>) return ValueType::integer;
  return ValueType::text;
}

/// The alternative of Value that holds a member of type T.
template <class T>
using Stored = std::conditional_t<
    std::is_same_v<T, bool>, bool,
    std::conditional_t<std::is_floating_point_v<T>, double,
                       std::conditional_t<std::is_integral_v<T>, std::int64_t, std::string>>>;

template <class S, class T>
Option option(std::string name, T S::*member, std::string help, Limits limits = {}) {
  Option result;
  result.name = std::move(name);
  result.type = value_type_of<T>();
  result.help = std::move(help);
  result.limits = std::move(limits);
  // Unsigned members (the seed) are held as int64 in TOML.
  if (std::is_unsigned_v<T> && !std::is_same_v<T, bool> && !result.limits.min) {
    result.limits.min = 0;
  }
  result.get = [member](const void* row) {
    return Value(static_cast<Stored<T>>(static_cast<const S*>(row)->*member));
  };
  result.set = [member](void* row, const Value& value) {
    static_cast<S*>(row)->*member = static_cast<T>(std::get<Stored<T>>(value));
  };
  return result;
}

template <class S>
Section section(std::string name, S Config::*member, std::string help,
                std::vector<Option> options) {
  Section result;
  result.name = std::move(name);
  result.help = std::move(help);
  result.options = std::move(options);
  result.rows = [member](Config& config) { return std::vector<void*>{&(config.*member)}; };
  result.defaults = std::make_shared<const S>();
  return result;
}

/// `rows` gives the vector inside a Config.
template <class S>
Section array_section(std::string name, std::function<std::vector<S>&(Config&)> rows,
                      std::string help, std::vector<Option> options) {
  Section result;
  result.name = std::move(name);
  result.help = std::move(help);
  result.is_array = true;
  result.options = std::move(options);
  result.rows = [rows](Config& config) {
    std::vector<void*> pointers;
    for (S& row : rows(config)) pointers.push_back(&row);
    return pointers;
  };
  result.append = [rows](Config& config) -> void* { return &rows(config).emplace_back(); };
  result.clear = [rows](Config& config) { rows(config).clear(); };
  result.defaults = std::make_shared<const S>();
  return result;
}

constexpr double kMostSize = 1 << 24;
constexpr double kMostCounted = 2147483647;

Limits at_least(double min) { return {.min = min}; }
Limits above(double min) { return {.min = min, .min_excluded = true}; }
Limits between(double min, double max) { return {.min = min, .max = max}; }
/// min <= value < max.
Limits from_to_below(double min, double max) {
  return {.min = min, .max = max, .max_excluded = true};
}
/// min < value <= max.
Limits above_up_to(double min, double max) {
  return {.min = min, .max = max, .min_excluded = true};
}
Limits one_of(std::vector<std::string> choices) { return {.choices = std::move(choices)}; }
/// The names of a routing table's rows.
template <class Table>
std::vector<std::string> names_of(const Table& table) {
  std::vector<std::string> names;
  for (const auto& row : table) names.emplace_back(row.name);
  return names;
}
Limits auto_or_positive() { return {.min = 0, .max = kMostCounted, .auto_is_zero = true}; }
/// Coefficients of losses: beyond it only overflows lie.
constexpr double kMostCoefficient = 1e6;
/// Counted in millionths, times the choices of a micro-batch.
constexpr double kMostCapacityFactor = 1e6;
/// Sizes that are multiplied with each other: far above any model, far below an overflow.
Limits size_of_at_least(double min) { return between(min, kMostSize); }

Section run_section() {
  using C = RunConfig;
  return section<C>(
      "run", &Config::run, "Where the run lives and how it behaves",
      {option("dir", &C::dir, "run folder: checkpoints, metrics.jsonl, run.log"),
       option("data", &C::data, "folder made by `arcus prepare`"),
       option("seed", &C::seed, "every random number of the run follows from it"),
       option("device", &C::device, "where the tensors live", one_of({"auto", "cpu", "cuda"})),
       option("reproducible", &C::reproducible,
              "the same bits at any number of ranks; false only warns when ranks differ"),
       option("max_minutes", &C::max_minutes,
              "stop with a checkpoint after this much wall-clock time; 0 = no limit", at_least(0)),
       option("trace_routing_every", &C::trace_routing_every,
              "write a routing trace every n steps; 0 = never", at_least(0)),
       option("digest_every", &C::digest_every,
              "log hashes of every tensor every n steps, for `arcus diff`; 0 = never", at_least(0)),
       option("verify_every", &C::verify_every,
              "every n steps ranks compute each other's micro-batches and compare gradients, so "
              "that a "
              "faulty machine is named; 0 = never",
              at_least(0)),
       option(
           "stuck_after_s", &C::stuck_after_s,
           "seconds without progress after which the run is declared stuck and ended; 0 = 10 times "
           "the median step, at least 60",
           at_least(0)),
       option("max_bad_steps", &C::max_bad_steps,
              "bad steps (not finite, or beyond train.max_grad_norm) in a row after which the run "
              "stops, everything saved",
              at_least(1)),
       option(
           "spike_factor", &C::spike_factor,
           "go back to the checkpoint before, and pass by the samples since, where a step's loss "
           "is this many times its running average (never in the first 32 steps); three times at "
           "most; needs checkpoint.every; 0 = never",
           at_least(0)),
       option("check_memory", &C::check_memory,
              "refuse a run that does not fit into its machine's memory")});
}

Section model_section() {
  using C = ModelConfig;
  return section<C>(
      "model", &Config::model, "The transformer",
      {option("vocab_size", &C::vocab_size, "token ids; \"auto\" = the data's", auto_or_positive()),
       option("hidden_size", &C::hidden_size, "width of the residual stream", size_of_at_least(1)),
       option("num_layers", &C::num_layers, "transformer layers", size_of_at_least(1)),
       option("num_heads", &C::num_heads, "query heads", size_of_at_least(1)),
       option("num_kv_heads", &C::num_kv_heads, "key and value heads; divides num_heads",
              size_of_at_least(1)),
       option("head_dim", &C::head_dim, "width of a head; 0 = hidden_size / num_heads",
              size_of_at_least(0)),
       option("qk_norm", &C::qk_norm, "RMSNorm of queries and keys: per head or over all",
              one_of({"none", "head", "full"})),
       option("qkv_bias", &C::qkv_bias, "biases in the query, key and value projections"),
       option("o_bias", &C::o_bias, "a bias in the projection of attention's output"),
       option(
           "position", &C::position,
           "how attention knows places: rotated queries and keys, a learned vector a place added "
           "to the embedding, or not at all",
           one_of({"rope", "learned", "none"})),
       option("max_positions", &C::max_positions,
              "longest text, in tokens, at least train.seq_len; needed for learned positions, else "
              "0 = "
              "train.seq_len, and what exported files say",
              size_of_at_least(0)),
       option("rope_theta", &C::rope_theta, "base of the rotary position angles", above(1)),
       option("partial_rotary_factor", &C::partial_rotary_factor,
              "share of head_dim that is rotated", above_up_to(0, 1)),
       option("rope_scaling", &C::rope_scaling,
              "how the angles were stretched for longer texts: all alike, or slow ones (llama3)",
              one_of({"none", "linear", "llama3"})),
       option("rope_factor", &C::rope_factor, "by how much", at_least(1)),
       option("rope_low_freq_factor", &C::rope_low_freq_factor,
              "llama3: turns in the original length below which an angle is slow", above(0)),
       option("rope_high_freq_factor", &C::rope_high_freq_factor, "llama3: above which it is fast",
              above(0)),
       option("rope_original_context", &C::rope_original_context,
              "llama3: the original length, in tokens", size_of_at_least(1)),
       option("norm", &C::norm, "RMSNorm, or LayerNorm with gain and bias, before every part",
              one_of({"rms", "layer"})),
       option("norm_eps", &C::norm_eps, "added to the mean square (LayerNorm: the variance)",
              above(0)),
       option("activation", &C::activation,
              "feed-forwards: down(silu(gate x) * up x), or down(gelu(up x)) with gelu's tanh form "
              "(as in GPT-2) or its exact one",
              one_of({"swiglu", "gelu_new", "gelu"})),
       option("mlp_bias", &C::mlp_bias, "biases in all feed-forwards, experts' too"),
       option("first_k_dense", &C::first_k_dense,
              "leading layers with a dense feed-forward instead of experts", size_of_at_least(0)),
       option("dense_ff_size", &C::dense_ff_size,
              "width of a dense feed-forward; 0 = topk * expert_ff_size", size_of_at_least(0)),
       option("num_experts", &C::num_experts, "experts of every MoE layer", size_of_at_least(1)),
       option("topk", &C::topk, "experts chosen per token; at most num_experts",
              size_of_at_least(1)),
       option("expert_ff_size", &C::expert_ff_size, "width of one expert", size_of_at_least(1)),
       option("num_shared_experts", &C::num_shared_experts, "experts that see every token",
              size_of_at_least(0)),
       option("shared_expert_gate", &C::shared_expert_gate,
              "a sigmoid gate on the shared experts' output"),
       option("tie_embeddings", &C::tie_embeddings, "one matrix serves embedding and head")});
}

std::vector<Option> routing_options() {
  using C = RoutingConfig;
  return {
      option("score", &C::score, "how gate logits become scores", one_of(names_of(score_table()))),
      option("select", &C::select, "how scores become choices", one_of(names_of(select_table()))),
      option("renormalize", &C::renormalize,
             "a token's weights sum to routed_scaling_factor; needs topk > 1"),
      option("gate_bias", &C::gate_bias, "a learned bias in the gate"),
      option("routed_scaling_factor", &C::routed_scaling_factor,
             "factor on the routed experts' weights", above(0)),
      option("n_group", &C::n_group, "groups of experts, of which a token uses some", at_least(1)),
      option("topk_group", &C::topk_group, "groups a token uses; below n_group", at_least(1)),
      option("group_score", &C::group_score,
             "what a group is chosen by: its two largest scores, or its largest",
             one_of({"top2_sum", "max"})),
      option("capacity_factor", &C::capacity_factor,
             "rows an expert takes per micro-batch, in units of K T / E; 0 = dropless",
             between(0, kMostCapacityFactor)),
      option("min_capacity", &C::min_capacity, "least capacity in rows", at_least(0)),
      option("eval_capacity_factor", &C::eval_capacity_factor,
             "capacity_factor in evaluation; 0 = dropless", between(0, kMostCapacityFactor)),
      option("drop_policy", &C::drop_policy,
             "who stays when too many want an expert: the earlier tokens or the higher scores",
             one_of({"position", "probs"})),
      option(
          "pad_to_capacity", &C::pad_to_capacity,
          "in training fill every expert up to its capacity, so that shapes are known ahead; needs "
          "capacity_factor, not with stream \"threshold\""),
      option("renormalize_after_drop", &C::renormalize_after_drop,
             "renormalize over the experts that kept the token alone; needs renormalize"),
      option("aux_loss", &C::aux_loss, "coefficient of the load-balancing loss; 0 = off",
             between(0, kMostCoefficient)),
      option("aux_scope", &C::aux_scope, "over what the load-balancing loss is taken",
             one_of({"micro_batch", "sequence", "global"})),
      option("aux_loss_sequence", &C::aux_loss_sequence,
             "beside aux_loss: the same over every sequence", between(0, kMostCoefficient)),
      option("aux_loss_global", &C::aux_loss_global,
             "beside aux_loss: the same with the fractions of the step before",
             between(0, kMostCoefficient)),
      option("z_loss", &C::z_loss, "coefficient of the loss on large gate logits; 0 = off",
             between(0, kMostCoefficient)),
      option("importance_loss", &C::importance_loss,
             "coefficient of the squared variation of the experts' summed weights",
             between(0, kMostCoefficient)),
      option("load_loss", &C::load_loss,
             "coefficient of the squared variation of the experts' chances; needs noise",
             between(0, kMostCoefficient)),
      option("expert_bias_rate", &C::expert_bias_rate,
             "step of the bias that evens out the experts without a loss; 0 = off", between(0, 1)),
      option("center_bias", &C::center_bias, "keep the mean of that bias at 0"),
      option(
          "quantile_rate", &C::quantile_rate,
          "how fast a bias follows the step's scores so that each expert is chosen equally often",
          between(0, 1)),
      option("jitter", &C::jitter, "in training the gate's input times U(1 - jitter, 1 + jitter)",
             from_to_below(0, 1)),
      option("noise", &C::noise, "in training learned normal noise on the logits, times this",
             between(0, kMostCoefficient)),
      option("allow_future_leak", &C::allow_future_leak,
             "accept a selection that looks at later tokens (expert_choice, stream \"capacity\")"),
      option("sinkhorn_iterations", &C::sinkhorn_iterations, "rounds of balancing of \"sinkhorn\"",
             between(1, 1000)),
      option("stream", &C::stream, "which tokens go through the experts at all",
             one_of(names_of(stream_table()))),
      option("stream_theta", &C::stream_theta, "\"threshold\": those with a gate value above it",
             between(1e-6, 0.999999)),
      option("stream_capacity_factor", &C::stream_capacity_factor,
             "\"capacity\": share of the micro-batch's tokens that go", between(1e-6, 1)),
      option("stream_target_share", &C::stream_target_share,
             "what stream_target_loss holds: \"threshold\" the share that goes, else the mean gate "
             "value",
             between(1e-6, 1)),
      option("stream_target_loss", &C::stream_target_loss,
             "coefficient of the squared distance from it; 0 = off", between(0, kMostCoefficient))};
}

Section routing_section() {
  return section<RoutingConfig>("routing", &Config::routing, "How tokens choose experts",
                                routing_options());
}

/// A key of [routing] in a row that gives some of them.
Option overridable(const Option& of_routing) {
  Option result = of_routing;
  const std::string name = of_routing.name;
  result.get = [get = of_routing.get](const void* row) {
    return get(&static_cast<const RoutingOverrideRow*>(row)->routing);
  };
  result.set = [set = of_routing.set, name](void* row, const Value& value) {
    auto* typed = static_cast<RoutingOverrideRow*>(row);
    set(&typed->routing, value);
    typed->given.insert(name);
  };
  result.given = [name](const void* row) {
    return static_cast<const RoutingOverrideRow*>(row)->given.contains(name);
  };
  return result;
}

Section override_section() {
  using C = RoutingOverrideRow;
  Option topk = option("topk", &C::topk, "experts chosen per token", at_least(1));
  topk.set = [set = topk.set](void* row, const Value& value) {
    set(row, value);
    static_cast<C*>(row)->given.insert("topk");
  };
  topk.given = [](const void* row) { return static_cast<const C*>(row)->given.contains("topk"); };
  std::vector<Option> options{
      option("layers", &C::layers, "which layers, e.g. \"4-7\": 0-based, dense ones counted"),
      topk};
  for (const Option& of_routing : routing_options()) options.push_back(overridable(of_routing));
  return array_section<C>(
      "routing.override", [](Config& c) -> std::vector<C>& { return c.routing_overrides; },
      "Layers that route in another way; keys that are not given are those of [model] and "
      "[routing]",
      std::move(options));
}

Section train_section() {
  using C = TrainConfig;
  return section<C>(
      "train", &Config::train, "Steps, batches, optimizer",
      {option("steps", &C::steps, "optimizer steps of the whole run", at_least(1)),
       option("seq_len", &C::seq_len, "tokens of a sequence", size_of_at_least(1)),
       option("micro_batch_seqs", &C::micro_batch_seqs,
              "sequences of a micro-batch, the unit that routing and sums are defined on",
              size_of_at_least(1)),
       option("global_batch_seqs", &C::global_batch_seqs,
              "sequences of a step; a multiple of micro_batch_seqs", size_of_at_least(1)),
       option("lr", &C::lr, "peak learning rate", above(0)),
       option("min_lr_ratio", &C::min_lr_ratio, "the schedule ends at lr * min_lr_ratio",
              between(0, 1)),
       option("beta1", &C::beta1, "AdamW: decay of the first moment", from_to_below(0, 1)),
       option("beta2", &C::beta2, "AdamW: decay of the second moment", from_to_below(0, 1)),
       option("eps", &C::eps, "AdamW: added to the root of the second moment", above(0)),
       option("warmup_steps", &C::warmup_steps, "linear warm-up; at most steps", at_least(0)),
       option("schedule", &C::schedule, "learning rate after the warm-up",
              one_of({"cosine", "wsd", "constant"})),
       option("decay_fraction", &C::decay_fraction,
              "wsd: share of the steps at the end over which the rate falls linearly",
              above_up_to(0, 1)),
       option("weight_decay", &C::weight_decay, "on tensors of two or more dimensions",
              at_least(0)),
       option("grad_clip", &C::grad_clip, "largest global gradient norm; 0 = off", at_least(0)),
       option("max_grad_norm", &C::max_grad_norm,
              "a step whose gradient norm (before clipping) is larger is skipped on all ranks; 0 = "
              "none is",
              at_least(0)),
       option("dtype", &C::dtype, "compute type; bf16 keeps f32 master weights",
              one_of({"f32", "bf16"})),
       option("recompute", &C::recompute,
              "keep layer inputs only and run layers again in the backward pass")});
}

/// What a group may be restricted to.
Limits part_names() {
  std::vector<std::string> names(kParamParts.begin(), kParamParts.end());
  names.emplace_back(kAnyPart);
  return one_of(std::move(names));
}

Section lora_section() {
  using C = LoraConfig;
  return section<C>(
      "train.lora", &Config::lora,
      "Low-rank adapters instead of the weights themselves, which stay as they are",
      {option("rank", &C::rank, "inner size of the adapters; 0 = none", between(0, 1024)),
       option("alpha", &C::alpha, "what they add is multiplied by alpha / rank; 0 = rank",
              at_least(0)),
       option("match", &C::match,
              "regular expression, searched in the weight's name: attention's q_proj, k_proj, "
              "v_proj, o_proj; feed-forwards' and experts' gate_proj, up_proj, down_proj")});
}

Section group_section() {
  using C = ParamGroupConfig;
  return array_section<C>(
      "train.group", [](Config& c) -> std::vector<C>& { return c.groups; },
      "Overrides for parameters of a part, or whose name matches, or both; the last match wins; "
      "with adapters all else is frozen unless a row takes it in",
      {option("match", &C::match, "regular expression, searched in the parameter's name"),
       option("part", &C::part,
              "of these parameters alone: gates; routed experts; embedding and head; norms; "
              "low-rank adapters; all others (dense)",
              part_names()),
       option("lr_scale", &C::lr_scale, "factor on the learning rate", at_least(0)),
       option("weight_decay", &C::weight_decay, "negative: that of [train]"),
       option("frozen", &C::frozen, "no gradient, no optimizer state")});
}

Section data_section() {
  using C = DataConfig;
  return section<C>("data", &Config::data, "How samples are drawn",
                    {option("cross_document_attention", &C::cross_document_attention,
                            "false: a token sees its own document only")});
}

Section domain_section() {
  using C = DomainConfig;
  return array_section<C>(
      "data.domain", [](Config& c) -> std::vector<C>& { return c.data.domains; },
      "Domains to train on; none given: all of them, weighted by their tokens",
      {option("name", &C::name, "a domain of the prepared data"),
       option("weight", &C::weight,
              "share of the samples, relative to the other weights; 0 = not trained on",
              at_least(0))});
}

Section parallel_section() {
  using C = ParallelConfig;
  return section<C>(
      "parallel", &Config::parallel, "How ranks share the work (never changes results)",
      {option("ep_size", &C::ep_size,
              "ranks that jointly hold one copy of all experts; \"auto\" = as many as fit",
              auto_or_positive()),
       option("comm", &C::comm, "library that moves rows", one_of({"auto", "nccl", "mpi"})),
       option("dispatch", &C::dispatch,
              "how tokens reach experts: \"shared\" = through memory inside a node and one message "
              "per "
              "rank and node between nodes, \"flat\" = one message per pair of ranks",
              one_of({"auto", "flat", "shared"})),
       option(
           "threads", &C::threads,
           "CPU threads per rank; 0 = OMP_NUM_THREADS, else the node's cores shared by its ranks",
           at_least(0)),
       option("bind", &C::bind,
              "\"cores\" = every thread keeps to a core of its own, for nodes that nobody else "
              "uses; \"none\" = as the launcher left it",
              one_of({"none", "cores"}))});
}

Section eval_section() {
  using C = EvalConfig;
  return section<C>(
      "eval", &Config::eval, "Held-out loss during the run",
      {option("every", &C::every, "steps between evaluations; 0 = only at the end", at_least(0)),
       option("batches", &C::batches, "micro-batches per domain; 0 = all held-out text",
              at_least(0))});
}

Section checkpoint_section() {
  using C = CheckpointConfig;
  return section<C>(
      "checkpoint", &Config::checkpoint, "What is saved and kept",
      {option("every", &C::every, "steps between checkpoints; 0 = only at the end", at_least(0)),
       option("keep", &C::keep, "newest complete checkpoints kept", at_least(1)),
       option("keep_every", &C::keep_every, "also keep those at multiples of n steps; 0 = none",
              at_least(0)),
       option("background", &C::background,
              "write checkpoints while training goes on, from a copy of the state (where there is "
              "memory for it)")});
}

/// A bound or default as people write it: 1 rather than 1.0.
std::string plain(double value) { return fmt::format("{}", value); }

/// Edit distance with swaps of neighbours (optimal string alignment).
std::size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<std::vector<std::size_t>> d(a.size() + 1, std::vector<std::size_t>(b.size() + 1));
  for (std::size_t i = 0; i <= a.size(); ++i) d[i][0] = i;
  for (std::size_t j = 0; j <= b.size(); ++j) d[0][j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t replace = d[i - 1][j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1);
      d[i][j] = std::min({d[i - 1][j] + 1, d[i][j - 1] + 1, replace});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
        d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
      }
    }
  }
  return d[a.size()][b.size()];
}

bool in_range(const Limits& limits, double value) {
  if (std::isnan(value)) return false;
  if (limits.min && (limits.min_excluded ? value <= *limits.min : value < *limits.min)) {
    return false;
  }
  return !limits.max || (limits.max_excluded ? value < *limits.max : value <= *limits.max);
}

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      result += '\\';
      result += c;
    } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
      result += fmt::format("\\u{:04X}", static_cast<unsigned char>(c));
    } else {
      result += c;
    }
  }
  return result + '"';
}

}  // namespace

const Option* Section::find(const std::string& option) const {
  const auto it = std::find_if(options.begin(), options.end(),
                               [&](const Option& o) { return o.name == option; });
  return it == options.end() ? nullptr : &*it;
}

const std::vector<Section>& option_table() {
  static const std::vector<Section> table = {
      run_section(),    model_section(),    routing_section(), override_section(),
      train_section(),  lora_section(),     group_section(),   data_section(),
      domain_section(), parallel_section(), eval_section(),    checkpoint_section()};
  return table;
}

const Section* find_section(const std::string& name) {
  const auto& table = option_table();
  const auto it =
      std::find_if(table.begin(), table.end(), [&](const Section& s) { return s.name == name; });
  return it == table.end() ? nullptr : &*it;
}

std::string type_name(ValueType type) {
  switch (type) {
    case ValueType::boolean:
      return "true or false";
    case ValueType::integer:
      return "a whole number";
    case ValueType::number:
      return "a number";
    case ValueType::text:
      return "text";
  }
  ARCUS_FAIL(ExitCode::internal, "unknown value type {}", static_cast<int>(type));
}

std::string allowed_values(const Option& option) {
  const Limits& limits = option.limits;
  if (!limits.choices.empty()) {
    std::vector<std::string> names;
    for (const auto& choice : limits.choices) names.push_back(quoted(choice));
    const std::string last = names.back();
    names.pop_back();
    return names.empty() ? last : fmt::format("{} or {}", fmt::join(names, ", "), last);
  }
  if (limits.auto_is_zero) return "\"auto\" or a whole number of at least 1";
  std::string text = type_name(option.type);
  if (limits.min)
    text +=
        fmt::format(" {} {}", limits.min_excluded ? "above" : "of at least", plain(*limits.min));
  if (limits.max) {
    text += fmt::format("{} {} {}", limits.min ? " and" : "",
                        limits.max_excluded ? "below" : "at most", plain(*limits.max));
  }
  return text;
}

std::string to_toml_text(const Option& option, const Value& value) {
  if (const bool* flag = std::get_if<bool>(&value)) return *flag ? "true" : "false";
  if (const auto* integer = std::get_if<std::int64_t>(&value)) {
    return option.limits.auto_is_zero && *integer == 0 ? "\"auto\"" : fmt::format("{}", *integer);
  }
  if (const auto* text = std::get_if<std::string>(&value)) return quoted(*text);
  std::string number = fmt::format("{}", std::get<double>(value));
  // TOML tells 1 (a whole number) from 1.0.
  if (number.find_first_not_of("-0123456789") == std::string::npos) number += ".0";
  return number;
}

std::string check_value(const Option& option, const Value& value) {
  const Limits& limits = option.limits;
  bool fits = true;
  if (const auto* integer = std::get_if<std::int64_t>(&value)) {
    fits = in_range(limits, static_cast<double>(*integer));
  } else if (const auto* number = std::get_if<double>(&value)) {
    fits = std::isfinite(*number) && in_range(limits, *number);
  } else if (const auto* text = std::get_if<std::string>(&value)) {
    fits = limits.choices.empty() ||
           std::find(limits.choices.begin(), limits.choices.end(), *text) != limits.choices.end();
    if (!fits) {
      const auto near = nearest_names(*text, limits.choices);
      if (!near.empty()) {
        return fmt::format("must be {}; did you mean \"{}\"?", allowed_values(option),
                           fmt::join(near, "\" or \""));
      }
    }
  }
  return fits ? "" : "must be " + allowed_values(option);
}

std::vector<std::string> nearest_names(const std::string& word,
                                       const std::vector<std::string>& candidates) {
  std::vector<std::string> nearest;
  std::size_t best = std::max<std::size_t>(2, word.size() / 3);
  for (const std::string& candidate : candidates) {
    const std::size_t distance = edit_distance(word, candidate);
    // A short name must not be "near" a word that shares nothing with it.
    if (distance > best || distance >= std::max(word.size(), candidate.size())) continue;
    if (distance < best) nearest.clear();
    best = distance;
    nearest.push_back(candidate);
  }
  return nearest;
}

}  // namespace arcus
