#include "src/data/pre_tokenizer.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "src/base/error.hpp"
#include "src/data/checked_json.hpp"
#include "src/data/utf8.hpp"

namespace arcus {
namespace {

using nlohmann::json;

constexpr const char* kGpt2 =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr const char* kQwen2 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kQwen35 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kLlama3 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kGpt4o =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kTekken =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kBailing =
    R"('(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+)";
constexpr const char* kDeepSeekWords =
    R"([!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kPunctuation = R"([!-/:-@\[-`{-~\p{P}])";

std::string spelled(const std::string& pattern) {
  std::string text;
  for (const char c : pattern) {
    switch (c) {
      case '\n':
        text += "\\n";
        break;
      case '\r':
        text += "\\r";
        break;
      case '\t':
        text += "\\t";
        break;
      default:
        text += c;
    }
  }
  return text;
}

}  // namespace

const std::vector<KnownPreTokenizer>& known_pre_tokenizers() {
  static const std::vector<KnownPreTokenizer> known{
      {"gpt-2",
       {kGpt2},
       false,
       {"mpt", "olmo", "jais", "phi-2", "exaone4", "modern-bert", "gigachat", "mellum"}},
      {"qwen2",
       {kQwen2},
       false,
       {"stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan", "grok-2", "kormo"}},
      {"qwen35", {kQwen35}, false, {}},
      {"llama-bpe",
       {kLlama3},
       true,
       {"llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"}},
      {"dbrx", {kLlama3}, false, {"smaug-bpe", "glm4", "chatglm-bpe"}},
      {"gpt-4o", {kGpt4o}, false, {"llama4", "kanana2"}},
      {"tekken", {kTekken}, true, {}},
      {"bailingmoe2", {kBailing}, false, {"bailingmoe", "llada-moe"}},
      {"deepseek-v3",
       {R"(\p{N}{1,3})", "[一-龥぀-ゟ゠-ヿ]+", kDeepSeekWords},
       false,
       {"hunyuan-dense"}},
      {"deepseek-coder",
       {R"([\r\n])", R"(\s?\p{L}+)", R"(\s?\p{P}+)", "[一-龥ࠀ-一가-퟿]+", R"(\p{N})"},
       false,
       {}},
      {"smollm",
       {R"(\p{N})", kGpt2},
       false,
       {"starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}},
      {"default", {R"([\p{P}\$\+<=>\^~\|]+)", kGpt2, R"(\p{N}+)", "[0-9][0-9][0-9]"}, false, {}},
  };
  return known;
}

PreTokenizer::PreTokenizer(const std::string& file, const json& node) {
  if (!node.is_null()) add(file, node);
}

PreTokenizer::Behavior PreTokenizer::behavior_of(const std::string& file, const json& node,
                                                 const char* otherwise) {
  const std::string name =
      node.contains("behavior") ? json_text(file, node, "behavior") : otherwise;
  if (name == "Isolated") return Behavior::isolated;
  if (name == "Removed") return Behavior::removed;
  if (name == "MergedWithPrevious") return Behavior::merged_with_previous;
  if (name == "MergedWithNext") return Behavior::merged_with_next;
  if (name == "Contiguous") return Behavior::contiguous;
  ARCUS_FAIL(ExitCode::data, "{}: pre_tokenizer behavior \"{}\" is not supported", file,
             excerpt(name));
}

void PreTokenizer::add_split(const std::string& file, const std::string& pattern, Behavior behavior,
                             bool invert) {
  try {
    steps_.push_back({Kind::split, {Regex(pattern)}, behavior, invert});
  } catch (const Error& error) {
    ARCUS_FAIL(ExitCode::data, "{}: pre_tokenizer: {}", file, error.what());
  }
}

void PreTokenizer::add_metaspace(const std::string& file, const json& node) {
  ARCUS_REQUIRE(metaspace_.empty(), ExitCode::data, "{}: pre_tokenizer Metaspace comes twice",
                file);
  metaspace_ = json_text(file, node, "replacement");
  ARCUS_REQUIRE(!metaspace_.empty() && next_code_point(metaspace_, 0) == metaspace_.size(),
                ExitCode::data, "{}: Metaspace's replacement \"{}\" is not one character", file,
                excerpt(metaspace_));
  const bool prefix = json_flag(file, node, "add_prefix_space", true);
  const std::string scheme =
      node.contains("prepend_scheme") ? json_text(file, node, "prepend_scheme") : "always";
  Step step{Kind::metaspace};
  if (prefix && scheme == "always") step.prepend = Prepend::always;
  if (prefix && scheme == "first") step.prepend = Prepend::first;
  ARCUS_REQUIRE(scheme == "always" || scheme == "first" || scheme == "never", ExitCode::data,
                "{}: Metaspace's prepend_scheme \"{}\" is not supported", file, excerpt(scheme));
  splits_at_blanks_ = json_flag(file, node, "split", true);
  steps_.push_back(step);
  if (splits_at_blanks_) {
    add_split(file, escape_regex(metaspace_), Behavior::merged_with_next, false);
  }
}

void PreTokenizer::add(const std::string& file, const json& node) {
  ARCUS_REQUIRE(!byte_level_, ExitCode::data,
                "{}: a pre_tokenizer step after ByteLevel is not supported", file);
  const std::string type = json_text(file, node, "type");
  if (type == "Sequence") {
    const auto parts = node.find("pretokenizers");
    ARCUS_REQUIRE(parts != node.end() && parts->is_array(), ExitCode::data,
                  "{}: a pre_tokenizer \"Sequence\" lists no \"pretokenizers\"", file);
    for (const json& part : *parts) add(file, part);
  } else if (type == "ByteLevel") {
    if (json_flag(file, node, "add_prefix_space", true)) {
      steps_.push_back({Kind::prefix_space});
      adds_prefix_space_ = true;
    }
    if (json_flag(file, node, "use_regex", true)) {
      add_split(file, kGpt2, Behavior::isolated, false);
    }
    byte_level_ = true;
  } else if (type == "Split") {
    const auto pattern = node.find("pattern");
    ARCUS_REQUIRE(pattern != node.end() && pattern->is_object(), ExitCode::data,
                  "{}: a pre_tokenizer \"Split\" has no \"pattern\"", file);
    const bool regex = pattern->contains("Regex");
    const std::string text = json_text(file, *pattern, regex ? "Regex" : "String");
    add_split(file, regex ? text : escape_regex(text), behavior_of(file, node, "Isolated"),
              json_flag(file, node, "invert", false));
  } else if (type == "Digits") {
    const bool each = json_flag(file, node, "individual_digits", false);
    add_split(file, R"(\p{N})", each ? Behavior::isolated : Behavior::contiguous, false);
  } else if (type == "Punctuation") {
    add_split(file, kPunctuation, behavior_of(file, node, "Isolated"), false);
  } else if (type == "Metaspace") {
    add_metaspace(file, node);
  } else {
    ARCUS_FAIL(ExitCode::data,
               "{}: pre_tokenizer \"{}\" is not supported; Split, Digits, Punctuation, Metaspace, "
               "ByteLevel and Sequence are",
               file, excerpt(type));
  }
}

std::vector<std::string> PreTokenizer::isolated_patterns() const {
  std::vector<std::string> patterns;
  for (const Step& step : steps_) {
    if (step.kind == Kind::prefix_space) continue;
    // The known ones match all of a text, so that what is between matches may be dropped or kept.
    const bool isolated =
        step.kind == Kind::split && ((step.behavior == Behavior::isolated && !step.invert) ||
                                     (step.behavior == Behavior::removed && step.invert));
    if (!isolated) return {};
    patterns.push_back(spelled(step.regex.front().pattern()));
  }
  return patterns;
}

void PreTokenizer::for_each_word(std::string_view text, Place place, const Word& word) const {
  run(0, text, place, word);
}

std::string PreTokenizer::with_metaspace(const Step& step, std::string_view text,
                                         Place place) const {
  std::string result;
  const bool blank_first = text.starts_with(' ') || text.starts_with(metaspace_);
  const bool prepend =
      step.prepend == Prepend::always || (step.prepend == Prepend::first && place == Place::first);
  if (prepend && !blank_first && place != Place::continued) result = metaspace_;
  for (const char c : text) {
    if (c == ' ') {
      result += metaspace_;
    } else {
      result += c;
    }
  }
  return result;
}

void PreTokenizer::run(std::size_t idx, std::string_view text, Place place,
                       const Word& word) const {
  if (text.empty()) return;
  if (idx == steps_.size()) return word(text);
  const Step& step = steps_[idx];
  switch (step.kind) {
    case Kind::split:
      return run_split(idx, text, place, word);
    case Kind::metaspace:
      return run(idx + 1, with_metaspace(step, text, place), place, word);
    case Kind::prefix_space:
      if (text.starts_with(' ') || place == Place::continued) {
        return run(idx + 1, text, place, word);
      }
      return run(idx + 1, std::string(1, ' ').append(text), place, word);
  }
}

namespace {

/// Joins the parts of a split, matches and what is between them, as a behaviour wants.
struct PendingPart {
  std::size_t begin = 0, end = 0;
  bool there = false;
  bool match = false;  ///< of the part that came last
};

}  // namespace

void PreTokenizer::run_split(std::size_t idx, std::string_view text, Place place,
                             const Word& word) const {
  const Step& step = steps_[idx];
  const auto emit = [&](std::size_t begin, std::size_t end) {
    if (begin == end) return;
    const Place here = begin == 0 ? place : Place::later;
    run(idx + 1, text.substr(begin, end - begin), here, word);
  };
  PendingPart pending;
  const auto hold = [&](std::size_t begin, std::size_t end, bool match, bool joins) {
    if (pending.there && joins) {
      pending.end = end;
    } else {
      if (pending.there) emit(pending.begin, pending.end);
      pending.begin = begin;
      pending.end = end;
      pending.there = true;
    }
    pending.match = match;
  };
  const auto part = [&](std::size_t begin, std::size_t end, bool found) {
    const bool match = found != step.invert;
    switch (step.behavior) {
      case Behavior::isolated:
        return emit(begin, end);
      case Behavior::removed:
        if (!match) emit(begin, end);
        return;
      case Behavior::contiguous:
        return hold(begin, end, match, match == pending.match);
      case Behavior::merged_with_previous:
        return hold(begin, end, match, match && !pending.match);
      case Behavior::merged_with_next:
        return hold(begin, end, match, !match && pending.match);
    }
  };
  std::size_t done = 0;
  step.regex.front().for_each_match(text, [&](std::size_t begin, std::size_t end) {
    if (begin > done) part(done, begin, false);
    part(begin, end, true);
    done = end;
  });
  if (done < text.size()) part(done, text.size(), false);
  if (pending.there) emit(pending.begin, pending.end);
}

}  // namespace arcus
