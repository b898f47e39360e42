#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

namespace arcus {

struct Config;

enum class ValueType { boolean, integer, number, text };

/// One key's value on its way between a Config and TOML.
using Value = std::variant<bool, std::int64_t, double, std::string>;

/// Which values an option takes.
struct Limits {
  std::optional<double> min;
  std::optional<double> max;
  bool min_excluded = false;
  bool max_excluded = false;
  std::vector<std::string> choices;  ///< of a text; empty = any
  bool auto_is_zero = false;         ///< written "auto", kept as 0
};

/// One key of the configuration: everything that reading, printing, help and checks need.
struct Option {
  std::string name;  ///< inside its section
  ValueType type = ValueType::text;
  std::string help;
  Limits limits;
  /// Of the struct that the section's row points to.
  std::function<Value(const void*)> get;
  std::function<void(void*, const Value&)> set;
  /// Whether a row gives the key at all; null: every row does.
  std::function<bool(const void*)> given;

  bool is_given(const void* row) const { return !given || given(row); }
};

/// One [section], or one [[section]] whose rows sit in an array.
struct Section {
  std::string name;  ///< dotted, e.g. "train.group"
  std::string help;
  bool is_array = false;
  std::vector<Option> options;
  /// The structs behind the section: one, or one per array row.
  std::function<std::vector<void*>(Config&)> rows;
  /// Arrays only: adds a row of defaults and returns it; removes all rows.
  std::function<void*(Config&)> append;
  std::function<void(Config&)> clear;
  /// A struct of defaults, for help and for finding out what a run changes.
  std::shared_ptr<const void> defaults;

  const Option* find(const std::string& option) const;
};

/// Every key of the configuration, in the order in which it is printed.
const std::vector<Section>& option_table();
const Section* find_section(const std::string& name);

/// "a whole number", "a number", "true or false", "text".
std::string type_name(ValueType type);
/// What would do, in words, e.g. "a number above 0" or `"mpi", "nccl" or "auto"`.
std::string allowed_values(const Option& option);
/// TOML text of a value; doubles in their shortest form that reads back to the same bits.
std::string to_toml_text(const Option& option, const Value& value);
/// Empty when `value` may be given to `option`, else what is wrong with it.
std::string check_value(const Option& option, const Value& value);

/// The names in `candidates` nearest to `word` (several if equally near), none when all are far:
/// more than a third of the letters (at least two) would have to change.
std::vector<std::string> nearest_names(const std::string& word,
                                       const std::vector<std::string>& candidates);

}  // namespace arcus
