#include "src/data/tokenizer_files.hpp"

#include <charconv>
#include <nlohmann/json.hpp>

#include "src/base/error.hpp"
#include "src/data/checked_json.hpp"

namespace arcus {
namespace {

using nlohmann::json;
constexpr std::string_view kMagic = "arcus tokenizer files 1\n";

/// Takes bytes from the front of a text.
class Unpacker {
 public:
  explicit Unpacker(std::string_view text) : rest_(text) {}
  bool done() const { return rest_.empty(); }
  std::string_view take(std::size_t bytes) {
    ARCUS_REQUIRE(bytes <= rest_.size(), ExitCode::data,
                  "the tokenizer's files are cut short: {} bytes are left where {} should be",
                  rest_.size(), bytes);
    const std::string_view taken = rest_.substr(0, bytes);
    rest_.remove_prefix(bytes);
    return taken;
  }
  /// Up to the next `end`, which is taken too.
  std::string_view take_until(char end) {
    const std::size_t at = rest_.find(end);
    ARCUS_REQUIRE(at != std::string_view::npos, ExitCode::data,
                  "the tokenizer's files are damaged: the head of a file does not end");
    const std::string_view taken = take(at);
    take(1);
    return taken;
  }

 private:
  std::string_view rest_;
};

/// "eos_token": "</s>" or {"content": "</s>", ...}; absent and null are "".
std::string token_of(const std::string& file, const json& root, const char* key) {
  const auto found = root.find(key);
  if (found == root.end() || found->is_null()) return "";
  if (found->is_string()) return found->get<std::string>();
  const bool described =
      found->is_object() && found->contains("content") && found->at("content").is_string();
  ARCUS_REQUIRE(described, ExitCode::data, "{}: {} is neither a text nor has a \"content\"", file,
                key);
  return found->at("content").get<std::string>();
}

std::optional<bool> flag_of(const json& root, const char* key) {
  const auto found = root.find(key);
  if (found == root.end() || !found->is_boolean()) return {};
  return found->get<bool>();
}

/// A text, or a list of {"name", "template"} of which the default one counts.
std::string chat_template_of(const json& root) {
  const auto found = root.find("chat_template");
  if (found == root.end()) return "";
  if (found->is_string()) return found->get<std::string>();
  if (!found->is_array()) return "";
  for (const json& entry : *found) {
    if (entry.is_object() && entry.value("name", json()) == "default" &&
        entry.value("template", json()).is_string()) {
      return entry.at("template").get<std::string>();
    }
  }
  return "";
}

void read_tokens(const TokenizerFiles& files, const std::string& file, SpecialTokens& tokens) {
  const auto found = files.find(file);
  if (found == files.end()) return;
  const json root = parse_checked_json(file, found->second);
  ARCUS_REQUIRE(root.is_object(), ExitCode::data, "{}: it is no JSON object", file);
  const auto fill = [&](std::string& token, const char* key) {
    if (token.empty()) token = token_of(file, root, key);
  };
  fill(tokens.bos, "bos_token");
  fill(tokens.eos, "eos_token");
  fill(tokens.unk, "unk_token");
  fill(tokens.pad, "pad_token");
  if (!tokens.add_bos) tokens.add_bos = flag_of(root, "add_bos_token");
  if (!tokens.add_eos) tokens.add_eos = flag_of(root, "add_eos_token");
  if (tokens.chat_template.empty()) tokens.chat_template = chat_template_of(root);
}

}  // namespace

std::string pack_tokenizer_files(const TokenizerFiles& files) {
  std::string packed(kMagic);
  for (const auto& [name, content] : files) {
    ARCUS_CHECK(name.find_first_of(" \n/") == std::string::npos, "file name \"{}\"", name);
    packed += fmt::format("{} {}\n{}\n", name, content.size(), content);
  }
  return packed;
}

TokenizerFiles unpack_tokenizer_files(std::string_view packed) {
  ARCUS_REQUIRE(packed.starts_with(kMagic), ExitCode::data,
                "the tokenizer ({} bytes) does not begin with \"{}\"", packed.size(),
                kMagic.substr(0, kMagic.size() - 1));
  Unpacker unpacker(packed.substr(kMagic.size()));
  TokenizerFiles files;
  while (!unpacker.done()) {
    const std::string_view name = unpacker.take_until(' ');
    const std::string_view digits = unpacker.take_until('\n');
    std::size_t bytes = 0;
    const auto parsed = std::from_chars(digits.data(), digits.data() + digits.size(), bytes);
    const bool plausible = !name.empty() && name.find('\n') == std::string_view::npos &&
                           parsed.ec == std::errc{} && parsed.ptr == digits.end();
    ARCUS_REQUIRE(plausible, ExitCode::data,
                  "the tokenizer's files are damaged: a file's head is \"{} {}\"", excerpt(name),
                  excerpt(digits));
    std::string content(unpacker.take(bytes));
    ARCUS_REQUIRE(unpacker.take(1) == "\n" && files.emplace(name, std::move(content)).second,
                  ExitCode::data, "the tokenizer's files are damaged after {}", excerpt(name));
  }
  return files;
}

SpecialTokens read_special_tokens(const TokenizerFiles& files) {
  SpecialTokens tokens;
  read_tokens(files, "tokenizer_config.json", tokens);
  read_tokens(files, "special_tokens_map.json", tokens);
  const auto jinja = files.find("chat_template.jinja");
  if (jinja != files.end()) tokens.chat_template = jinja->second;
  return tokens;
}

}  // namespace arcus
