#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "comm/process_groups.hpp"
#include "kernels/arena.hpp"
#include "kernels/gradient.hpp"
#include "src/base/state.hpp"
#include "src/model/config.hpp"

namespace arcus {

enum class ParamKind { dense, expert };
enum class ParamInit { normal, ones, zeros };

/// Parameters live in flat blocks. Gate, norms and biases keep the accumulate type even where the
/// model computes in bf16. Adapters stand apart: a flat without trained tensors has neither
/// gradient sums nor moments, and is not exchanged after a step.
enum class FlatId : int {
  dense_accumulate,
  dense_compute,
  expert_compute,
  expert_accumulate,
  dense_adapter,
  expert_adapter
};
inline constexpr std::array<FlatId, 6> kFlatIds{FlatId::dense_accumulate, FlatId::dense_compute,
                                                FlatId::expert_compute,   FlatId::expert_accumulate,
                                                FlatId::dense_adapter,    FlatId::expert_adapter};
inline std::size_t index_of(FlatId id) { return static_cast<std::size_t>(id); }
/// Whether a rank holds those of its own experts alone.
inline bool is_by_expert(FlatId id) {
  return id == FlatId::expert_compute || id == FlatId::expert_accumulate ||
         id == FlatId::expert_adapter;
}

/// One logical tensor: size, initial values, decay, gradient group and file name, described once.
struct ParamRow {
  std::string name;
  std::vector<std::int64_t> shape;  ///< experts: [E, ...]
  ParamKind kind = ParamKind::dense;
  bool adapter = false;               ///< lora_A or lora_B
  bool keep_accumulate_type = false;  ///< ..._accumulate instead of ..._compute
  ParamInit init = ParamInit::normal;
  double init_std = 0.02;
  bool follows_previous = false;            ///< no gap before it: one view spans both (q, k, v)
  std::int64_t leaves_per_micro_batch = 1;  ///< most leaves a micro-batch may add
  bool whole_leaves = false;                ///< every leaf covers a whole unit (GradientSum::stale)
  std::int64_t active_units = 1;            ///< units that one token passes through
  // Set from [[train.group]]:
  double lr_scale = 1;
  double weight_decay = 0;
  bool trainable = true;
  // Set by the registry:
  FlatId flat = FlatId::dense_compute;
  std::int64_t first_unit_idx = 0;  ///< registry index of its (first) unit
  std::int64_t offset = 0;          ///< first element in the flat (of local expert 0)
  std::int64_t expert_stride = 0;   ///< elements from one local expert to the next
  std::int64_t expert_offset = 0;   ///< first element inside one expert of its layer
  std::int64_t strides_before = 0;  ///< sum of expert_stride over the layers before, in its flat

  std::int64_t num_units() const { return kind == ParamKind::expert ? shape[0] : 1; }
  TensorSpec spec(DType dtype) const { return {name, dtype, shape, num_units()}; }
  /// Whether one unit has two or more dimensions.
  bool is_matrix() const { return shape.size() >= (kind == ParamKind::expert ? 3U : 2U); }
  /// Last dimension (1 for a vector), and elements of one unit.
  std::int64_t cols() const { return shape.size() < 2 ? 1 : shape.back(); }
  std::int64_t unit_elements() const {
    std::int64_t elements = 1;
    for (const std::int64_t extent : shape) elements *= extent;
    return elements / num_units();
  }
};

/// What a parameter is for, by its name.
enum class ParamPart { router, experts, dense, embeddings, norms, adapters };
inline constexpr std::array<const char*, 6> kParamParts{"router",     "experts", "dense",
                                                        "embeddings", "norms",   "adapters"};
/// router: gates, their noise and predictors, decision layers; experts: those that tokens are
/// routed to; adapters: lora_A and lora_B of whatever weight; dense: everything else, shared
/// experts too.
ParamPart part_of(const ParamRow& row);

/// Position of a row in the registry.
struct ParamRef {
  int idx = -1;
  bool valid() const { return idx >= 0; }
};

/// One block (see block_range) of a unit held on this rank, in memory order of its flat.
struct ParamBlock {
  int row_idx = 0;
  std::int64_t unit = 0;  ///< global expert, 0 for dense
  std::int64_t block_in_unit = 0;
  std::int64_t begin = 0, count = 0;  ///< elements in the flat
};

/// Every parameter of the model, in declaration order. Experts of a layer stand expert by expert
/// (gate, up, down of one expert adjacent).
class ParamRegistry {
 public:
  /// `local` = the experts of this rank. `lora` says which weights get adapters.
  ParamRegistry(std::int64_t num_experts, std::int64_t first_local_expert,
                std::int64_t num_local_experts, LoraConfig lora = {});

  ParamRef add(ParamRow row);
  /// Rows of one layer's experts, all [E, ...] and of one flat; memory is expert by expert.
  std::vector<ParamRef> add_experts(std::vector<ParamRow> rows);

  const LoraConfig& lora() const { return lora_; }
  const std::vector<ParamRow>& rows() const { return rows_; }
  std::vector<ParamRow>& mutable_rows() { return rows_; }
  const ParamRow& row(ParamRef ref) const { return rows_[static_cast<std::size_t>(ref.idx)]; }
  std::int64_t flat_size(FlatId flat) const { return sizes_[index_of(flat)]; }
  /// Elements of a flat by expert on a rank that holds `num_experts` of them.
  std::int64_t expert_flat_size(FlatId flat, std::int64_t num_experts) const {
    return num_experts * expert_strides_[index_of(flat)];
  }
  /// Whether any tensor of a flat is trained.
  bool is_trained(FlatId flat) const;
  std::int64_t num_units() const { return num_units_; }
  /// Name of a unit, e.g. "model.layers.1.mlp.experts.gate_proj.weight[5]".
  std::string unit_name(std::int64_t unit_idx) const;
  /// Blocks of a flat on the rank that holds experts [first, first + count), in memory order.
  std::vector<ParamBlock> blocks(FlatId flat, std::int64_t first_expert,
                                 std::int64_t num_experts) const;
  std::vector<ParamBlock> local_blocks(FlatId flat) const {
    return blocks(flat, first_local_expert_, num_local_experts_);
  }
  std::int64_t first_local_expert() const { return first_local_expert_; }
  std::int64_t num_local_experts() const { return num_local_experts_; }
  /// Registry index of a unit held on this rank: local expert, 0 for dense.
  std::int64_t unit_idx(const ParamRow& row, std::int64_t local_unit) const {
    return row.first_unit_idx +
           (row.kind == ParamKind::expert ? first_local_expert_ + local_unit : 0);
  }
  /// Parameters of the whole model, and those that one token passes through.
  std::int64_t total_parameters() const;
  std::int64_t active_parameters() const;
  std::int64_t trained_parameters() const;

 private:
  std::int64_t num_experts_, first_local_expert_, num_local_experts_;
  LoraConfig lora_;
  std::vector<ParamRow> rows_;
  std::array<std::int64_t, kFlatIds.size()> sizes_{};
  std::int64_t num_units_ = 0;
  std::array<std::int64_t, kFlatIds.size()> expert_strides_{};  ///< of all layers
};

/// Memory of the parameters as the model reads them, and of the sums of their gradients.
class ParamStore {
 public:
  /// `sum_dtype`: i64 (reproducible), f32 or f64; no sums when not training.
  ParamStore(const ParamRegistry& registry, DType compute, DType sum_dtype, bool training);

  DType compute_dtype() const { return compute_; }
  DType dtype(FlatId flat) const {
    const bool keep = flat == FlatId::dense_accumulate || flat == FlatId::expert_accumulate;
    return keep ? accumulate_dtype(compute_) : compute_;
  }
  DType sum_dtype() const { return sum_dtype_; }
  const ParamRegistry& registry() const { return *registry_; }
  /// All values of a flat, [1, n].
  TensorView flat_values(FlatId flat) const { return value_views_[index_of(flat)]; }
  /// Empty where nothing of the flat is trained.
  TensorView flat_sums(FlatId flat) const { return sum_views_[index_of(flat)]; }
  /// The (local expert's) tensor as [rows, cols]; `rows` > 0 asks for a view that spans following
  /// rows as well. Empty for a tensor that is not there.
  TensorView values(ParamRef ref, std::int64_t local_expert = 0, std::int64_t rows = 0) const;
  /// Where leaves of the tensor go; sum == nullptr for one that is frozen or not there.
  GradientSum sums(ParamRef ref, std::int64_t local_expert = 0) const;
  /// Limits of |leaf| for a step of `num_micro_batches`.
  void set_num_micro_batches(std::int64_t num_micro_batches);
  /// The start of a step: no leaf is bad, and sums are zero, or stale where leaves are whole units:
  /// their first one is stored.
  void start_sums(Stream& stream);
  /// After a step's last leaf: units that got none become zero, so that all sums can be read.
  void complete_sums(Stream& stream);
  BadLeafFlag& bad_leaf() const { return *bad_leaf_; }
  std::int64_t value_bytes() const;
  std::int64_t sum_bytes() const;

 private:
  /// The mark of a unit whose leaves are whole.
  std::uint8_t& stale(const ParamRow& row, std::int64_t local_unit) const;
  TensorView unit_sums(const ParamRow& row, std::int64_t local_unit) const;
  /// Calls fn(row, local unit) for every unit of a trainable tensor on this rank.
  template <class Fn>
  void for_each_trained_unit(Fn&& fn) const;

  const ParamRegistry* registry_;
  DType compute_, sum_dtype_;
  bool training_;
  std::unique_ptr<std::uint8_t[]> stale_;  ///< by registry index of the unit
  bool sums_are_new_ = true;               ///< and therefore zero
  std::int64_t num_micro_batches_ = 1;
  std::vector<Arena> values_, sums_;
  std::array<TensorView, kFlatIds.size()> value_views_, sum_views_;
  std::unique_ptr<BadLeafFlag> bad_leaf_;
};

/// Writes the seed's initial values of one block of `row` to `out`, [1, block.count] of a compute
/// type. They are addressed by name and element of the logical tensor, not by place or rank.
void initial_values(Stream& stream, const ParamRow& row, std::uint64_t seed,
                    const ParamBlock& block, TensorView out);

}  // namespace arcus
