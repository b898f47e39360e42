#pragma once

#include <cstdint>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "src/model/config.hpp"

namespace arcus {

/// Names of the parameters and of the balancing state that hold something for every expert, stacked
/// along their first dimension [E, ...].
std::set<std::string> tensors_by_expert(const ModelConfig& model, const RoutingConfig& routing,
                                        const std::vector<RoutingOverride>& overrides,
                                        const LoraConfig& lora);

/// The experts of a model with another number of them: which old one each new one is a copy of.
class ExpertMap {
 public:
  /// `source[e]`: the old number of new expert e; each in [0, num_before).
  ExpertMap(std::int64_t num_before, std::vector<std::int64_t> source);
  /// Old expert e mod num_before for new expert e.
  static ExpertMap repeated(std::int64_t num_before, std::int64_t num_after);

  std::int64_t num_before() const { return num_before_; }
  std::int64_t num_after() const { return static_cast<std::int64_t>(source_.size()); }
  /// Another new expert of a lower number is a copy of the same old one.
  bool is_further_copy(std::int64_t expert) const {
    return further_copy_[static_cast<std::size_t>(expert)];
  }
  /// before: [E before, ...] as bytes; after: [E after, ...].
  void gather(std::span<const char> before, std::span<char> after) const;

 private:
  std::int64_t num_before_;
  std::vector<std::int64_t> source_;
  std::vector<bool> further_copy_;
};

/// Adds noise to the rows of further copies in a gate's weight [E, H], so that their scores part:
/// a normal number times `noise` times the row's root mean square, addressed by (seed, name).
void part_copies(const ExpertMap& experts, const std::string& name, std::uint64_t seed,
                 double noise, std::span<float> weight);

}  // namespace arcus
