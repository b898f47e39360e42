#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "checkpoints/checkpoint.hpp"

namespace arcus {

/// A summary for people: where from, totals, one line per tensor.
std::string describe_text(const Checkpoint& checkpoint);
/// The same for programs; per tensor also the hash of each unit (expert), and per extra entry its
/// text, or its size where it is binary or long.
nlohmann::json describe_json(const Checkpoint& checkpoint);

/// The digest of the checkpoint at `path`; with `verify` all data is read and compared first.
std::uint64_t checkpoint_digest(const std::filesystem::path& path, bool verify = false);

}  // namespace arcus
