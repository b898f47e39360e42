// Law: every gradient of the model equals the derivative of the loss, by 4-point differences in
// double, with routing and drops frozen while perturbing (top-k is a jump).

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <optional>

#include "tests/support/gpt2_blocks.hpp"
#include "tests/support/model_fixture.hpp"
#include "tests/support/routing_cases.hpp"

namespace arcus::testing {
namespace {

class GradientCheck {
 public:
  explicit GradientCheck(const SmallModel& small)
      : world_(make_self_communicator({.reproducible = false})),
        stream_(1),
        instance_(self_groups(*world_), stream_, small.options(DType::f64, DType::f64)),
        buffers_(small.micro_batch_seqs, small.seq_len),
        stats_(instance_.transformer().make_stats()),
        workspace_(instance_.transformer().make_workspace()) {
    instance_.initialize_parameters();
    spread_parameters();
    // As if uneven steps had gone before, for what balancing remembers.
    std::vector<std::int64_t> counts(stats_.demand.size());
    for (std::size_t i = 0; i < counts.size(); ++i) counts[i] = static_cast<std::int64_t>(i % 3);
    instance_.balance().update(*world_, stream_, counts, counts);
  }

  /// Loss of the whole step; adds the gradients to the sums. The routing of the first call is kept
  /// and forced on every later one.
  double loss() {
    double total = 0;
    instance_.params().start_sums(stream_);
    for (std::int64_t n = 0; n < instance_.options().num_micro_batches; ++n) {
      const MicroBatch batch = synthetic_batch(buffers_, instance_.options(), n);
      const RoutingObserver observer = [&](std::int64_t layer, const MicroBatch& seen,
                                           const Routing& routing) {
        freeze(layer, n, seen, routing);
      };
      PassContext ctx = instance_.pass(batch, stats_);
      ctx.observer = &observer;
      instance_.transformer().train(ctx, instance_.params(), instance_.dispatcher(), workspace_,
                                    instance_.options().recompute);
      if (of_predictor_) {
        for (const double part : stats_.predictor_loss) total += part;
        continue;
      }
      total += stats_.token_loss_sum * batch.loss_scale;
      for (std::size_t l = 0; l < stats_.aux_loss.size(); ++l) {
        total += stats_.aux_loss[l] + stats_.z_loss[l];
        dropped_ += stats_.dropped[l];
      }
    }
    return total;
  }

  /// Compares every element of every parameter.
  void run() {
    // Twice: the second step finds what the first left in the sums.
    loss();
    loss();
    instance_.params().complete_sums(stream_);
    std::array<std::vector<double>, kFlatIds.size()> analytic;
    for (const FlatId flat : kFlatIds) {
      const auto sums = instance_.params().flat_sums(flat).span<double>();
      analytic[index_of(flat)].assign(sums.begin(), sums.end());
    }
    for (const ParamRow& row : instance_.registry().rows()) {
      if (row.trainable) check(row, analytic[index_of(row.flat)]);
    }
  }
  std::int64_t checked() const { return checked_; }
  std::int64_t skipped() const { return skipped_; }
  std::int64_t dropped() const { return dropped_; }
  ModelInstance& instance() { return instance_; }

 private:
  // Gains and biases away from their starting values, so that their gradients are not special; the
  // gate far enough apart that perturbing never changes the routing.
  void spread_parameters() {
    for (const ParamRow& row : instance_.registry().rows()) {
      const TensorView flat = instance_.params().flat_values(row.flat);
      const bool gate = row.name.find("mlp.gate.") != std::string::npos;
      const bool large = row.adapter && row.init == ParamInit::normal;  // lora_A, as it starts
      const double scale = large ? 1 : !row.is_matrix() ? 0.3 : gate ? 40 : 12;
      for (std::int64_t unit = 0; unit < row.num_units(); ++unit) {
        double* values = flat.as<double>() + row.offset + unit * row.expert_stride;
        for (std::int64_t i = 0; i < row.unit_elements(); ++i) {
          const double noise =
              Rng(3, "spread", row.name)
                  .normal(static_cast<std::uint64_t>(unit * row.unit_elements() + i)) *
              0.02;
          values[i] += row.init == ParamInit::normal ? values[i] * (scale - 1) : noise * scale;
        }
      }
    }
  }

  void freeze(std::int64_t layer, std::int64_t micro_batch, const MicroBatch& seen,
              const Routing& routing) {
    std::vector<std::int32_t> now;
    if (seen.token_idx.data != nullptr) {
      const auto* tokens = seen.token_idx.as<std::int32_t>();
      now.assign(tokens, tokens + seen.token_idx.size());
    }
    for (const TensorView& part : {routing.topk_idx, routing.expert_of_slot}) {
      now.insert(now.end(), part.as<std::int32_t>(), part.as<std::int32_t>() + part.size());
    }
    // The load loss takes the first expert that was not chosen as a threshold.
    const std::int64_t topk = instance_.options().model.topk;
    for (std::int64_t t = 0; t < routing.dload.size() * routing.z.rows; ++t) {
      const double* z = routing.z.row<double>(t / routing.dload.size());
      const auto e = t % routing.dload.size();
      const auto larger = std::count_if(z, z + routing.z.cols, [&](double v) { return v > z[e]; });
      if (larger == topk) now.push_back(static_cast<std::int32_t>(e));
    }
    auto [kept, first] = routing_.try_emplace({layer, micro_batch}, now);
    if (!first && kept->second != now) moved_ = true;
  }

  /// 4-point difference of the loss at `value`, or nothing where the routing moved.
  std::optional<double> difference(double& value, double h) {
    const double saved = value;
    moved_ = false;
    const auto at = [&](double offset) {
      value = saved + offset;
      const double result = loss();
      value = saved;
      return result;
    };
    const double numeric = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h);
    return moved_ ? std::nullopt : std::optional(numeric);
  }

  void check(const ParamRow& row, const std::vector<double>& analytic) {
    // A predictor has a loss of its own, which reaches nothing else.
    of_predictor_ = row.name.find("predictor") != std::string::npos;
    double worst = 0;
    double largest = 0;
    for (std::int64_t unit = 0; unit < row.num_units(); ++unit) {
      const std::int64_t begin = row.offset + unit * row.expert_stride;
      const std::int64_t step = std::max<std::int64_t>(1, row.unit_elements() / 7);
      for (std::int64_t i = 0; i < row.unit_elements(); i += step) {
        double& value = instance_.params().flat_values(row.flat).as<double>()[begin + i];
        // Routing must stay as it is while perturbing; a smaller step keeps away from the jump.
        std::optional<double> numeric;
        for (double h = kStep; !numeric && h > kStep / 100; h /= 4) numeric = difference(value, h);
        if (!numeric) {
          ++skipped_;
          continue;
        }
        ++checked_;
        const double exact = analytic[static_cast<std::size_t>(begin + i)];
        worst = std::max(worst, std::abs(*numeric - exact));
        largest = std::max(largest, std::abs(exact));
      }
    }
    EXPECT_LT(worst, kTolerance * std::max(1.0, largest)) << row.name << ", largest " << largest;
    EXPECT_GT(largest, 0) << row.name << " has no gradient at all";
  }

  // Error of the formula: h^4 |f^(5)| / 30 + 1.5 eps |f| / h. With |f| ~ 3 and h = 5e-5 the second
  // part is 2e-11 for an exactly rounded loss; the loss is a sum of some thousand rounded terms,
  // and retries divide h by up to 64, so two decades are left.
  static constexpr double kStep = 5e-5;
  static constexpr double kTolerance = 5e-9;

  std::unique_ptr<Communicator> world_;
  Stream stream_;
  ModelInstance instance_;
  BatchBuffers buffers_;
  MicroBatchStats stats_;
  Transformer::Workspace workspace_;
  std::map<std::pair<std::int64_t, std::int64_t>, std::vector<std::int32_t>> routing_;
  bool moved_ = false;
  bool of_predictor_ = false;
  std::int64_t checked_ = 0;
  std::int64_t skipped_ = 0;
  std::int64_t dropped_ = 0;
};

struct Variant {
  const char* name;
  void (*change)(SmallModel&);
};

std::ostream& operator<<(std::ostream& out, const Variant& variant) { return out << variant.name; }

class Gradients : public ::testing::TestWithParam<Variant> {};

TEST_P(Gradients, EqualDifferences) {
  SmallModel small;
  GetParam().change(small);
  GradientCheck check(small);
  check.run();
  EXPECT_LT(check.skipped() * 20, check.checked()) << "too many elements lie at a routing jump";
  const bool capacity = small.routing.capacity_factor > 0;
  EXPECT_EQ(check.dropped() > 0, capacity);
}

void like_gpt2(SmallModel& s) { use_gpt2_blocks(s.model, s.seq_len); }

const Variant kVariants[] = {
    {"plain", [](SmallModel&) {}},
    {"not_renormalized", [](SmallModel& s) { s.routing.renormalize = false; }},
    {"top1",
     [](SmallModel& s) {
       s.model.topk = 1;
       s.routing.renormalize = false;
     }},
    {"top3_of_4", [](SmallModel& s) { s.model.topk = 3; }},
    {"all_experts", [](SmallModel& s) { s.model.topk = 4; }},
    {"gate_bias", [](SmallModel& s) { s.routing.gate_bias = true; }},
    {"scaled", [](SmallModel& s) { s.routing.routed_scaling_factor = 2.5; }},
    {"drops_by_position", [](SmallModel& s) { s.routing.capacity_factor = 0.75; }},
    {"drops_by_probs",
     [](SmallModel& s) {
       s.routing.capacity_factor = 0.5;
       s.routing.drop_policy = "probs";
     }},
    {"drops_renormalized",
     [](SmallModel& s) {
       s.routing.capacity_factor = 0.75;
       s.routing.renormalize_after_drop = true;
     }},
    {"no_losses", [](SmallModel& s) { s.routing.aux_loss = 0; }},
    {"strong_losses",
     [](SmallModel& s) {
       s.routing.aux_loss = 0.5;
       s.routing.z_loss = 0.1;
     }},
    {"sequence_aux",
     [](SmallModel& s) {
       s.routing.aux_loss = 0.5;
       s.routing.aux_scope = "sequence";
     }},
    {"shared_expert", [](SmallModel& s) { s.model.num_shared_experts = 1; }},
    {"gated_shared_experts",
     [](SmallModel& s) {
       s.model.num_shared_experts = 2;
       s.model.shared_expert_gate = true;
     }},
    {"first_dense",
     [](SmallModel& s) {
       s.model.first_k_dense = 1;
       s.model.dense_ff_size = 10;
     }},
    {"no_qk_norm", [](SmallModel& s) { s.model.qk_norm = "none"; }},
    {"full_qk_norm", [](SmallModel& s) { s.model.qk_norm = "full"; }},
    {"qkv_bias", [](SmallModel& s) { s.model.qkv_bias = true; }},
    {"partial_rotary", [](SmallModel& s) { s.model.partial_rotary_factor = 0.5; }},
    {"multi_head", [](SmallModel& s) { s.model.num_kv_heads = 4; }},
    {"multi_query", [](SmallModel& s) { s.model.num_kv_heads = 1; }},
    {"tied", [](SmallModel& s) { s.model.tie_embeddings = true; }},
    {"recompute",
     [](SmallModel& s) {
       s.recompute = true;
       s.routing.capacity_factor = 0.75;
     }},
    {"layer_norm", [](SmallModel& s) { s.model.norm = "layer"; }},
    {"swiglu_biases",
     [](SmallModel& s) {
       s.model.mlp_bias = s.model.o_bias = true;
       s.model.num_shared_experts = 1;
     }},
    {"gelu", [](SmallModel& s) { s.model.activation = "gelu"; }},
    {"no_positions", [](SmallModel& s) { s.model.position = "none"; }},
    {"gpt2", like_gpt2},
    {"gpt2_dense",
     [](SmallModel& s) {
       like_gpt2(s);
       s.model.first_k_dense = s.model.num_layers;
       s.model.dense_ff_size = 10;
     }},
    {"gpt2_without_biases",
     [](SmallModel& s) {
       like_gpt2(s);
       s.model.qkv_bias = s.model.o_bias = s.model.mlp_bias = false;
     }},
    {"gpt2_drops_recompute",
     [](SmallModel& s) {
       like_gpt2(s);
       s.model.first_k_dense = 1;
       s.model.num_layers = 3;
       s.model.num_shared_experts = 1;
       s.model.shared_expert_gate = true;
       s.model.activation = "gelu";
       s.recompute = true;
       s.routing.capacity_factor = 0.75;
     }},
    {"gpt2_two_level",
     [](SmallModel& s) {
       like_gpt2(s);
       s.routing.stream = "threshold";
     }},
    {"attention_adapters", [](SmallModel& s) { s.lora = {.rank = 3}; }},
    {"expert_adapters",
     [](SmallModel& s) {
       s.lora = {.rank = 2, .alpha = 5, .match = "experts"};
       s.routing.capacity_factor = 0.75;
     }},
    {"some_adapters_beside_gates",
     [](SmallModel& s) {
       s.lora = {.rank = 1, .alpha = 3, .match = "layers.1.*(v|up|down)_proj"};
       s.groups = {{.part = "router"}};
     }},
    {"adapters_everywhere_beside_weights",
     [](SmallModel& s) {
       s.model.num_layers = 3;
       s.model.first_k_dense = 1;
       s.model.dense_ff_size = 10;
       s.model.num_shared_experts = 1;
       s.model.qkv_bias = true;
       s.lora = {.rank = 4, .alpha = 2, .match = "_proj"};
       s.groups = {{.match = "."}};
       s.recompute = true;
     }},
    {"gpt2_adapters_beside_biases",
     [](SmallModel& s) {
       like_gpt2(s);
       s.model.num_layers = 3;
       s.model.first_k_dense = 1;
       s.model.dense_ff_size = 10;
       s.model.num_shared_experts = 1;
       s.lora = {.rank = 3, .alpha = 2, .match = "_proj"};
       s.groups = {{.match = "."}};
       s.routing.capacity_factor = 0.75;
     }},
    {"swiglu_adapters_beside_biases",
     [](SmallModel& s) {
       s.model.mlp_bias = s.model.o_bias = s.model.qkv_bias = true;
       s.lora = {.rank = 2, .match = "_proj"};
       s.groups = {{.match = "bias"}};
     }},
    {"everything",
     [](SmallModel& s) {
       s.model.num_layers = 3;
       s.model.first_k_dense = 1;
       s.model.num_shared_experts = 1;
       s.model.shared_expert_gate = true;
       s.model.qkv_bias = true;
       s.model.tie_embeddings = true;
       s.routing.gate_bias = true;
       s.routing.capacity_factor = 0.75;
       s.routing.drop_policy = "probs";
       s.routing.renormalize_after_drop = true;
       s.routing.aux_loss = 0.3;
       s.routing.z_loss = 0.05;
       s.recompute = true;
     }},
};

class RoutingGradients : public ::testing::TestWithParam<RoutingCase> {};

TEST_P(RoutingGradients, EqualDifferences) {
  SmallModel small;
  GetParam().apply(small.model, small.routing);
  GradientCheck check(small);
  check.run();
  EXPECT_LT(check.skipped() * 10, check.checked()) << "too many elements lie at a routing jump";
}

INSTANTIATE_TEST_SUITE_P(Tables, RoutingGradients, ::testing::ValuesIn(routing_cases()),
                         [](const auto& param) { return param.param.name; });

INSTANTIATE_TEST_SUITE_P(Options, Gradients, ::testing::ValuesIn(kVariants),
                         [](const auto& variant) { return std::string(variant.param.name); });

}  // namespace
}  // namespace arcus::testing
