#include "src/model/routing.hpp"

#include <array>

#include "src/base/error.hpp"
#include "src/base/rng.hpp"
#include "src/model/balance_state.hpp"

namespace arcus {
namespace {

// ---- select ------------------------------------------------------------------------------------

bool select_largest(const GateContext& gate, TensorView) {
  const RoutingConfig& c = gate.config;
  const BalanceState* balance = gate.pass.balance;
  select_topk(gate.pass.stream,
              {.topk_idx = gate.routing.topk_idx,
               .s = gate.routing.s,
               .expert_bias =
                   balance != nullptr ? balance->expert_bias(gate.pass.layer) : ConstTensorView(),
               .n_group = c.n_group,
               .topk_group = c.topk_group,
               .group_score = c.group_score == "max" ? GroupScore::max : GroupScore::top2_sum});
  return false;
}

bool select_second_sampled(const GateContext& gate, TensorView wanted) {
  select_largest(gate, wanted);
  if (!gate.pass.training) return false;
  sample_second(gate.pass.stream, {.wanted = wanted,
                                   .topk_idx = gate.routing.topk_idx,
                                   .s = gate.routing.s,
                                   .draws = gate.draws("second expert")});
  return true;
}

bool select_hashed(const GateContext& gate, TensorView) {
  select_by_hash(gate.pass.stream,
                 {.topk_idx = gate.routing.topk_idx,
                  .ids = gate.pass.batch.ids.col_range(0, gate.routing.topk_idx.rows),
                  .num_experts = gate.model.num_experts,
                  .key = Rng(0, "hash routing", fmt::format("{}", gate.pass.layer)).key()});
  return false;
}

bool select_balanced(const GateContext& gate, TensorView wanted) {
  if (!gate.pass.training) return select_largest(gate, wanted);
  const ArenaScope scope(gate.pass.scratch);
  const std::int64_t size = sinkhorn_scratch(gate.routing.z.rows, gate.model.num_experts);
  select_sinkhorn(gate.pass.stream, {.topk_idx = gate.routing.topk_idx,
                                     .z = gate.routing.z,
                                     .iterations = gate.config.sinkhorn_iterations,
                                     .scratch = gate.pass.scratch.allocate(DType::f64, 1, size)});
  return false;
}

bool select_by_expert(const GateContext& gate, TensorView) {
  Routing& r = gate.routing;
  if (!gate.pass.training) {
    select_above(gate.pass.stream, {.topk_idx = r.topk_idx, .p = r.predictor});
    return false;
  }
  const ArenaScope scope(gate.pass.scratch);
  select_by_experts(
      gate.pass.stream,
      {.topk_idx = r.topk_idx,
       .s = r.s,
       .capacity = expert_capacity(gate.config.capacity_factor, gate.config.min_capacity,
                                   gate.model.topk, r.s.rows, gate.model.num_experts),
       .scratch = gate.pass.scratch.allocate(DType::i64, 1, 2 * gate.model.num_experts)});
  return false;
}

bool select_all(const GateContext& gate, TensorView) {
  for (std::int64_t t = 0; t < gate.routing.topk_idx.rows; ++t) {
    auto* choice = gate.routing.topk_idx.row<std::int32_t>(t);
    for (std::int64_t e = 0; e < gate.model.num_experts; ++e) {
      choice[e] = static_cast<std::int32_t>(e);
    }
  }
  return false;
}

// ---- balance -----------------------------------------------------------------------------------

/// Tokens before each group of an aux loss.
class Groups {
 public:
  Groups(const GateContext& gate, AuxScope scope)
      : whole_{0, gate.routing.s.rows},
        offsets_(scope == AuxScope::sequence ? gate.pass.batch.sequence_offsets
                                             : std::span<const std::int64_t>(whole_)) {
    if (scope == AuxScope::sequence) weights_ = gate.pass.batch.sequence_weights;
  }
  Groups(const Groups&) = delete;
  Groups& operator=(const Groups&) = delete;
  std::span<const std::int64_t> offsets() const { return offsets_; }
  std::span<const double> weights() const { return weights_; }
  std::int64_t count() const { return static_cast<std::int64_t>(offsets_.size()) - 1; }

 private:
  std::array<std::int64_t, 2> whole_;
  std::span<const std::int64_t> offsets_;
  std::span<const double> weights_;
};

TensorView fraction_of(const Routing& routing, AuxScope scope) {
  return scope == AuxScope::sequence ? routing.fraction_sequence
         : scope == AuxScope::global ? routing.fraction_global
                                     : routing.fraction;
}

/// f of the step before into `fraction`; 1 / E before the first.
void fill_previous_fraction(const GateContext& gate, TensorView fraction) {
  const auto counts = gate.pass.balance->counts(gate.pass.layer);
  std::int64_t total = 0;
  for (const std::int64_t count : counts) total += count;
  dispatch_accumulate(fraction.dtype, [&]<class A>() {
    A* f = fraction.as<A>();
    for (std::size_t e = 0; e < counts.size(); ++e) {
      f[e] = static_cast<A>(total > 0 ? static_cast<double>(counts[e]) / static_cast<double>(total)
                                      : 1 / static_cast<double>(counts.size()));
    }
  });
}

template <AuxScope kScope>
double aux_coefficient_of(const RoutingConfig& config) {
  return aux_coefficient(config, kScope);
}

template <AuxScope kScope>
void add_aux_loss(const GateContext& gate) {
  const ArenaScope arena(gate.pass.scratch);
  const Groups groups(gate, kScope);
  const TensorView fraction = fraction_of(gate.routing, kScope).row_range(0, groups.count());
  if (kScope == AuxScope::global) fill_previous_fraction(gate, fraction);
  double aux = 0;
  aux_loss(gate.pass.stream,
           {.aux = &aux,
            .fraction = fraction,
            .given = kScope == AuxScope::global,
            .scratch = gate.pass.scratch.allocate(DType::f64, 1, 2 * gate.model.num_experts),
            .s = gate.routing.s,
            .group_offsets = groups.offsets(),
            .group_weights = groups.weights(),
            .topk = gate.model.topk});
  gate.pass.stats.aux_loss[gate.layer()] +=
      aux_coefficient(gate.config, kScope) * gate.pass.batch.weight * aux;
}

template <AuxScope kScope>
void add_aux_gradient(const GateContext& gate, TensorView ds) {
  const Groups groups(gate, kScope);
  aux_loss_backward(gate.pass.stream,
                    {.ds = ds,
                     .s = gate.routing.s,
                     .fraction = fraction_of(gate.routing, kScope),
                     .group_offsets = groups.offsets(),
                     .group_weights = groups.weights(),
                     .coeff = aux_coefficient(gate.config, kScope) * gate.pass.batch.weight});
}

template <AuxScope kScope>
constexpr BalanceRow aux_row(std::string_view name, std::string_view what) {
  return {.name = name,
          .what = what,
          .needs_steering = true,
          .coefficient = aux_coefficient_of<kScope>,
          .forward = add_aux_loss<kScope>,
          .backward_scores = add_aux_gradient<kScope>};
}

void add_importance_loss(const GateContext& gate) {
  double cv2 = 0;
  importance_loss(gate.pass.stream, {.cv2 = &cv2,
                                     .derivative = gate.routing.dimportance,
                                     .s = gate.routing.s,
                                     .topk_idx = gate.routing.topk_idx,
                                     .renormalize = gate.config.renormalize});
  gate.pass.stats.aux_loss[gate.layer()] +=
      gate.config.importance_loss * gate.pass.batch.weight * cv2;
}

void add_importance_gradient(const GateContext& gate, TensorView ds) {
  importance_loss_backward(gate.pass.stream,
                           {.ds = ds,
                            .derivative = gate.routing.dimportance,
                            .s = gate.routing.s,
                            .topk_idx = gate.routing.topk_idx,
                            .renormalize = gate.config.renormalize,
                            .coeff = gate.config.importance_loss * gate.pass.batch.weight});
}

void keep_quantile_scores(const GateContext& gate) {
  const TensorView u = gate.pass.balance->quantile_scores(gate.pass.layer, gate.pass.batch.number);
  if (u.data == nullptr) return;
  quantile_scores(gate.pass.stream, {.u = u,
                                     .s = gate.routing.s,
                                     .expert_bias = gate.pass.balance->expert_bias(gate.pass.layer),
                                     .topk = gate.model.topk});
}

void add_load_loss(const GateContext& gate) {
  double cv2 = 0;
  load_loss(gate.pass.stream, {.cv2 = &cv2,
                               .derivative = gate.routing.dload,
                               .z_clean = gate.routing.z_clean,
                               .z_noisy = gate.routing.z,
                               .n = gate.routing.noise_logits,
                               .amount = gate.config.noise,
                               .topk = gate.model.topk});
  gate.pass.stats.aux_loss[gate.layer()] += gate.config.load_loss * gate.pass.batch.weight * cv2;
}

// ---- tables ------------------------------------------------------------------------------------

constexpr std::array kScores{
    ScoreRow{"softmax", "probabilities that sum to one", Score::softmax, false},
    ScoreRow{"sigmoid", "each expert on its own, in (0, 1)", Score::sigmoid, false},
    ScoreRow{"cosine", "softmax of cosines with a learned temperature", Score::softmax, true}};

constexpr std::array kSelects{
    SelectRow{.name = "topk",
              .what = "the topk largest scores",
              .steered = true,
              .takes_bias = true,
              .takes_groups = true,
              .takes_capacity = true,
              .select = select_largest},
    SelectRow{.name = "second_sampled",
              .what = "the largest score, and the second with a probability that follows from its "
                      "weight",
              .topk = 2,
              .steered = true,
              .takes_bias = true,
              .takes_groups = true,
              .takes_capacity = true,
              .select = select_second_sampled},
    SelectRow{.name = "hash",
              .what = "a fixed function of the token id",
              .takes_capacity = true,
              .ascending = true,
              .select = select_hashed},
    SelectRow{.name = "sinkhorn",
              .what = "a balanced assignment of the micro-batch; evaluation takes the largest "
                      "scores",
              .steered = true,
              .takes_capacity = true,
              .select = select_balanced},
    SelectRow{.name = "expert_choice",
              .what = "each expert its best tokens; evaluation asks a predictor",
              .slot_per_expert = true,
              .predicts = true,
              .takes_capacity = true,
              .ascending = true,
              .select = select_by_expert},
    SelectRow{.name = "dense",
              .what = "every expert, weighted by its score",
              .all_experts = true,
              .slot_per_expert = true,
              .ascending = true,
              .select = select_all}};

constexpr std::array kBalances{
    aux_row<AuxScope::micro_batch>("aux_loss", "evens out the experts of a micro-batch"),
    aux_row<AuxScope::sequence>("aux_loss_sequence", "evens out the experts of every sequence"),
    aux_row<AuxScope::global>("aux_loss_global", "evens out the experts of whole steps"),
    BalanceRow{.name = "importance_loss",
               .what = "evens out the sums of the experts' weights",
               .needs_steering = true,
               .coefficient = [](const RoutingConfig& c) { return c.importance_loss; },
               .forward = add_importance_loss,
               .backward_scores = add_importance_gradient},
    BalanceRow{.name = "load_loss",
               .what = "evens out the chances of the experts under noise",
               .needs_steering = true,
               .coefficient = [](const RoutingConfig& c) { return c.load_loss; },
               .forward = add_load_loss,
               .backward_scores = nullptr},
    BalanceRow{.name = "quantile_rate",
               .what = "a bias that follows the step's scores",
               .needs_steering = true,
               .coefficient = [](const RoutingConfig& c) { return c.quantile_rate; },
               .forward = keep_quantile_scores,
               .backward_scores = nullptr}};

constexpr std::array kStreams{
    StreamRow{.name = "none", .what = "all tokens, no decision layer", .passes_all = true},
    StreamRow{.name = "threshold",
              .what = "tokens whose gate value exceeds stream_theta",
              .decides = true,
              .holds_share = true},
    StreamRow{.name = "weighted",
              .what = "all tokens, each as much as its gate value says",
              .decides = true,
              .passes_all = true},
    StreamRow{.name = "capacity",
              .what = "the largest gate values of the micro-batch; evaluation asks a predictor",
              .decides = true,
              .predicts = true}};

template <class Table>
const auto& find(const Table& table, std::string_view key, std::string_view name) {
  for (const auto& row : table) {
    if (row.name == name) return row;
  }
  std::string known;
  for (const auto& row : table) {
    known += fmt::format("{}\"{}\"", known.empty() ? "" : ", ", row.name);
  }
  ARCUS_FAIL(ExitCode::usage, "routing.{} is \"{}\"; it must be one of {}", key, name, known);
}

}  // namespace

TokenDraws GateContext::draws(std::string_view purpose) const {
  return {.key = Rng(pass.seed, purpose, fmt::format("{}", pass.layer)).key(),
          .step = pass.step,
          .first_token = pass.batch.first_token};
}

std::span<const ScoreRow> score_table() { return kScores; }
std::span<const SelectRow> select_table() { return kSelects; }
std::span<const BalanceRow> balance_table() { return kBalances; }
std::span<const StreamRow> stream_table() { return kStreams; }

const ScoreRow& find_score(std::string_view name) { return find(kScores, "score", name); }
const SelectRow& find_select(std::string_view name) { return find(kSelects, "select", name); }
const StreamRow& find_stream(std::string_view name) { return find(kStreams, "stream", name); }

}  // namespace arcus
