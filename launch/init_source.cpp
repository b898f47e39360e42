#include "launch/init_source.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <set>
#include <string_view>

#include "launch/option_table.hpp"
#include "src/base/error.hpp"
#include "src/base/hash.hpp"
#include "src/model/lora.hpp"

namespace arcus {
namespace {

constexpr std::string_view kExpertBias = ".e_score_correction_bias";

/// Keys of [routing] that change how a model is trained, or at most who is dropped; all others
/// decide what it computes.
const std::set<std::string_view> kOfTraining = {"capacity_factor",
                                                "min_capacity",
                                                "eval_capacity_factor",
                                                "drop_policy",
                                                "pad_to_capacity",
                                                "renormalize_after_drop",
                                                "aux_loss",
                                                "aux_scope",
                                                "aux_loss_sequence",
                                                "aux_loss_global",
                                                "z_loss",
                                                "importance_loss",
                                                "load_loss",
                                                "expert_bias_rate",
                                                "center_bias",
                                                "quantile_rate",
                                                "jitter",
                                                "noise",
                                                "sinkhorn_iterations",
                                                "allow_future_leak",
                                                "stream_target_share",
                                                "stream_target_loss"};

std::vector<std::regex> compile(const std::vector<std::string>& fresh) {
  std::vector<std::regex> patterns;
  for (const std::string& text : fresh) {
    try {
      patterns.emplace_back(text, std::regex::ECMAScript);
    } catch (const std::regex_error& error) {
      ARCUS_FAIL(ExitCode::usage,
                 "--fresh {}: no regular expression: {}; a plain part of the name such as "
                 "\"mlp.gate\" will do",
                 text, error.what());
    }
  }
  return patterns;
}

bool matches(const std::vector<std::regex>& patterns, const std::string& name) {
  return std::any_of(patterns.begin(), patterns.end(),
                     [&](const std::regex& pattern) { return std::regex_search(name, pattern); });
}

/// One line for each key that differs, once.
class Differences {
 public:
  void compare(const char* section, const Option& option, const void* here, const void* there,
               const std::string& remark = "") {
    const Value own = option.get(here);
    const Value stored = option.get(there);
    if (own == stored || !keys_.insert(section + option.name).second) return;
    text_ += fmt::format("\n  {}.{} = {}, the checkpoint's is {}{}", section, option.name,
                         to_toml_text(option, own), to_toml_text(option, stored), remark);
  }
  const std::string& text() const { return text_; }

 private:
  std::set<std::string> keys_;
  std::string text_;
};

bool every_gate_is_fresh(const ModelConfig& model, const std::vector<std::string>& fresh) {
  const std::vector<std::regex> patterns = compile(fresh);
  for (std::int64_t l = model.first_k_dense; l < model.num_layers; ++l) {
    if (!matches(patterns, fmt::format("model.layers.{}.mlp.gate.weight", l))) return false;
  }
  return true;
}

void compare_models(const Config& config, const Config& stored, bool fresh_gate,
                    Differences& differences) {
  // As they are used: 0 and what it stands for are the same.
  const ModelConfig here = resolve(config.model, stored.model.vocab_size);
  const ModelConfig there = resolve(stored.model, stored.model.vocab_size);
  for (const Option& option : find_section("model")->options) {
    if (option.name == "topk") continue;  // a layer's own, below
    differences.compare("model", option, &here, &there);
  }
  if (fresh_gate) return;
  const Option& topk = *find_section("model")->find("topk");
  const auto overrides_here = resolve_overrides(config);
  const auto overrides_there = resolve_overrides(stored);
  for (std::int64_t l = there.first_k_dense; l < there.num_layers; ++l) {
    const LayerRouting own = routing_of_layer(here, config.routing, overrides_here, l);
    const LayerRouting other = routing_of_layer(there, stored.routing, overrides_there, l);
    const std::string remark = fmt::format(" (layer {})", l);
    ModelConfig own_model = here, other_model = there;
    own_model.topk = own.topk;
    other_model.topk = other.topk;
    differences.compare("model", topk, &own_model, &other_model, remark);
    for (const Option& option : find_section("routing")->options) {
      if (kOfTraining.contains(option.name)) continue;
      differences.compare("routing", option, &own.routing, &other.routing, remark);
    }
  }
}

}  // namespace

Config load_config_on(const std::filesystem::path& file, const std::vector<std::string>& sets,
                      const Config& stored, const std::filesystem::path& path,
                      const std::vector<std::string>& fresh) {
  Config base;
  // What 0 stands for must not change with the keys that the file sets.
  base.model = resolve(stored.model, stored.model.vocab_size);
  base.routing = stored.routing;
  base.routing_overrides = stored.routing_overrides;
  base.lora = stored.lora;
  Config config = load_config(file, sets, base);
  // "auto" would be the data's, which may use fewer ids than the model has.
  if (config.model.vocab_size == 0) config.model.vocab_size = stored.model.vocab_size;
  Differences differences;
  compare_models(config, stored, every_gate_is_fresh(stored.model, fresh), differences);
  if (stored.lora.active()) {
    for (const Option& option : find_section("train.lora")->options) {
      differences.compare("train.lora", option, &config.lora, &stored.lora);
    }
  }
  ARCUS_REQUIRE(
      differences.text().empty(), ExitCode::usage,
      "{} makes another model than {} holds:{}\nleave these keys out, they come from the "
      "checkpoint ({})",
      file.string(), path.string(), differences.text(),
      stored.lora.active()
          ? "`arcus merge` writes a checkpoint without adapters"
          : "--fresh 'mlp\\.gate' starts new gates, of which [routing] and topk are free");
  return config;
}

InitSource::InitSource(const InitRequest& request)
    : request_(request),
      fresh_(compile(request.fresh)),
      checkpoint_(open_checkpoint(locate_checkpoint(request.path))) {}

std::string InitSource::origin() const {
  return fmt::format("{} (step {}, digest {})", checkpoint_.path.string(), checkpoint_.info.step,
                     hex(checkpoint_.digest()));
}

bool InitSource::is_fresh(const std::string& name) const { return matches(fresh_, name); }

InitSource::Choice InitSource::choose(const std::vector<StateView>& state) const {
  Choice choice;
  std::vector<std::string> missing, different;
  for (const StateView& view : state) {
    const std::string& name = view.spec.name;
    // What only training needs has a folder before its name.
    if (name.find('/') != std::string::npos) continue;
    if (is_fresh(name)) {
      choice.fresh.push_back(name);
      continue;
    }
    const StoredTensor* stored = checkpoint_.find(name);
    if (stored == nullptr) {
      if (name.ends_with(kExpertBias)) continue;  // starts at 0
      (lora_base_name(name) ? choice.added : missing).push_back(name);
      continue;
    }
    if (stored->spec.dtype != view.spec.dtype || stored->spec.shape != view.spec.shape) {
      different.push_back(fmt::format("{} ([{}] there, [{}] here)", name,
                                      fmt::join(stored->spec.shape, ", "),
                                      fmt::join(view.spec.shape, ", ")));
    }
    choice.read.push_back(view);
  }
  ARCUS_REQUIRE(missing.empty() && different.empty(), ExitCode::checkpoint,
                "{} does not fit the model{}{}; --fresh REGEX leaves tensors at their initial "
                "values",
                checkpoint_.path.string(),
                missing.empty() ? "" : "; it lacks " + list_names(missing),
                different.empty() ? "" : "; of another shape: " + list_names(different));
  require_used(state, choice);
  require_fresh_found(choice);
  return choice;
}

void InitSource::require_used(const std::vector<StateView>& state, Choice& choice) const {
  std::set<std::string_view> known;
  for (const StateView& view : state) known.insert(view.spec.name);
  std::vector<std::string> unused;
  bool adapters = false;
  for (const StoredTensor& tensor : checkpoint_.tensors) {
    const std::string& name = tensor.spec.name;
    if (name.find('/') != std::string::npos || known.contains(name)) continue;
    if (is_fresh(name)) {
      choice.left_out.push_back(name);
    } else if (name.ends_with(kExpertBias)) {
      choice.bias_left_out = true;
    } else {
      adapters = adapters || lora_base_name(name).has_value();
      unused.push_back(name);
    }
  }
  ARCUS_REQUIRE(unused.empty(), ExitCode::checkpoint,
                "{} holds {}, for which the model has no use; {}", checkpoint_.path.string(),
                list_names(unused),
                adapters ? "`arcus merge` adds adapters to their weights"
                         : "--fresh REGEX leaves tensors out");
}

void InitSource::require_fresh_found(const Choice& choice) const {
  for (std::size_t i = 0; i < fresh_.size(); ++i) {
    const auto found = [&](const std::vector<std::string>& names) {
      return std::any_of(names.begin(), names.end(), [&](const std::string& name) {
        return std::regex_search(name, fresh_[i]);
      });
    };
    ARCUS_REQUIRE(found(choice.fresh) || found(choice.left_out), ExitCode::usage,
                  "--fresh {} is found in no tensor's name; names are such as {}",
                  request_.fresh[i], checkpoint_.tensors.front().spec.name);
  }
}

bool holds_weights_alone(const Checkpoint& checkpoint) {
  return checkpoint.find("counters/steps_done") == nullptr;
}

}  // namespace arcus
