#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "checkpoints/checkpoint.hpp"
#include "src/model/config.hpp"

namespace arcus {

/// The low-rank adapters that a checkpoint holds for one of its weights. The checkpoint must
/// outlive them.
class StoredAdapters {
 public:
  /// Nothing where the weight has none; throws (checkpoint) where they do not fit it.
  static std::optional<StoredAdapters> find(const Checkpoint& checkpoint, const LoraConfig& lora,
                                            const TensorSpec& weight);
  /// w [out, in], which holds a unit of the weight, becomes W + scale B A (merge_lora).
  void merge(TensorReader& reader, std::int64_t unit, std::span<float> w) const;

 private:
  StoredAdapters(const StoredTensor& a, const StoredTensor& b, double scale)
      : a_(&a), b_(&b), scale_(scale) {}

  const StoredTensor *a_, *b_;  ///< units [r, in] and [out, r]
  double scale_;
};

}  // namespace arcus
