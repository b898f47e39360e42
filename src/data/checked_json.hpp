#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

namespace arcus {

/// JSON of a stranger: throws (data) naming `file` for what is no JSON, no UTF-8, repeats a key of
/// an object or is nested deeper than 64 (code that walks it may recurse).
nlohmann::json parse_checked_json(const std::string& file, std::string_view text);

/// The begin of a stranger's text on one line, for messages.
std::string excerpt(std::string_view text, std::size_t most = 60);

/// Members of an object; throw (data) naming file and member for another type, or where it is
/// missing and there is no `otherwise`.
std::string json_text(const std::string& file, const nlohmann::json& object, const char* key);
bool json_flag(const std::string& file, const nlohmann::json& object, const char* key,
               bool otherwise);
/// "" for null and absent ones.
std::string json_text_or_none(const std::string& file, const nlohmann::json& object,
                              const char* key);

}  // namespace arcus
