#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "checkpoints/interop/family.hpp"
#include "src/base/state.hpp"

namespace arcus {

/// One expert's part of a tensor of the model, or the whole of one that has no experts.
struct ModelUnit {
  std::string tensor;
  std::int64_t unit = 0;
  auto operator<=>(const ModelUnit&) const = default;
};

/// Gives the fp32 numbers of one unit of the model's tensors.
using UnitReader = std::function<void(const ModelUnit& unit, std::span<float> out)>;
/// Fills all slices, which are whole units of fp32.
void fill_units(const StateView& view, const UnitReader& read);

/// A tensor of a file and where its numbers stand in the model: whole units, one after the other.
struct PlannedTensor {
  std::string name;
  std::vector<std::int64_t> shape;
  std::vector<ModelUnit> pieces;  ///< empty: `constants`, or zeros, which change nothing
  std::vector<float> constants;   ///< what follows from the configuration
  bool always_f32 = false;        ///< whatever the type of the others
  /// > 0: rows of each head of so many dimensions stand in pairs (GGUF's arch llama) instead of
  /// half after half.
  std::int64_t paired_head_dim = 0;
  bool transposed = false;     ///< the file has [in, out]
  bool may_be_absent = false;  ///< from a file: its units are zeros then
  bool shift_to_zero =
      false;  ///< to a file: minus its least number (the choice of experts is the same)

  std::int64_t num_elements() const;
};

/// How a directory spells what there is more than one spelling for.
struct HfSpelling {
  std::string prefix = "model.";
  std::string moe_folder;        ///< "mlp." or "block_sparse_moe.", of a layer
  bool fused_experts = false;    ///< one tensor for all experts of a layer
  bool mixtral_experts = false;  ///< w1, w3, w2
};
/// The spelling that is written.
HfSpelling written_spelling(const Family& family);

/// All tensors of the model as other programs need them, fp32, in the order of a forward pass.
std::vector<TensorSpec> portable_tensors(const PortableModel& model);

std::vector<PlannedTensor> hf_tensors(const PortableModel& model, const Family& family,
                                      const HfSpelling& spelling);
std::vector<PlannedTensor> gguf_tensors(const PortableModel& model, const Family& family);

/// Rows of [rows, cols] between the two orders, in place of each head: half after half -> pairs
/// (new row 2i = old row i, new row 2i + 1 = old row i + head_dim / 2), and back.
void pair_rows(std::int64_t head_dim, std::int64_t cols, std::vector<float>& values);
void unpair_rows(std::int64_t head_dim, std::int64_t cols, std::vector<float>& values);

}  // namespace arcus
