#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "src/base/state.hpp"
#include "src/model/config.hpp"

namespace arcus {

/// How a dense model's feed-forward layers become experts [2212.05055; granular: 2410.07524]. With
/// granularity G every layer is cut into G shards of D / G of its D columns; expert e is shard e
/// mod G of copy e div G. The gate's rows are random, one for each copy, so that a token takes
/// whole copies.
struct UpcycleOptions {
  std::int64_t num_experts = 8;    ///< E, a multiple of G
  std::int64_t topk = 2;           ///< K, a multiple of G
  std::int64_t granularity = 1;    ///< G
  std::int64_t first_k_dense = 0;  ///< leading layers that stay dense
  double noise = 0;  ///< added to every expert's weights, relative to their root mean square
  /// How the weights of shards grow, since a token's weights sum to 1 while whole copies are sums
  /// of G shards. S = G where weights are renormalized, else E G / K (of a uniform gate).
  /// "exact": where layers are linear in them (up and down by sqrt(S); down by S without a gate
  /// projection), so that nothing changes. "literature": all of them alike (by the cube root of S;
  /// the square root without a gate projection), which changes what the model computes a little.
  std::string scaling = "exact";
  std::uint64_t seed = 1;
};

/// Whether the new model computes what the dense one does (but for rounding): no noise, exact, and
/// weights that sum to 1.
bool preserves_function(const UpcycleOptions& options, const RoutingConfig& routing);

/// The configuration after; throws (usage) where options and model do not go together.
ModelConfig upcycled_model(const ModelConfig& dense, const RoutingConfig& routing,
                           const UpcycleOptions& options);

/// Makes the new model's tensors from the dense one's.
class Upcycling {
 public:
  /// Fills all numbers of a tensor of the dense model, fp32.
  using Reader = std::function<void(const std::string& name, std::span<float> out)>;

  Upcycling(const ModelConfig& dense, const RoutingConfig& routing, const UpcycleOptions& options);
  const ModelConfig& model() const { return after_; }
  /// All units of one tensor of the new model; experts [E, ...].
  void make(const TensorSpec& tensor, const Reader& dense, std::span<float> out) const;

 private:
  void make_experts(const TensorSpec& tensor, const Reader& dense, std::span<float> out) const;
  void make_gate(const TensorSpec& tensor, std::span<float> out) const;
  double scale_of(const std::string& tensor) const;

  ModelConfig dense_, after_;
  RoutingConfig routing_;
  UpcycleOptions options_;
};

}  // namespace arcus
