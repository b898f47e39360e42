#include "src/data/pairs.hpp"

#include <fmt/format.h>

#include <map>
#include <nlohmann/json.hpp>
#include <utility>

#include "src/base/error.hpp"

namespace arcus {
namespace {

using nlohmann::json;

/// A template cut at its placeholders: text before each, and what stands behind the last.
struct Pieces {
  std::vector<std::pair<std::string, std::string>> before;  ///< (placeholder, text before it)
  std::string rest;
};

char escaped(char c) {
  switch (c) {
    case 'n':
      return '\n';
    case 't':
      return '\t';
    case '\\':
      return '\\';
    default:
      ARCUS_FAIL(ExitCode::usage, "--template: \"\\{}\" means nothing; use \\n, \\t or \\\\", c);
  }
}

Pieces cut_at_placeholders(const std::string& text) {
  Pieces pieces;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const std::string_view rest = std::string_view(text).substr(i);
    if (rest.starts_with("\\")) {
      pieces.rest += escaped(rest.size() > 1 ? rest[1] : ' ');
      ++i;
    } else if (rest.starts_with("{{") || rest.starts_with("}}")) {
      pieces.rest += rest[0];
      ++i;
    } else if (rest[0] == '{') {
      const std::size_t end = rest.find('}');
      const std::string name(rest.substr(1, end == std::string_view::npos ? end : end - 1));
      ARCUS_REQUIRE(end != std::string_view::npos &&
                        (name == "system" || name == "prompt" || name == "answer"),
                    ExitCode::usage,
                    "--template: \"{{{}\" begins no placeholder; there are {{system}}, {{prompt}} "
                    "and {{answer}}, and {{{{ for a brace",
                    name);
      pieces.before.emplace_back(name, std::exchange(pieces.rest, {}));
      i += end;
    } else {
      pieces.rest += rest[0];
    }
  }
  return pieces;
}

void append(std::vector<TextPart>& parts, const std::string& text, bool learned) {
  if (text.empty()) return;
  if (!parts.empty() && parts.back().learned == learned) {
    parts.back().text += text;
  } else {
    parts.push_back({text, learned});
  }
}

/// The text under `key`, which must be one.
std::string text_of(const json& object, const char* key) {
  const auto found = object.find(key);
  ARCUS_REQUIRE(found != object.end(), ExitCode::data, "it has no \"{}\"", key);
  ARCUS_REQUIRE(found->is_string(), ExitCode::data, "its \"{}\" is {}, must be text", key,
                found->type_name());
  const auto& text = found->get_ref<const std::string&>();
  ARCUS_REQUIRE(text.find('\0') == std::string::npos, ExitCode::data,
                "its \"{}\" has a NUL character", key);
  return text;
}

std::vector<TextPart> read_messages(const json& messages, const PairTemplate& how) {
  ARCUS_REQUIRE(messages.is_array() && !messages.empty(), ExitCode::data,
                "its \"messages\" is no list of messages");
  std::string system;
  std::vector<PairTemplate::Turn> turns;
  std::string expected = "user";
  for (std::size_t i = 0; i < messages.size(); ++i) {
    const json& message = messages[i];
    ARCUS_REQUIRE(message.is_object(), ExitCode::data, "message {} is no object", i);
    const std::string role = text_of(message, "role");
    std::string content = text_of(message, "content");
    if (i == 0 && role == "system") {
      system = std::move(content);
      continue;
    }
    ARCUS_REQUIRE(role == expected, ExitCode::data,
                  "message {} is of \"{}\" where one of \"{}\" is due: they take turns, a system "
                  "message may come first, and there are no other roles",
                  i, role, expected);
    if (role == "user") {
      turns.push_back({std::move(content), {}});
    } else {
      turns.back().answer = std::move(content);
    }
    expected = role == "user" ? "assistant" : "user";
  }
  ARCUS_REQUIRE(!turns.empty() && expected == "user", ExitCode::data,
                "its last message must be one of \"assistant\"");
  return how.render(system, turns);
}

}  // namespace

PairTemplate::PairTemplate(const std::string& text) {
  Pieces pieces = cut_at_placeholders(text);
  std::vector<std::string> order;
  for (const auto& piece : pieces.before) order.push_back(piece.first);
  has_system_ = order.size() == 3 && order[0] == "system";
  if (has_system_) order.erase(order.begin());
  ARCUS_REQUIRE(order == (std::vector<std::string>{"prompt", "answer"}), ExitCode::usage,
                "--template \"{}\" must have {{prompt}} and {{answer}} once each, in this order, "
                "and may have {{system}} before them",
                text);
  std::size_t next = 0;
  if (has_system_) before_system_ = std::move(pieces.before[next++].second);
  before_prompt_ = std::move(pieces.before[next++].second);
  before_answer_ = std::move(pieces.before[next].second);
  after_answer_ = std::move(pieces.rest);
}

std::vector<TextPart> PairTemplate::render(const std::string& system,
                                           const std::vector<Turn>& turns) const {
  ARCUS_REQUIRE(system.empty() || has_system_, ExitCode::data,
                "it has a system text, for which the template has no {{system}}");
  std::vector<TextPart> parts;
  if (!system.empty()) append(parts, before_system_ + system, false);
  for (const Turn& turn : turns) {
    ARCUS_REQUIRE(!turn.answer.empty(), ExitCode::data,
                  "an answer is empty: there is nothing to learn from it");
    append(parts, before_prompt_ + turn.prompt + before_answer_, false);
    append(parts, turn.answer + after_answer_, true);
  }
  return parts;
}

std::vector<TextPart> read_pair(std::string_view line, const PairTemplate& how) {
  json object;
  try {
    object = json::parse(line);
  } catch (const json::exception& error) {
    ARCUS_FAIL(ExitCode::data, "it is no JSON: {}", error.what());
  }
  ARCUS_REQUIRE(object.is_object(), ExitCode::data, "it is {}, must be an object",
                object.type_name());
  const bool pair = object.contains("prompt") || object.contains("answer");
  const auto messages = object.find("messages");
  ARCUS_REQUIRE(pair != (messages != object.end()), ExitCode::data,
                "it must have \"prompt\" and \"answer\", or \"messages\"");
  if (!pair) return read_messages(*messages, how);
  const std::string system = object.contains("system") ? text_of(object, "system") : "";
  return how.render(system, {{text_of(object, "prompt"), text_of(object, "answer")}});
}

}  // namespace arcus
