#include "launch/export_report.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "launch/version.hpp"
#include "src/base/error.hpp"

namespace arcus {
namespace {

/// Mean |difference| of token losses that rounding weights to a type may make.
double allowed_loss_difference(FileType type) {
  return type == FileType::f16 ? 3e-3 : type == FileType::bf16 ? 3e-2 : 0;
}

float rounded(FileType type, float value) {
  if (type == FileType::f16) return float_from_f16(f16_from_float(value));
  return type == FileType::bf16 ? static_cast<float>(bf16(value)) : value;
}

/// Logits of one model before and after its adapters are merged differ by rounding, by so much.
constexpr double kMergingRounds = 1e-4;
/// Two experts whose scores are that close are rare.
constexpr double kMergingMoves = 1e-2;

std::string failure_of_merging(const ProbeDifference& d) {
  if (!(d.max_settled_logit <= kMergingRounds)) {
    return fmt::format(
        "merging the adapters changes logits by up to {:.3g}, more than the {:.3g} "
        "that rounding explains",
        d.max_settled_logit, kMergingRounds);
  }
  if (static_cast<double>(d.moved) > kMergingMoves * static_cast<double>(d.choices)) {
    return fmt::format("merging the adapters moves {} of {} choices of experts", d.moved,
                       d.choices);
  }
  return {};
}

nlohmann::ordered_json json_of_merging(const ProbeDifference& d) {
  return {{"max_abs_logit_difference", d.max_logit},
          {"max_abs_logit_difference_before_a_moved_choice", d.max_settled_logit},
          {"mean_abs_token_loss_difference", d.mean_token_loss},
          {"expert_choices", d.choices},
          {"expert_choices_moved", d.moved}};
}

bool same_bits(float a, float b) {
  return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
}

/// Units of the model's tensors by how they are written: all that the plan names, once.
struct WrittenUnit {
  FileType type = FileType::f32;
  bool shift = false;
};
std::map<ModelUnit, WrittenUnit> written_units(const ExportSource& source) {
  std::map<ModelUnit, WrittenUnit> units;
  const auto plan = hf_tensors(source.model, *source.family, written_spelling(*source.family));
  for (const PlannedTensor& planned : plan) {
    for (const ModelUnit& unit : planned.pieces) {
      units[unit] = {planned.always_f32 ? FileType::f32 : source.type, planned.shift_to_zero};
    }
  }
  return units;
}

class TensorComparer {
 public:
  TensorComparer(const ExportSource& source, const ModelFiles& files)
      : source_(source), files_(files), written_(written_units(source)) {
    for (const TensorSpec& spec : portable_tensors(source.model)) own_.emplace(spec.name, spec);
  }

  TensorComparison run() {
    for (const TensorSpec& spec : files_.tensors()) {
      seen_.insert(spec.name);
      if (own_.contains(spec.name)) {
        compare_own(spec);
      } else {
        compare_added(spec);
      }
    }
    for (const auto& [name, spec] : own_) {
      if (!seen_.contains(name)) differs(name, "is not in the files");
    }
    return result_;
  }

 private:
  static std::size_t unit_size(const TensorSpec& spec) {
    return static_cast<std::size_t>(spec.num_elements() / spec.num_units);
  }

  void compare_own(const TensorSpec& spec) {
    std::vector<float> before(unit_size(spec)), after(before);
    if (own_.at(spec.name).shape != spec.shape) return differs(spec.name, "has another shape");
    bool shifted = false;
    for (std::int64_t unit = 0; unit < spec.num_units; ++unit) {
      const WrittenUnit how = written_.at({spec.name, unit});
      source_.read({spec.name, unit}, before);
      files_.read({spec.name, unit}, after);
      if (!all_finite(before) && result_.not_finite.empty()) result_.not_finite = spec.name;
      const float least = *std::ranges::min_element(before);
      if (how.shift && least < 0) {
        shifted = true;
        for (float& value : before) value -= least;
      }
      for (std::size_t i = 0; i < before.size(); ++i) {
        if (same_bits(rounded(how.type, before[i]), after[i])) continue;
        return differs(fmt::format("{}[{}]", spec.name, unit),
                       fmt::format("element {} is {} instead of {}", i, after[i],
                                   rounded(how.type, before[i])));
      }
    }
    ++(shifted ? result_.shifted : result_.equal);
  }

  /// Zeros, or the embedding again where a tied model's head has to be written.
  void compare_added(const TensorSpec& spec) {
    const bool head = spec.name == "lm_head.weight" && source_.model.model.tie_embeddings;
    std::vector<float> before(unit_size(spec)), after(before);
    for (std::int64_t unit = 0; unit < spec.num_units; ++unit) {
      files_.read({spec.name, unit}, after);
      if (head) {
        source_.read({"model.embed_tokens.weight", 0}, before);
        for (float& value : before) value = rounded(source_.type, value);
      }
      if (!std::ranges::equal(before, after, same_bits)) {
        return differs(spec.name, "was added and is no no-op");
      }
    }
    ++result_.added;
  }

  void differs(const std::string& name, const std::string& how) {
    if (result_.difference.empty()) result_.difference = fmt::format("{} {}", name, how);
  }

  const ExportSource& source_;
  const ModelFiles& files_;
  std::map<ModelUnit, WrittenUnit> written_;
  std::map<std::string, TensorSpec> own_;
  std::set<std::string> seen_;
  TensorComparison result_;
};

std::string card_table(const ExportSource& source) {
  const ModelConfig& m = source.model.model;
  const RoutingConfig& r = source.model.routing;
  std::string text = "| | |\n|---|---|\n";
  const auto row = [&](const char* what, const std::string& value) {
    text += fmt::format("| {} | {} |\n", what, value);
  };
  row("family", std::string(source.family->name));
  row("layers", fmt::format("{} ({} dense)", m.num_layers, m.first_k_dense));
  row("hidden size", fmt::format("{}", m.hidden_size));
  row("heads", fmt::format("{}, {} for keys and values, of {} dimensions", m.num_heads,
                           m.num_kv_heads, m.head_dim));
  row("experts", fmt::format("{} of {} per token, {} wide, {} shared", m.topk, m.num_experts,
                             m.expert_ff_size, m.num_shared_experts));
  row("gate",
      fmt::format("{}, weights {}", r.score, r.renormalize ? "renormalized" : "as they are"));
  row("vocabulary", fmt::format("{}", m.vocab_size));
  row("numbers", fmt::format("{}; gate, norms and biases f32", name_of(source.type)));
  return text;
}

}  // namespace

TensorComparison compare_tensors(const ExportSource& source, const ModelFiles& files) {
  return TensorComparer(source, files).run();
}

std::string ExportReport::failure() const {
  if (!tensors.difference.empty()) return tensors.difference;
  if (merging) {
    const std::string reason = failure_of_merging(*merging);
    if (!reason.empty()) return reason;
  }
  const double allowed = allowed_loss_difference(source->type);
  if (source->type == FileType::f32) {
    if (tensors.shifted == 0 && !model.logits_equal) {
      return fmt::format("logits differ by up to {:.3g} though all tensors are equal",
                         model.max_logit);
    }
    return {};
  }
  if (!(model.mean_token_loss <= allowed)) {
    return fmt::format("rounding to {} changes a token's loss by {:.3g} in the mean, more than {}",
                       name_of(source->type), model.mean_token_loss, allowed);
  }
  return {};
}

std::string ExportReport::summary() const {
  std::string text = fmt::format("{} tensors equal", tensors.equal);
  if (tensors.shifted > 0) text += fmt::format(", {} gate biases shifted", tensors.shifted);
  if (tensors.added > 0) text += fmt::format(", {} added that change nothing", tensors.added);
  text += model.logits_equal ? ", logits bit-equal"
                             : fmt::format(", logits within {:.2g} (std {:.2g})", model.max_logit,
                                           model.logit_std);
  if (!model.logits_equal) {
    text += fmt::format(", a token's loss within {:.2g} in the mean", model.mean_token_loss);
    text += fmt::format(", {} of {} choices of experts moved", model.moved, model.choices);
  }
  if (merging) {
    text += fmt::format(", adapters merged: logits within {:.2g} of the unmerged model's",
                        merging->max_settled_logit);
    if (merging->moved > 0) {
      text += fmt::format(" up to where a choice of experts moved ({} of {} did)", merging->moved,
                          merging->choices);
    }
  }
  return text + fmt::format(", {} tokens", model.tokens);
}

nlohmann::ordered_json ExportReport::json() const {
  return {{"family", source->family->name},
          {"target", target == Target::hf ? "hf" : "gguf"},
          {"dtype", name_of(source->type)},
          {"checkpoint", checkpoint},
          {"step", step},
          {"digest", digest},
          {"text", text_source},
          {"tokens", model.tokens},
          {"tensors_equal", tensors.equal},
          {"tensors_added_as_no_ops", tensors.added},
          {"gate_biases_shifted", tensors.shifted},
          {"logits_bit_equal", model.logits_equal},
          {"max_abs_logit_difference", model.max_logit},
          {"logit_std", model.logit_std},
          {"mean_abs_token_loss_difference", model.mean_token_loss},
          {"loss_checkpoint", model.loss_before},
          {"loss_export", model.loss_after},
          {"perplexity_checkpoint", std::exp(model.loss_before)},
          {"perplexity_export", std::exp(model.loss_after)},
          {"expert_choices", model.choices},
          {"expert_choices_moved", model.moved},
          {"merging_adapters", merging ? json_of_merging(*merging) : nullptr},
          {"notes", notes},
          {"written_by", "arcus " + version_line()}};
}

std::string model_card(const ExportSource& source, const ExportReport* report,
                       const std::string& config_text, const std::string& created_by,
                       std::int64_t step, const std::string& data_description) {
  std::string text = fmt::format("# {}\n\n", source.name);
  text += "A mixture-of-experts language model trained with Arcus.\n\n" + card_table(source);
  text += fmt::format("\n## Training\n\n{} steps, saved by {}. {}\n", step, created_by,
                      data_description);
  text += "\n## Verification\n\n";
  if (report == nullptr) {
    text += "The files were not read back (`--no-verify`).\n";
  } else {
    text += fmt::format(
        "The written files were read back and compared with the checkpoint (digest {}) on {}: {}. "
        "Perplexity of the checkpoint {:.6g}, of the files {:.6g}.\n",
        report->digest, report->text_source, report->summary(), std::exp(report->model.loss_before),
        std::exp(report->model.loss_after));
    for (const std::string& note : report->notes) text += "- " + note + "\n";
  }
  text +=
      "\nUpstream's converter to GGUF knows no newly trained vocabulary; `arcus export --to gguf` "
      "writes the GGUF file.\n";
  return text + "\n## Configuration\n\n```toml\n" + config_text + "```\n";
}

}  // namespace arcus
