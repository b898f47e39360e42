#include "checkpoints/interop/json_text.hpp"

#include <nlohmann/json.hpp>
#include <set>
#include <vector>

#include "src/base/error.hpp"

namespace arcus {

nlohmann::json parse_json_object(std::string_view text, const std::string& source) {
  using json = nlohmann::json;
  constexpr std::size_t kMostDepth = 64;
  std::vector<std::set<std::string>> keys;  // of the objects that are open
  const auto watch = [&](int depth, json::parse_event_t event, json& value) {
    ARCUS_REQUIRE(static_cast<std::size_t>(depth) < kMostDepth, ExitCode::data,
                  "{}: nested more than {} deep", source, kMostDepth);
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end) keys.pop_back();
    if (event == json::parse_event_t::key) {
      const auto key = value.get<std::string>();
      ARCUS_REQUIRE(keys.back().insert(key).second, ExitCode::data,
                    "{}: the key \"{}\" occurs twice", source, key);
    }
    return true;
  };
  json result;
  try {
    result = json::parse(text, watch);
  } catch (const json::exception& error) {
    ARCUS_FAIL(ExitCode::data, "{}: no JSON: {}", source, error.what());
  }
  ARCUS_REQUIRE(result.is_object(), ExitCode::data, "{}: no JSON object", source);
  return result;
}

}  // namespace arcus
