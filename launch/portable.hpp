#pragma once

#include <memory>
#include <string>

#include "checkpoints/checkpoint.hpp"
#include "checkpoints/interop/export_model.hpp"
#include "launch/run_config.hpp"
#include "src/data/tokenizer.hpp"

namespace arcus {

/// A configuration's model as other programs need to know it.
PortableModel portable_model(const Config& config, const ModelConfig& resolved);

/// The model that a checkpoint holds: its configuration's, with the vocabulary of its embedding.
/// Throws (checkpoint) where there is none.
ModelConfig stored_model(const Checkpoint& checkpoint, const Config& config);

/// One line where no family represents the model, "" where one does.
std::string why_not_exportable(const Config& config, const ModelConfig& resolved);

/// The tokenizer that a checkpoint holds; null where it holds none.
std::unique_ptr<Tokenizer> stored_tokenizer(const CheckpointInfo& info);

/// Reads units of a checkpoint's tensors, each block verified; weights that have adapters (`lora`:
/// the checkpoint's configuration) with these merged into them. `checkpoint` must outlive it. Not
/// for several threads at once.
UnitReader read_from(const Checkpoint& checkpoint, const LoraConfig& lora);

}  // namespace arcus
