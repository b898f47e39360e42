#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

namespace arcus {

/// A JSON object from another program's file. Throws (data), naming `source`, for text that is no
/// JSON object, that repeats a key, or that nests deeper than any file of these formats.
nlohmann::json parse_json_object(std::string_view text, const std::string& source);

}  // namespace arcus
