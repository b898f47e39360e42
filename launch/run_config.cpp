#include "launch/run_config.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <toml++/toml.h>
#include <algorithm>
#include <charconv>
#include <fstream>
#include <optional>
#include <sstream>
#include <utility>

#include "launch/option_table.hpp"
#include "src/base/error.hpp"
#include "src/model/routing_rules.hpp"

namespace arcus {
namespace {

std::string join_key(const std::string& section, std::string_view key) {
  return section.empty() ? std::string(key) : fmt::format("{}.{}", section, key);
}

std::string bracketed(const Section& section) {
  return section.is_array ? fmt::format("[[{}]]", section.name) : fmt::format("[{}]", section.name);
}

/// True when a section lies below `path`, as train.group below train.
bool leads_to_section(const std::string& path) {
  return std::any_of(option_table().begin(), option_table().end(),
                     [&](const Section& s) { return s.name.starts_with(path + "."); });
}

std::string describe(const toml::node& node) {
  std::ostringstream text;
  node.visit([&](const auto& value) { text << value; });
  switch (node.type()) {
    case toml::node_type::string:
      return "text " + text.str();
    case toml::node_type::integer:
      return "the whole number " + text.str();
    case toml::node_type::floating_point:
      return "the number " + text.str();
    case toml::node_type::boolean:
      return text.str();
    case toml::node_type::table:
      return "a section";
    case toml::node_type::array:
      return "the array " + text.str();
    default:
      return text.str();
  }
}

/// The value of `node` for `option`, nothing when the type does not fit.
std::optional<Value> to_value(const Option& option, const toml::node& node) {
  const auto* text = node.as_string();
  switch (option.type) {
    case ValueType::boolean:
      if (const auto* flag = node.as_boolean()) return Value(flag->get());
      return std::nullopt;
    case ValueType::integer:
      if (const auto* integer = node.as_integer()) {
        // 0 stands for "auto" inside; written out it is a mistake.
        if (option.limits.auto_is_zero && integer->get() == 0) return std::nullopt;
        return Value(integer->get());
      }
      if (option.limits.auto_is_zero && text != nullptr && text->get() == "auto") {
        return Value(std::int64_t{0});
      }
      return std::nullopt;
    case ValueType::number:
      if (const auto* integer = node.as_integer()) {
        return Value(static_cast<double>(integer->get()));
      }
      if (const auto* number = node.as_floating_point()) return Value(number->get());
      return std::nullopt;
    case ValueType::text:
      if (text != nullptr) return Value(text->get());
      return std::nullopt;
  }
  return std::nullopt;
}

/// "; did you mean x?" or nothing.
std::string did_you_mean(const std::vector<std::string>& near) {
  return near.empty() ? "" : fmt::format("; did you mean {}?", fmt::join(near, " or "));
}

/// Names that may stand below `path`: keys, and sections such as `group` in train.group.
std::vector<std::string> names_below(const std::string& path) {
  std::vector<std::string> names;
  if (const Section* section = find_section(path)) {
    for (const Option& option : section->options) names.push_back(option.name);
  }
  const std::string prefix = path.empty() ? "" : path + ".";
  for (const Section& section : option_table()) {
    if (!section.name.starts_with(prefix)) continue;
    const std::string rest = section.name.substr(prefix.size());
    if (!rest.empty() && rest.find('.') == std::string::npos) names.push_back(rest);
  }
  return names;
}

/// What to say about a name that does not exist below `path`.
std::string unknown_name(const std::string& path, const std::string& name) {
  const std::vector<std::string> near = nearest_names(name, names_below(path));
  std::vector<std::string> full(near.size());
  std::transform(near.begin(), near.end(), full.begin(),
                 [&](const std::string& candidate) { return join_key(path, candidate); });
  const std::string kind = path.empty() ? "section" : "key";
  std::string message = fmt::format("unknown {} {}", kind, join_key(path, name));
  if (!full.empty()) return message + did_you_mean(full);
  std::vector<std::string> homes;
  for (const Section& section : option_table()) {
    if (section.find(name) != nullptr) homes.push_back(bracketed(section));
  }
  if (!homes.empty())
    return fmt::format("{}; {} is a key of {}", message, name, fmt::join(homes, ", "));
  return message + "; `arcus help config` lists every key";
}

/// Takes parsed TOML into a Config and collects what is wrong with it.
class Reader {
 public:
  /// `has_lines` is false for text whose line numbers mean nothing to the user.
  Reader(Config& config, std::string source, bool has_lines = true)
      : config_(config), source_(std::move(source)), has_lines_(has_lines) {}

  void read_table(const std::string& path, const toml::table& table) {
    for (const auto& [key, node] : table) read_entry(path, std::string(key.str()), node);
  }

  void read_option(const Section& section, const Option& option, void* row,
                   const toml::node& node) {
    const std::string key = join_key(section.name, option.name);
    const std::optional<Value> value = to_value(option, node);
    if (!value) {
      report(node,
             fmt::format("{} must be {}, not {}", key, allowed_values(option), describe(node)));
      return;
    }
    const std::string problem = check_value(option, *value);
    if (problem.empty()) {
      option.set(row, *value);
    } else {
      report(node, fmt::format("{} = {}: {}", key, to_toml_text(option, *value), problem));
    }
  }

  void read_rows(const Section& section, const toml::node& node) {
    const toml::array* array = node.as_array();
    if (array == nullptr) {
      report(node, fmt::format("{} takes several rows: write {} above its keys", section.name,
                               bracketed(section)));
      return;
    }
    section.clear(config_);
    for (const toml::node& element : *array) {
      const toml::table* table = element.as_table();
      if (table == nullptr) {
        report(element, fmt::format("a row of {} must be a table such as {{{} = ...}}, not {}",
                                    section.name, section.options.front().name, describe(element)));
        continue;
      }
      read_keys(section, section.append(config_), *table);
    }
  }

  void report(const toml::node& node, const std::string& message) {
    problems_.emplace_back(node.source().begin.line, message);
  }

  /// Throws when there were problems, all of them in one message.
  void finish() {
    if (problems_.empty()) return;
    std::stable_sort(problems_.begin(), problems_.end(),
                     [](const auto& a, const auto& b) { return a.first < b.first; });
    std::vector<std::string> lines;
    for (const auto& [line, message] : problems_) {
      lines.push_back(has_lines_ ? fmt::format("{}:{}: {}", source_, line, message)
                                 : fmt::format("{}: {}", source_, message));
    }
    ARCUS_FAIL(ExitCode::usage, "{}", fmt::join(lines, "\n  "));
  }

 private:
  void read_entry(const std::string& path, const std::string& key, const toml::node& node) {
    const std::string full = join_key(path, key);
    const Section* here = find_section(path);
    const Section* below = find_section(full);
    if (below != nullptr && below->is_array) {
      read_rows(*below, node);
    } else if (below != nullptr || leads_to_section(full)) {
      read_section(full, node);
    } else if (const Option* option = here != nullptr ? here->find(key) : nullptr) {
      read_option(*here, *option, here->rows(config_).front(), node);
    } else {
      report(node, unknown_name(path, key));
    }
  }

  void read_section(const std::string& name, const toml::node& node) {
    if (const toml::table* table = node.as_table()) {
      read_table(name, *table);
    } else if (node.is_array()) {
      report(node, fmt::format("there is one section {0}: write [{0}], not [[{0}]]", name));
    } else {
      report(node, fmt::format("{0} is a section: write [{0}] above its keys", name));
    }
  }

  void read_keys(const Section& section, void* row, const toml::table& table) {
    for (const auto& [key, node] : table) {
      if (const Option* option = section.find(std::string(key.str()))) {
        read_option(section, *option, row, node);
      } else {
        report(node, unknown_name(section.name, std::string(key.str())));
      }
    }
  }

  Config& config_;
  std::string source_;
  bool has_lines_;
  std::vector<std::pair<toml::source_index, std::string>> problems_;
};

/// `text` as a TOML value, nothing when it is none.
std::optional<toml::table> parse_value(const std::string& text) {
  try {
    toml::table table = toml::parse("value = " + text);
    if (table.size() == 1 && table.contains("value")) return table;
  } catch (const toml::parse_error&) {
    // A bare word.
  }
  return std::nullopt;
}

/// What a `--set` key points to.
struct Target {
  const Section* section = nullptr;
  const Option* option = nullptr;  ///< null: the whole array section
  std::optional<std::size_t> row;  ///< of an array section
};

bool is_row_number(const std::string& text) {
  return !text.empty() && text.size() < 7 &&
         text.find_first_not_of("0123456789") == std::string::npos;
}

/// Splits "train.lr", "train.group.0.lr_scale" or "train.group"; section stays null if unknown.
Target find_target(const std::string& key) {
  Target target;
  if (const Section* whole = find_section(key); whole != nullptr && whole->is_array) {
    target.section = whole;
    return target;
  }
  const std::size_t dot = key.rfind('.');
  if (dot == std::string::npos) return target;
  std::string section_name = key.substr(0, dot);
  const std::size_t row_dot = section_name.rfind('.');
  if (row_dot != std::string::npos && is_row_number(section_name.substr(row_dot + 1))) {
    target.row = std::stoul(section_name.substr(row_dot + 1));
    section_name.resize(row_dot);
  }
  const Section* section = find_section(section_name);
  if (section == nullptr || section->is_array != target.row.has_value()) return target;
  target.option = section->find(key.substr(dot + 1));
  if (target.option != nullptr) target.section = section;
  return target;
}

/// The message for a `--set` key that does not exist, with the nearest full key.
std::string unknown_set_key(const std::string& key) {
  std::vector<std::string> keys;
  std::vector<std::string> same_name;
  for (const Section& section : option_table()) {
    const std::string prefix = section.name + (section.is_array ? ".0." : ".");
    for (const Option& option : section.options) {
      keys.push_back(prefix + option.name);
      if (option.name == key) same_name.push_back(keys.back());
    }
  }
  if (!same_name.empty()) return fmt::format("unknown key {}{}", key, did_you_mean(same_name));
  // Misspelling inside a known section: stay in it.
  const std::size_t dot = key.rfind('.');
  if (dot != std::string::npos) {
    const std::string section = key.substr(0, dot);
    if (const Section* known = find_section(section); known != nullptr && !known->is_array) {
      return unknown_name(section, key.substr(dot + 1));
    }
  }
  const auto near = nearest_names(key, keys);
  return near.empty() ? fmt::format("unknown key {}; `arcus help config` lists every key", key)
                      : fmt::format("unknown key {}{}", key, did_you_mean(near));
}

/// The struct a `--set` writes to, made when it is the next free row of an array.
void* target_row(const Target& target, Config& config, const std::string& assignment) {
  std::vector<void*> rows = target.section->rows(config);
  if (!target.row) return rows.front();
  if (*target.row < rows.size()) return rows[*target.row];
  ARCUS_REQUIRE(*target.row == rows.size(), ExitCode::usage,
                "--set {}: {} has {} rows; the next one is {}.{}", assignment, target.section->name,
                rows.size(), target.section->name, rows.size());
  return target.section->append(config);
}

std::string trimmed(const std::string& text) {
  const auto begin = text.find_first_not_of(" \t\n");
  if (begin == std::string::npos) return "";
  return text.substr(begin, text.find_last_not_of(" \t\n") - begin + 1);
}

std::string shown(const Option& option, const void* row) {
  return option.is_given(row) ? to_toml_text(option, option.get(row)) : "not given";
}

void print_row(std::string& text, const Section& section, const void* row) {
  text += fmt::format("{}{}\n", text.empty() ? "" : "\n", bracketed(section));
  for (const Option& option : section.options) {
    if (!option.is_given(row)) continue;
    text += fmt::format("{} = {}\n", option.name, to_toml_text(option, option.get(row)));
  }
}

}  // namespace

Config from_toml(std::string_view text, const std::string& source, const Config& base) {
  Config config = base;
  toml::table table;
  try {
    table = toml::parse(text, source);
  } catch (const toml::parse_error& error) {
    ARCUS_FAIL(ExitCode::usage, "{}:{}: {}", source, error.source().begin.line,
               error.description());
  }
  Reader reader(config, source);
  reader.read_table("", table);
  reader.finish();
  return config;
}

Config load_config(const std::filesystem::path& file, std::span<const std::string> sets,
                   const Config& base) {
  std::error_code ignored;
  ARCUS_REQUIRE(!std::filesystem::is_directory(file, ignored), ExitCode::usage,
                "{} is a folder; give a configuration file such as launch/configs/quickstart.toml",
                file.string());
  std::ifstream stream(file, std::ios::binary);
  ARCUS_REQUIRE(stream.good(), ExitCode::usage, "cannot read the configuration file {}: {}",
                file.string(), std::generic_category().message(errno));
  std::ostringstream text;
  text << stream.rdbuf();
  Config config = from_toml(text.str(), file.string(), base);
  for (const std::string& assignment : sets) apply_set(config, assignment);
  return config;
}

void apply_set(Config& config, const std::string& assignment) {
  const std::size_t equals = assignment.find('=');
  ARCUS_REQUIRE(equals != std::string::npos, ExitCode::usage,
                "--set {0}: write --set section.key=value, e.g. --set train.lr=1e-3", assignment);
  const std::string key = trimmed(assignment.substr(0, equals));
  const std::string text = trimmed(assignment.substr(equals + 1));
  const Target target = find_target(key);
  ARCUS_REQUIRE(target.section != nullptr, ExitCode::usage, "--set {}: {}", assignment,
                unknown_set_key(key));

  std::optional<toml::table> parsed = parse_value(text);
  const bool text_option = target.option != nullptr && target.option->type == ValueType::text;
  if (!parsed || (text_option && !(*parsed)["value"].is_string())) {
    toml::table bare;
    bare.insert_or_assign("value", text);
    parsed = std::move(bare);
  }
  Reader reader(config, "--set " + assignment, /*has_lines=*/false);
  const toml::node& node = *parsed->get("value");
  if (target.option == nullptr) {
    reader.read_rows(*target.section, node);
  } else {
    reader.read_option(*target.section, *target.option, target_row(target, config, assignment),
                       node);
  }
  reader.finish();
}

std::string to_toml(const Config& config) {
  Config copy = config;
  std::string text;
  for (const Section& section : option_table()) {
    for (const void* row : section.rows(copy)) print_row(text, section, row);
  }
  return text;
}

std::string changed_from_defaults(const Config& config) {
  Config copy = config;
  std::string text;
  for (const Section& section : option_table()) {
    std::size_t row_idx = 0;
    for (const void* row : section.rows(copy)) {
      const std::string prefix =
          section.is_array ? fmt::format("{}.{}", section.name, row_idx++) : section.name;
      for (const Option& option : section.options) {
        const Value value = option.get(row);
        const bool is_default = !option.given && value == option.get(section.defaults.get());
        if (is_default || !option.is_given(row)) continue;
        text += fmt::format("{}.{} = {}\n", prefix, option.name, to_toml_text(option, value));
      }
    }
  }
  return text;
}

std::string differences(const Config& before, const Config& after) {
  Config a = before;
  Config b = after;
  std::string text;
  for (const Section& section : option_table()) {
    const std::vector<void*> rows_a = section.rows(a);
    const std::vector<void*> rows_b = section.rows(b);
    if (rows_a.size() != rows_b.size()) {
      text += fmt::format("{}: {} rows -> {}\n", section.name, rows_a.size(), rows_b.size());
      continue;
    }
    for (std::size_t i = 0; i < rows_a.size(); ++i) {
      const std::string prefix =
          section.is_array ? fmt::format("{}.{}", section.name, i) : section.name;
      for (const Option& option : section.options) {
        const std::string value_a = shown(option, rows_a[i]);
        const std::string value_b = shown(option, rows_b[i]);
        if (value_a == value_b) continue;
        text += fmt::format("{}.{}: {} -> {}\n", prefix, option.name, value_a, value_b);
      }
    }
  }
  return text;
}

std::string config_help() {
  std::string text =
      "# Every key with its default; this text is itself a valid configuration file.\n";
  for (const Section& section : option_table()) {
    // Rows of an array have no defaults to be in force: they are shown as comments.
    const std::string_view comment = section.is_array ? "# " : "";
    text += fmt::format("\n# {}.\n{}{}\n", section.help, comment, bracketed(section));
    for (const Option& option : section.options) {
      const std::string assignment =
          fmt::format("{}{} = {}", comment, option.name,
                      to_toml_text(option, option.get(section.defaults.get())));
      text += fmt::format("{:<36}# {} ({})\n", assignment, option.help, allowed_values(option));
    }
  }
  return text;
}

namespace {

/// "4-7" or "4".
std::pair<std::int64_t, std::int64_t> parse_layers(const std::string& text) {
  std::int64_t first = -1;
  std::int64_t last = -1;
  const char* const end = text.data() + text.size();
  auto parsed = std::from_chars(text.data(), end, first);
  last = first;
  if (parsed.ec == std::errc() && parsed.ptr != end && *parsed.ptr == '-') {
    parsed = std::from_chars(parsed.ptr + 1, end, last);
  }
  ARCUS_REQUIRE(parsed.ec == std::errc() && parsed.ptr == end && first >= 0, ExitCode::usage,
                "routing.override.layers is \"{}\"; it must be a layer or a range such as \"4-7\"",
                text);
  return {first, last};
}

}  // namespace

std::vector<RoutingOverride> resolve_overrides(const Config& config) {
  std::vector<RoutingOverride> overrides;
  const Section& routing = *find_section("routing");
  for (const RoutingOverrideRow& row : config.routing_overrides) {
    const auto [first, last] = parse_layers(row.layers);
    RoutingOverride result{first, last, {config.model.topk, config.routing}};
    for (const Option& option : routing.options) {
      if (row.given.contains(option.name))
        option.set(&result.with.routing, option.get(&row.routing));
    }
    if (row.given.contains("topk")) result.with.topk = row.topk;
    overrides.push_back(std::move(result));
  }
  return overrides;
}

std::vector<std::string> keys_without_effect(const Config& config) {
  const Section& section = *find_section("routing");
  const std::vector<RoutingOverride> overrides = resolve_overrides(config);
  std::vector<std::string> lines;
  const auto report = [&](const std::string& prefix, const KeyUse& use, const RoutingConfig& row) {
    const Option& option = *section.find(std::string(use.key));
    const Value value = option.get(&row);
    if (value == option.get(section.defaults.get())) return;
    lines.push_back(fmt::format("{}.{} = {} has no effect without {}", prefix, use.key,
                                to_toml_text(option, value), use.needs));
  };
  std::int64_t overridden = 0;
  for (const RoutingOverride& o : overrides) overridden += o.last_layer - o.first_layer + 1;
  const bool others = config.model.num_layers - config.model.first_k_dense > overridden;
  for (const KeyUse& use : key_uses()) {
    // Layers that an override names take the key from [routing] where their row does not give it.
    const std::int64_t experts = config.model.num_experts;
    bool used = others && use.used(config.routing, config.model.topk == experts);
    for (std::size_t i = 0; i < overrides.size(); ++i) {
      const auto& [topk, routing] = overrides[i].with;
      const bool used_here = use.used(routing, topk == experts);
      if (!config.routing_overrides[i].given.contains(std::string(use.key))) {
        used = used || used_here;
      } else if (!used_here) {
        report(fmt::format("routing.override.{}", i), use, routing);
      }
    }
    if (!used) report("routing", use, config.routing);
  }
  return lines;
}

}  // namespace arcus
