#include "launch/option_table.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <set>

#include "launch/run_config.hpp"
#include "src/base/error.hpp"

namespace arcus {
namespace {

std::string full_key(const Section& section, const Option& option) {
  return section.name + (section.is_array ? ".0." : ".") + option.name;
}

/// A value that `option` takes and that is not `current`.
Value another_value(const Option& option, const Value& current) {
  std::vector<Value> candidates;
  switch (option.type) {
    case ValueType::boolean:
      candidates = {Value(true), Value(false)};
      break;
    case ValueType::integer:
      candidates = {Value(std::int64_t{7}), Value(std::int64_t{8})};
      break;
    case ValueType::number:
      candidates = {Value(0.1 + 0.2), Value(0.7), Value(1e6 / 7)};
      break;
    case ValueType::text:
      for (const auto& choice : option.limits.choices) candidates.emplace_back(choice);
      candidates.emplace_back("a \"quoted\" \\ text with a tab\t and \u4e2d\u6587 # no comment");
  }
  for (const Value& candidate : candidates) {
    if (candidate != current && check_value(option, candidate).empty()) return candidate;
  }
  ADD_FAILURE() << "no other value for " << option.name;
  return current;
}

/// Compares every key, doubles by their bits.
void expect_equal(Config a, Config b) {
  for (const Section& section : option_table()) {
    const auto rows_a = section.rows(a);
    const auto rows_b = section.rows(b);
    ASSERT_EQ(rows_a.size(), rows_b.size()) << section.name;
    for (std::size_t i = 0; i < rows_a.size(); ++i) {
      for (const Option& option : section.options) {
        const Value va = option.get(rows_a[i]);
        const Value vb = option.get(rows_b[i]);
        EXPECT_EQ(va, vb) << full_key(section, option);
        if (const double* da = std::get_if<double>(&va)) {
          EXPECT_EQ(std::bit_cast<std::uint64_t>(*da),
                    std::bit_cast<std::uint64_t>(std::get<double>(vb)))
              << full_key(section, option);
        }
      }
    }
  }
}

Config with_every_key_changed() {
  Config config;
  for (const Section& section : option_table()) {
    if (section.is_array) {
      section.append(config);
      section.append(config);
    }
    for (void* row : section.rows(config)) {
      for (const Option& option : section.options) {
        option.set(row, another_value(option, option.get(row)));
      }
    }
  }
  return config;
}

TEST(OptionTable, NamesAreUniqueAndEveryKeyIsDocumented) {
  std::set<std::string> names;
  for (const Section& section : option_table()) {
    EXPECT_TRUE(names.insert(section.name).second) << section.name;
    EXPECT_FALSE(section.help.empty()) << section.name;
    EXPECT_FALSE(section.options.empty()) << section.name;
    for (const Option& option : section.options) {
      EXPECT_TRUE(names.insert(full_key(section, option)).second) << option.name;
      EXPECT_GE(option.help.size(), 10U) << full_key(section, option);
      EXPECT_NE(config_help().find(option.name + " = "), std::string::npos);
      EXPECT_NE(config_help().find(option.help), std::string::npos);
    }
  }
}

TEST(OptionTable, EveryDefaultIsAllowed) {
  for (const Section& section : option_table()) {
    for (const Option& option : section.options) {
      EXPECT_EQ(check_value(option, option.get(section.defaults.get())), "")
          << full_key(section, option);
    }
  }
}

TEST(OptionTable, DefaultsRoundTrip) {
  expect_equal(from_toml(to_toml(Config()), "text"), Config());
  EXPECT_EQ(changed_from_defaults(Config()), "");
}

TEST(OptionTable, EveryKeyRoundTripsWithAnotherValue) {
  const Config config = with_every_key_changed();
  expect_equal(from_toml(to_toml(config), "text"), config);
  EXPECT_EQ(to_toml(from_toml(to_toml(config), "text")), to_toml(config));
}

TEST(OptionTable, HelpIsAValidConfigurationOfDefaults) {
  expect_equal(from_toml(config_help(), "help"), Config());
}

TEST(OptionTable, EveryKeyCanBeSetFromTheCommandLine) {
  for (const Section& section : option_table()) {
    for (const Option& option : section.options) {
      const Value wanted = another_value(option, option.get(section.defaults.get()));
      Config config;
      apply_set(config, full_key(section, option) + "=" + to_toml_text(option, wanted));
      EXPECT_EQ(option.get(section.rows(config).front()), wanted) << full_key(section, option);
      EXPECT_EQ(changed_from_defaults(config),
                full_key(section, option) + " = " + to_toml_text(option, wanted) + "\n");
    }
  }
}

/// All words one edit away: a letter left out, doubled, replaced, two swapped.
std::set<std::string> misspellings(const std::string& word) {
  std::set<std::string> result;
  for (std::size_t i = 0; i < word.size(); ++i) {
    result.insert(word.substr(0, i) + word.substr(i + 1));
    result.insert(word.substr(0, i) + word[i] + word.substr(i));
    result.insert(word.substr(0, i) + "x" + word.substr(i + 1));
    if (i + 1 < word.size()) {
      std::string swapped = word;
      std::swap(swapped[i], swapped[i + 1]);
      result.insert(swapped);
    }
  }
  return result;
}

/// The message for a file that holds `name = 1` in `section`.
std::string message_for(const Section& section, const std::string& name) {
  const std::string header =
      section.is_array ? "[[" + section.name + "]]" : "[" + section.name + "]";
  try {
    from_toml(header + "\n" + name + " = 1\n", "run.toml");
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(OptionTable, EveryMisspellingByOneEditSuggestsTheKey) {
  for (const Section& section : option_table()) {
    for (const Option& option : section.options) {
      for (const std::string& wrong : misspellings(option.name)) {
        if (wrong.empty() || section.find(wrong) != nullptr) continue;
        const std::string message = message_for(section, wrong);
        const std::string key = section.name + "." + option.name;
        EXPECT_NE(message.find("run.toml:2: unknown key " + section.name + "." + wrong),
                  std::string::npos)
            << message;
        const std::size_t hint = message.find("did you mean ");
        ASSERT_NE(hint, std::string::npos) << message;
        EXPECT_NE(message.find(key, hint), std::string::npos) << message;
      }
    }
  }
}

TEST(OptionTable, NearestNamesAreNearAndEquallyNear) {
  const std::vector<std::string> names = {"beta1", "beta2", "steps", "lr"};
  EXPECT_EQ(nearest_names("beta3", names), (std::vector<std::string>{"beta1", "beta2"}));
  EXPECT_EQ(nearest_names("step", names), (std::vector<std::string>{"steps"}));
  EXPECT_EQ(nearest_names("rl", names), (std::vector<std::string>{"lr"}));
  EXPECT_TRUE(nearest_names("momentum", names).empty());
  EXPECT_TRUE(nearest_names("xy", names).empty());
}

}  // namespace
}  // namespace arcus
