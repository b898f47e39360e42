#include <regex>
#include <set>

#include "launch/run_config.hpp"
#include "src/base/error.hpp"
#include "src/train/schedule.hpp"

namespace arcus {
namespace {

void validate_groups(const std::vector<ParamGroupConfig>& groups) {
  for (std::size_t i = 0; i < groups.size(); ++i) {
    ARCUS_REQUIRE(!groups[i].match.empty(), ExitCode::usage,
                  "train.group.{}.match is missing; give a regular expression such as \"embed\"",
                  i);
    try {
      const std::regex pattern(groups[i].match, std::regex::ECMAScript);
    } catch (const std::regex_error& error) {
      ARCUS_FAIL(ExitCode::usage,
                 "train.group.{}.match = \"{}\" is no regular expression: {}; a plain part of the "
                 "name such as \"experts\" will do",
                 i, groups[i].match, error.what());
    }
  }
}

void validate_domains(const std::vector<DomainConfig>& domains) {
  std::set<std::string> names;
  for (std::size_t i = 0; i < domains.size(); ++i) {
    ARCUS_REQUIRE(!domains[i].name.empty(), ExitCode::usage,
                  "data.domain.{}.name is missing; give the name of a domain of the prepared data",
                  i);
    ARCUS_REQUIRE(names.insert(domains[i].name).second, ExitCode::usage,
                  "data.domain \"{}\" is given twice; add the two weights", domains[i].name);
  }
}

void validate_capacity(const Config& config) {
  const std::int64_t tokens = config.train.seq_len * config.train.micro_batch_seqs;
  ARCUS_REQUIRE(
      config.routing.min_capacity <= tokens, ExitCode::usage,
      "routing.min_capacity ({}) exceeds the {} tokens of a micro-batch (train.seq_len {} "
      "x train.micro_batch_seqs {}); set it to {} or less, or capacity_factor to 0",
      config.routing.min_capacity, tokens, config.train.seq_len, config.train.micro_batch_seqs,
      tokens);
}

}  // namespace

void validate(const Config& config) {
  validate(config.model, config.routing);
  validate(config.train);
  validate_groups(config.groups);
  validate_domains(config.data.domains);
  validate_capacity(config);
}

}  // namespace arcus
