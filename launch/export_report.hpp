#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "checkpoints/interop/export_model.hpp"
#include "checkpoints/interop/model_files.hpp"
#include "launch/probe.hpp"

namespace arcus {

/// How the tensors of written files compare with the checkpoint's, number by number.
struct TensorComparison {
  std::int64_t equal = 0;    ///< tensors whose numbers are the checkpoint's, rounded to the type
  std::int64_t added = 0;    ///< tensors of the family that the model lacks: exact no-ops
  std::int64_t shifted = 0;  ///< biases of gates, minus their least number
  std::string not_finite;    ///< the first one that holds a number that is not finite, "" = none
  std::string difference;    ///< the first one that differs, "" = none
};
/// Reads all tensors of `files` once. They belong to `source` as written.
TensorComparison compare_tensors(const ExportSource& source, const ModelFiles& files);

/// What was found when exported files were read back.
struct ExportReport {
  const ExportSource* source = nullptr;
  Target target = Target::hf;
  std::string checkpoint;  ///< path
  std::int64_t step = 0;
  std::string digest;
  std::string text_source;
  TensorComparison tensors;
  ProbeDifference model;
  /// Of a run with adapters: the model as it was trained, beside the merged one that is written.
  std::optional<ProbeDifference> merging;
  std::vector<std::string> notes;

  /// Why the export is not what it should be, "" = it is.
  std::string failure() const;
  std::string summary() const;  ///< one line
  nlohmann::ordered_json json() const;
};

/// README.md of a Hugging Face directory: what the model is, on what and how it was trained, and
/// how the export was checked. `report`: null where it was not.
std::string model_card(const ExportSource& source, const ExportReport* report,
                       const std::string& config_text, const std::string& created_by,
                       std::int64_t step, const std::string& data_description);

}  // namespace arcus
