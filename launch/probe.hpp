#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "launch/run_config.hpp"
#include "launch/session.hpp"
#include "src/train/model_instance.hpp"

namespace arcus {

/// Texts on which two models are compared.
struct ProbeTexts {
  std::vector<std::vector<std::int32_t>> ids;
  std::string source;  ///< where they are from, for people
  std::int64_t num_tokens() const;
  std::int64_t longest() const;  ///< tokens of the longest text
};
/// Held-out text of the data set `data`, a part of every domain; where `data` is "" or is not
/// there, seeded random ids. Few enough tokens that their logits fit into memory. Every rank gets
/// the same.
ProbeTexts choose_probe_texts(Session& session, const std::string& data, const Config& config,
                              std::int64_t vocab_size);

/// What a model makes of them; filled on rank 0.
struct ProbeResult {
  std::int64_t vocab_size = 0;     ///< V
  std::vector<float> logits;       ///< [tokens, V]
  std::vector<bool> begins_text;   ///< by token
  std::vector<double> token_loss;  ///< of each token that has a next one
  std::vector<std::int32_t> topk;  ///< the experts of every token of every layer, ascending
  std::int64_t slots = 0;          ///< of them per token and layer
  std::vector<std::size_t> token_of_choice;  ///< whose each `slots` of topk are
  double mean_loss() const;
};
/// `instance` as evaluate_logits takes it. Collective.
ProbeResult probe(ModelInstance& instance, const ProbeTexts& texts);

struct ProbeDifference {
  std::int64_t tokens = 0;
  bool logits_equal = false;  ///< every bit
  double max_logit = 0;       ///< largest |difference|
  /// Of tokens whose own choices of experts, and those of all before them in their text, are the
  /// same: what rounding alone explains.
  double max_settled_logit = 0;
  double logit_std = 0;        ///< of the first model's logits
  double mean_token_loss = 0;  ///< mean |difference|
  double loss_before = 0, loss_after = 0;
  std::int64_t moved = 0;  ///< choices of experts (token, layer) that differ
  std::int64_t choices = 0;
};
ProbeDifference compare(const ProbeResult& before, const ProbeResult& after);

/// A model in evaluation form for `probe`, its parameters not yet read.
InstanceOptions probe_options(const ModelConfig& model, const RoutingConfig& routing,
                              const std::vector<RoutingOverride>& overrides, std::int64_t seq_len);

}  // namespace arcus
