#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "src/model/config.hpp"

namespace arcus {

/// What other programs need to know of a model to compute what it computes.
struct PortableModel {
  ModelConfig model;      ///< resolved
  RoutingConfig routing;  ///< of every MoE layer that no override names
  std::vector<RoutingOverride> overrides;
  std::int64_t context_length = 0;  ///< longest text that it was trained on, in tokens
};

/// How a family spells the tensors of a Hugging Face directory.
enum class Spelling { llama, mixtral, bailing, gpt2 };

/// Files of which program.
enum class Target { hf, gguf };
Target target_from_name(std::string_view name);

/// A kind of model that other programs know, as Hugging Face and GGUF call it.
struct Family {
  std::string_view name;      ///< model_type of config.json
  std::string_view hf_class;  ///< architectures
  std::string_view gguf_arch;
  Spelling spelling = Spelling::llama;
  bool exported = false;         ///< else read only
  bool experts = true;           ///< false: all layers are dense
  std::string_view shared;       ///< how the shared expert is called, "" = the family has none
  bool shared_gate = false;      ///< the shared expert has a gate, always
  bool expert_bias = false;      ///< e_score_correction_bias, always
  std::string_view qk_norm;      ///< "none", "head", "full", or "any" of the first two
  bool qkv_bias = false;         ///< biases of q, k and v: may be, as config.json says
  bool always_qkv_bias = false;  ///< older readers expect them: zeros where there are none
};

std::span<const Family> families();
/// Throws (usage) listing the families that are exported.
const Family& find_exported_family(std::string_view name);

/// A key of the configuration that a family cannot represent.
struct Misfit {
  std::string key;     ///< "routing.renormalize"
  std::string value;   ///< as it is
  std::string wanted;  ///< what to train with instead; "" = nothing would do
};
/// All that stands in the way of writing `model` as `family`; empty: it is represented exactly.
std::vector<Misfit> misfits(const PortableModel& model, const Family& family, Target target);
/// "routing.renormalize = false (train with true), ..."
std::string describe(std::span<const Misfit> misfits);

/// The family that represents the model exactly, the most specific first. Throws (usage) naming the
/// keys that stand in the way and what to train with instead.
const Family& choose_family(const PortableModel& model, Target target);
/// `name`, which must represent the model; "auto": choose_family.
const Family& choose_family(const PortableModel& model, Target target, std::string_view name);

/// What a user of the exported files should know though nothing is wrong: sizes that quantisation
/// does not like, settings that other programs do not have.
std::vector<std::string> export_notes(const PortableModel& model, const Family& family,
                                      Target target);

/// Whether the gate's choice has a bias (expert_bias_rate, quantile_rate).
bool has_expert_bias(const RoutingConfig& routing);
/// Whether an exact no-op has to stand where the family always has a shared expert.
bool needs_empty_shared_expert(const PortableModel& model, const Family& family);

}  // namespace arcus
