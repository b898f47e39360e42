#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoints/interop/family.hpp"

namespace arcus {

/// A model as a file of another program describes it.
struct DescribedModel {
  PortableModel model;
  const Family* family = nullptr;
  std::vector<std::string> notes;  ///< what was left out, and why that is right
};

/// config.json of a Hugging Face directory. `dtype`: "float32", "bfloat16" or "float16".
std::string hf_config_text(const PortableModel& model, const Family& family, std::string_view dtype,
                           std::int32_t eos_id);
/// generation_config.json.
std::string hf_generation_config_text(std::int32_t eos_id);

/// Reads config.json. Every key is used, or says what Arcus does anyway, or is known to change
/// nothing; any other throws (data) by name, unless `ignored` holds it. `source` names the file.
DescribedModel read_hf_config(std::string_view text, const std::string& source,
                              const std::set<std::string>& ignored);

/// The model's checks of its own configuration, as a complaint about `source`.
void check_described(const DescribedModel& described, const std::string& source);

}  // namespace arcus
