#include "src/data/normalizer.hpp"

#include <utf8proc.h>

#include <cstdlib>
#include <memory>
#include <nlohmann/json.hpp>

#include "src/base/error.hpp"
#include "src/data/checked_json.hpp"
#include "src/data/utf8.hpp"

namespace arcus {
namespace {

using nlohmann::json;

constexpr std::size_t kMostSteps = 8;

/// Characters that no normalisation changes and that combine with nothing before them.
bool is_plain(std::uint32_t c) {
  return c < 0x300 || (c >= 0x400 && c < 0x483) || (c >= 0x3041 && c < 0x3097) ||
         (c >= 0x30A1 && c < 0x3131) || (c >= 0x4E00 && c < 0xA000) || (c >= 0xAC00 && c < 0xD7A4);
}

bool is_nfc_at_sight(std::string_view text) {
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = next_code_point(text, at);
    if (!is_plain(code_point_of(text.substr(at, end - at)))) return false;
    at = end;
  }
  return true;
}

std::string nfc(std::string_view text) {
  if (is_nfc_at_sight(text)) return std::string(text);
  utf8proc_uint8_t* result = nullptr;
  const auto bytes =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                   static_cast<utf8proc_ssize_t>(text.size()), &result,
                   static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(result, &std::free);
  ARCUS_REQUIRE(bytes >= 0, ExitCode::data, "a text of {} bytes cannot be normalised: {}",
                text.size(), utf8proc_errmsg(bytes));
  return std::string(reinterpret_cast<const char*>(result), static_cast<std::size_t>(bytes));
}

std::string replace_all(std::string_view text, const std::string& from, const std::string& to) {
  std::string result;
  result.reserve(text.size() + text.size() / 4);
  // Steps of a hostile file may double a text again and again; blanks become three bytes.
  const std::size_t most = 8 * text.size() + 1024;
  for (std::size_t at = 0;;) {
    const std::size_t found = text.find(from, at);
    result += text.substr(at, found - at);
    if (found == std::string_view::npos) return result;
    result += to;
    ARCUS_REQUIRE(result.size() <= most, ExitCode::data,
                  "the tokenizer's normalizer makes more than {} bytes of {}", most, text.size());
    at = found + from.size();
  }
}

}  // namespace

Normalizer::Normalizer(const std::string& file, const json& node) {
  if (!node.is_null()) add(file, node);
}

void Normalizer::add(const std::string& file, const json& node) {
  const std::string type = json_text(file, node, "type");
  ARCUS_REQUIRE(steps_.size() < kMostSteps, ExitCode::data,
                "{}: a normalizer of more than {} steps is not supported", file, kMostSteps);
  if (type == "Sequence") {
    const auto parts = node.find("normalizers");
    ARCUS_REQUIRE(parts != node.end() && parts->is_array(), ExitCode::data,
                  "{}: a normalizer \"Sequence\" lists no \"normalizers\"", file);
    for (const json& part : *parts) add(file, part);
  } else if (type == "NFC") {
    steps_.push_back({Kind::nfc, "", ""});
  } else if (type == "Prepend") {
    steps_.push_back({Kind::prepend, "", json_text(file, node, "prepend")});
  } else if (type == "Replace") {
    const auto pattern = node.find("pattern");
    const bool text = pattern != node.end() && pattern->is_object() && pattern->contains("String");
    ARCUS_REQUIRE(text, ExitCode::data,
                  "{}: normalizer \"Replace\" is supported for a pattern {{\"String\": ...}} alone",
                  file);
    steps_.push_back(
        {Kind::replace, json_text(file, *pattern, "String"), json_text(file, node, "content")});
    ARCUS_REQUIRE(!steps_.back().from.empty(), ExitCode::data,
                  "{}: normalizer \"Replace\" replaces an empty text", file);
  } else {
    ARCUS_FAIL(ExitCode::data,
               "{}: normalizer \"{}\" is not supported; NFC, Prepend, Replace and Sequence are",
               file, excerpt(type));
  }
}

std::string Normalizer::apply(std::string_view text, bool continued) const {
  std::string result(text);
  for (const Step& step : steps_) {
    switch (step.kind) {
      case Kind::nfc:
        result = nfc(result);
        break;
      case Kind::prepend:
        if (!continued && !result.empty()) result.insert(0, step.to);
        break;
      case Kind::replace:
        result = replace_all(result, step.from, step.to);
        break;
    }
  }
  return result;
}

bool Normalizer::is_local() const {
  for (const Step& step : steps_) {
    if (step.kind == Kind::replace && next_code_point(step.from, 0) != step.from.size()) {
      return false;
    }
  }
  return true;
}

}  // namespace arcus
