#pragma once

#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "checkpoints/interop/gguf.hpp"
#include "checkpoints/interop/hf_config.hpp"

namespace arcus {

using GgufKeys = std::vector<std::pair<std::string, GgufValue>>;

/// The keys of a GGUF file that say what the model is, without its tokenizer. `file_type`: the type
/// of most tensors.
GgufKeys gguf_model_keys(const PortableModel& model, const Family& family, FileType file_type,
                         std::string_view name);

/// Reads them. As read_hf_config: a key of the architecture that is unknown throws (data) by name,
/// unless `ignored` holds it.
DescribedModel read_gguf_config(const GgufFile& file, const std::set<std::string>& ignored);

}  // namespace arcus
