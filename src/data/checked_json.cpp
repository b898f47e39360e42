#include "src/data/checked_json.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <unordered_set>
#include <vector>

#include "src/base/error.hpp"

namespace arcus {
namespace {

using nlohmann::json;
constexpr int kDeepest = 64;

/// Deepest nesting of brackets outside of strings; exact for valid JSON.
int nesting_of(std::string_view text) {
  int depth = 0;
  int deepest = 0;
  bool quoted = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (quoted) {
      if (c == '\\') ++i;
      if (c == '"') quoted = false;
    } else if (c == '"') {
      quoted = true;
    } else if (c == '[' || c == '{') {
      deepest = std::max(deepest, ++depth);
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return deepest;
}

const json* member(const json& object, const char* key) {
  if (!object.is_object()) return nullptr;
  const auto found = object.find(key);
  return found == object.end() ? nullptr : &*found;
}

}  // namespace

std::string excerpt(std::string_view text, std::size_t most) {
  const std::string escaped =
      json(std::string(text.substr(0, most))).dump(-1, ' ', false, json::error_handler_t::replace);
  return escaped.substr(1, escaped.size() - 2);
}

json parse_checked_json(const std::string& file, std::string_view text) {
  const int nesting = nesting_of(text);
  ARCUS_REQUIRE(nesting <= kDeepest, ExitCode::data,
                "{}: it is nested {} deep; no such file needs more than {}", file, nesting,
                kDeepest);
  std::vector<std::unordered_set<std::string>> keys;  // of the objects that are open
  const auto watch = [&](int, json::parse_event_t event, json& value) {
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end) keys.pop_back();
    if (event == json::parse_event_t::key) {
      const auto& key = value.get_ref<const std::string&>();
      ARCUS_REQUIRE(keys.back().insert(key).second, ExitCode::data,
                    "{}: the key \"{}\" occurs twice", file, key.substr(0, 40));
    }
    return true;
  };
  try {
    return json::parse(text, watch);
  } catch (const json::exception& error) {
    ARCUS_FAIL(ExitCode::data, "{}: it is no JSON: {}", file, excerpt(error.what(), 120));
  }
}

std::string json_text(const std::string& file, const json& object, const char* key) {
  const json* value = member(object, key);
  ARCUS_REQUIRE(value != nullptr && value->is_string(), ExitCode::data,
                "{}: the text \"{}\" is missing", file, key);
  return value->get<std::string>();
}

bool json_flag(const std::string& file, const json& object, const char* key, bool otherwise) {
  const json* value = member(object, key);
  if (value == nullptr || value->is_null()) return otherwise;
  ARCUS_REQUIRE(value->is_boolean(), ExitCode::data, "{}: \"{}\" is neither true nor false", file,
                key);
  return value->get<bool>();
}

std::string json_text_or_none(const std::string& file, const json& object, const char* key) {
  const json* value = member(object, key);
  if (value == nullptr || value->is_null()) return "";
  ARCUS_REQUIRE(value->is_string(), ExitCode::data, "{}: \"{}\" is no text", file, key);
  return value->get<std::string>();
}

}  // namespace arcus
