#include "src/model/upcycle.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "src/base/error.hpp"
#include "src/base/rng.hpp"

namespace arcus {
namespace {

/// "model.layers.3.mlp.experts.up_proj.weight" -> "model.layers.3.mlp.up_proj.weight".
std::string dense_name(const std::string& tensor) {
  constexpr std::string_view kExperts = "experts.";
  std::string name = tensor;
  return name.erase(tensor.find(kExperts), kExperts.size());
}

bool is_gated(const ModelConfig& model) { return model.activation == "swiglu"; }

/// Multiplies by `scale` and adds normal numbers of `noise` times the root mean square.
void scale_and_disturb(std::span<float> values, double scale, double noise, const Rng& rng,
                       std::int64_t expert) {
  double squares = 0;
  for (float& value : values) {
    value = static_cast<float>(static_cast<double>(value) * scale);
    squares += static_cast<double>(value) * static_cast<double>(value);
  }
  if (noise == 0) return;
  const double amount =
      noise * std::sqrt(squares / static_cast<double>(std::max<std::size_t>(1, values.size())));
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double normal = static_cast<double>(rng.normal(static_cast<std::uint64_t>(expert), i));
    values[i] = static_cast<float>(static_cast<double>(values[i]) + amount * normal);
  }
}

}  // namespace

bool preserves_function(const UpcycleOptions& options, const RoutingConfig& routing) {
  return options.noise == 0 && routing.renormalize && routing.routed_scaling_factor == 1 &&
         (options.scaling == "exact" || options.granularity == 1);
}

ModelConfig upcycled_model(const ModelConfig& dense, const RoutingConfig& routing,
                           const UpcycleOptions& o) {
  ARCUS_REQUIRE(dense.first_k_dense == dense.num_layers, ExitCode::usage,
                "the model has experts already (model.first_k_dense {} of {} layers); `arcus "
                "convert --num-experts` changes their number",
                dense.first_k_dense, dense.num_layers);
  ARCUS_REQUIRE(o.topk > 1 || !routing.renormalize, ExitCode::usage,
                "--topk 1 with renormalized weights: every weight would be 1 and the gate would "
                "not learn; take --topk 2, or --set routing.renormalize=false (the model's loss "
                "then changes)");
  ARCUS_REQUIRE(o.granularity >= 1 && dense.dense_ff_size % o.granularity == 0, ExitCode::usage,
                "--granularity {} does not divide the dense width {}", o.granularity,
                dense.dense_ff_size);
  ARCUS_REQUIRE(o.num_experts % o.granularity == 0 && o.topk % o.granularity == 0, ExitCode::usage,
                "--experts {} and --topk {} must be multiples of --granularity {}, so that a token "
                "takes whole copies; {} and {} would do",
                o.num_experts, o.topk, o.granularity,
                (o.num_experts + o.granularity - 1) / o.granularity * o.granularity,
                (o.topk + o.granularity - 1) / o.granularity * o.granularity);
  ARCUS_REQUIRE(o.first_k_dense < dense.num_layers, ExitCode::usage,
                "--first-dense {} leaves none of the {} layers to turn into experts",
                o.first_k_dense, dense.num_layers);
  ModelConfig model = dense;
  model.first_k_dense = o.first_k_dense;
  model.num_experts = o.num_experts;
  model.topk = o.topk;
  model.expert_ff_size = dense.dense_ff_size / o.granularity;
  return model;
}

Upcycling::Upcycling(const ModelConfig& dense, const RoutingConfig& routing,
                     const UpcycleOptions& options)
    : dense_(dense),
      after_(upcycled_model(dense, routing, options)),
      routing_(routing),
      options_(options) {
  ARCUS_REQUIRE(options.scaling == "exact" || options.scaling == "literature", ExitCode::usage,
                "--scaling {}: must be exact or literature", options.scaling);
}

void Upcycling::make(const TensorSpec& tensor, const Reader& dense, std::span<float> out) const {
  if (tensor.name.find(".mlp.experts.") != std::string::npos) {
    make_experts(tensor, dense, out);
  } else if (tensor.name.ends_with(".mlp.gate.weight")) {
    make_gate(tensor, out);
  } else if (tensor.name.ends_with(".e_score_correction_bias")) {
    std::ranges::fill(out, 0.0F);
  } else {
    dense(tensor.name, out);
  }
}

double Upcycling::scale_of(const std::string& tensor) const {
  const auto d = [](std::int64_t n) { return static_cast<double>(n); };
  const double g = d(options_.granularity);
  if (options_.granularity == 1 && routing_.renormalize) return 1;
  const double s = routing_.renormalize ? g : d(options_.num_experts) * g / d(options_.topk);
  const bool gate = tensor.find("gate_proj") != std::string::npos;
  const bool up = tensor.find("up_proj") != std::string::npos;
  if (tensor.ends_with("down_proj.bias")) return routing_.renormalize ? 1 : s / g;
  if (options_.scaling == "literature") return is_gated(dense_) ? std::cbrt(s) : std::sqrt(s);
  if (gate) return 1;
  if (is_gated(dense_)) return std::sqrt(s);
  return up ? 1 : s;
}

void Upcycling::make_experts(const TensorSpec& tensor, const Reader& dense,
                             std::span<float> out) const {
  const std::int64_t shards = options_.granularity;
  const std::int64_t unit = tensor.num_elements() / tensor.num_units;
  const bool down_weight = tensor.name.ends_with("down_proj.weight");
  const bool whole = tensor.name.ends_with("down_proj.bias");  // every shard has all of it
  std::vector<float> all(static_cast<std::size_t>(whole ? unit : unit * shards));
  dense(dense_name(tensor.name), all);
  const double scale = scale_of(tensor.name);
  const Rng rng(options_.seed, "upcycle", tensor.name);
  const std::int64_t cols = tensor.cols();
  for (std::int64_t e = 0; e < tensor.num_units; ++e) {
    const std::span<float> to =
        out.subspan(static_cast<std::size_t>(e * unit), static_cast<std::size_t>(unit));
    const std::int64_t shard = whole ? 0 : e % shards;
    if (down_weight) {  // [H, F]: columns of [H, D]
      for (std::int64_t row = 0; row < unit / cols; ++row) {
        std::copy_n(all.begin() + row * cols * shards + shard * cols, cols,
                    to.begin() + row * cols);
      }
    } else {
      std::copy_n(all.begin() + shard * unit, unit, to.begin());
    }
    scale_and_disturb(to, scale, options_.noise, rng, e);
  }
}

void Upcycling::make_gate(const TensorSpec& tensor, std::span<float> out) const {
  constexpr float kStd = 0.02F;  // as of a new model
  const Rng rng(options_.seed, "upcycle", tensor.name);
  const std::int64_t cols = tensor.cols();
  for (std::int64_t e = 0; e < after_.num_experts; ++e) {
    const std::int64_t copy = e / options_.granularity;
    for (std::int64_t i = 0; i < cols; ++i) {
      out[static_cast<std::size_t>(e * cols + i)] =
          kStd * rng.normal(static_cast<std::uint64_t>(copy), static_cast<std::uint64_t>(i));
    }
  }
}

}  // namespace arcus
