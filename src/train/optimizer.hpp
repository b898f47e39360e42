#pragma once

#include <array>
#include <memory>
#include <vector>

#include "src/train/model_instance.hpp"

namespace arcus {

/// AdamW with state sharded by whole rows (ZeRO-1): this rank keeps master weights, m and v of the
/// blocks it owns. In runs without bf16 the parameters are their own master.
class Optimizer {
 public:
  Optimizer(ModelInstance& instance, const TrainConfig& config);

  /// Sums of all ranks to their owners. Collective.
  void reduce_gradients();
  /// The norm over all parameters: blocks added in registry order, dense once, each expert once.
  /// Of what reduce_gradients left. Collective; the same bits on every rank.
  double gradient_norm();
  /// One update of the owned blocks, then every rank's part to all. `update` counts applied
  /// updates, this one included (bias correction). Collective.
  void apply(double lr, double clip_factor, std::int64_t update);
  /// Master weights from the parameters (after initialisation).
  void adopt_parameters();
  /// Parameters from the master weights (after loading a checkpoint). Collective.
  void publish_parameters();
  /// Master weights under the parameters' names, then optimizer/m/NAME and optimizer/v/NAME.
  std::vector<StateView> state();
  std::int64_t bytes() const;

 private:
  struct Flat {
    FlatId id;
    std::int64_t begin = 0, count = 0;  ///< elements owned by this rank
    TensorView master, m, v;            ///< [1, count]; no m, v where nothing is trained
    std::vector<ElementRange> blocks;   ///< owned ones, from `begin` on
    std::vector<std::unique_ptr<Arena>> memory;
  };
  struct NormBlock {
    std::int64_t unit_idx, block;
    std::int64_t position;  ///< in the gathered array
  };
  void plan_norm();
  TensorView compute_part(const Flat& flat, std::int64_t begin, std::int64_t count);
  template <class Fn>
  void for_each_run(const Flat& flat, Fn&& fn) const;
  void append_state(const std::string& prefix, TensorView Flat::*member,
                    std::vector<StateView>& views);

  ModelInstance* instance_;
  TrainConfig config_;
  std::array<Flat, kFlatIds.size()> flats_;
  std::vector<NormBlock> norm_order_;
  std::vector<double> norm_parts_;
  std::vector<std::int64_t> norm_counts_, norm_offsets_;
};

}  // namespace arcus
