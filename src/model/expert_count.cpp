#include "src/model/expert_count.hpp"

#include <cmath>
#include <cstring>
#include <map>
#include <numeric>

#include "src/base/error.hpp"
#include "src/base/rng.hpp"
#include "src/model/balance_state.hpp"
#include "src/model/transformer.hpp"

namespace arcus {
namespace {

using Shapes = std::map<std::string, std::vector<std::int64_t>>;

Shapes shapes_of_parameters(ModelConfig model, std::int64_t num_experts,
                            const RoutingConfig& routing,
                            const std::vector<RoutingOverride>& overrides, const LoraConfig& lora) {
  model.num_experts = num_experts;
  ParamRegistry registry(num_experts, 0, num_experts, lora);
  const Transformer transformer(model, routing, overrides, /*micro_batch_tokens=*/1, registry);
  Shapes shapes;
  for (const ParamRow& row : registry.rows()) shapes[row.name] = row.shape;
  return shapes;
}

}  // namespace

std::set<std::string> tensors_by_expert(const ModelConfig& model, const RoutingConfig& routing,
                                        const std::vector<RoutingOverride>& overrides,
                                        const LoraConfig& lora) {
  // A parameter is one of experts where another number of them changes its shape.
  const Shapes here = shapes_of_parameters(model, model.num_experts, routing, overrides, lora);
  const Shapes there = shapes_of_parameters(model, model.num_experts + 1, routing, overrides, lora);
  std::set<std::string> names;
  for (const auto& [name, shape] : here) {
    std::vector<std::int64_t> other = there.at(name);
    if (other == shape) continue;
    --other[0];
    ARCUS_CHECK(other == shape && shape[0] == model.num_experts,
                "the experts of {} are not its first dimension", name);
    names.insert(name);
  }
  for (const StateView& view : BalanceState(model, routing, overrides, {}, 0, 1).state()) {
    names.insert(view.spec.name);
  }
  return names;
}

ExpertMap::ExpertMap(std::int64_t num_before, std::vector<std::int64_t> source)
    : num_before_(num_before), source_(std::move(source)) {
  std::vector<bool> seen(static_cast<std::size_t>(num_before));
  for (const std::int64_t expert : source_) {
    ARCUS_CHECK(expert >= 0 && expert < num_before, "expert {} of {}", expert, num_before);
    further_copy_.push_back(seen[static_cast<std::size_t>(expert)]);
    seen[static_cast<std::size_t>(expert)] = true;
  }
}

ExpertMap ExpertMap::repeated(std::int64_t num_before, std::int64_t num_after) {
  std::vector<std::int64_t> source(static_cast<std::size_t>(num_after));
  std::iota(source.begin(), source.end(), std::int64_t{0});
  for (std::int64_t& expert : source) expert %= num_before;
  return {num_before, std::move(source)};
}

void ExpertMap::gather(std::span<const char> before, std::span<char> after) const {
  const std::size_t bytes = before.size() / static_cast<std::size_t>(num_before_);
  ARCUS_CHECK(before.size() == bytes * static_cast<std::size_t>(num_before_) &&
                  after.size() == bytes * source_.size(),
              "{} bytes of {} experts, {} of {}", before.size(), num_before_, after.size(),
              source_.size());
  for (std::size_t e = 0; e < source_.size(); ++e) {
    std::memcpy(after.data() + e * bytes,
                before.data() + static_cast<std::size_t>(source_[e]) * bytes, bytes);
  }
}

void part_copies(const ExpertMap& experts, const std::string& name, std::uint64_t seed,
                 double noise, std::span<float> weight) {
  const auto cols = static_cast<std::int64_t>(weight.size()) / experts.num_after();
  const Rng rng(seed, "convert", name);
  for (std::int64_t e = 0; e < experts.num_after(); ++e) {
    if (!experts.is_further_copy(e)) continue;
    const std::span<float> row =
        weight.subspan(static_cast<std::size_t>(e * cols), static_cast<std::size_t>(cols));
    double squares = 0;
    for (const float w : row) squares += static_cast<double>(w) * static_cast<double>(w);
    const double scale = noise * std::sqrt(squares / static_cast<double>(cols));
    for (std::int64_t i = 0; i < cols; ++i) {
      float& w = row[static_cast<std::size_t>(i)];
      const double normal = static_cast<double>(
          rng.normal(static_cast<std::uint64_t>(e), static_cast<std::uint64_t>(i)));
      w = static_cast<float>(static_cast<double>(w) + scale * normal);
    }
  }
}

}  // namespace arcus
