#include "launch/run_config.hpp"

#include <gtest/gtest.h>

#include <array>
#include <filesystem>
#include <fstream>
#include <functional>
#include <regex>
#include <set>

#include "src/base/error.hpp"
#include "src/base/rng.hpp"
#include "src/model/routing.hpp"
#include "src/model/routing_rules.hpp"

namespace arcus {
namespace {

/// The message of the usage error that `fn` throws, "" when it throws nothing.
std::string usage_error(const std::function<void()>& fn) {
  try {
    fn();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::usage) << error.what();
    return error.what();
  }
  return "";
}

struct BadText {
  const char* text;
  const char* expected;
};

TEST(RunConfig, BadTextsAreRefusedByNameAndRemedy) {
  const std::array bad = {
      BadText{"[train]\nlrr = 1", "c.toml:2: unknown key train.lrr; did you mean train.lr?"},
      BadText{"[train]\nhidden_size = 1",
              "c.toml:2: unknown key train.hidden_size; hidden_size is a key of [model]"},
      BadText{"[train]\nmomentum_of_inertia = 1", "`arcus help config` lists every key"},
      BadText{"[trian]\nlr = 1", "c.toml:1: unknown section trian; did you mean train?"},
      BadText{"steps = 3", "c.toml:1: unknown section steps; steps is a key of [train]"},
      BadText{"[train]\nlr = \"fast\"", "train.lr must be a number above 0, not text"},
      BadText{"[train]\nlr = -1.0", "c.toml:2: train.lr = -1.0: must be a number above 0"},
      BadText{"[train]\nlr = nan", "must be a number above 0"},
      BadText{"[train]\nlr = inf", "must be a number above 0"},
      BadText{"[train]\nsteps = 1.5", "train.steps must be a whole number of at least 1, not"},
      BadText{"[train]\nsteps = 0", "train.steps = 0: must be a whole number of at least 1"},
      BadText{"[train]\nbeta1 = 1",
              "train.beta1 = 1.0: must be a number of at least 0 and below 1"},
      BadText{"[train]\nrecompute = 1", "train.recompute must be true or false, not"},
      BadText{"[train]\nschedule = \"cosin\"", "did you mean \"cosine\"?"},
      BadText{"[train]\ndtype = \"fp8\"", "must be \"f32\" or \"bf16\""},
      BadText{"[model]\nvocab_size = \"large\"", "\"auto\" or a whole number"},
      BadText{"[run]\nseed = -1", "run.seed = -1: must be a whole number of at least 0"},
      BadText{"[run]\nseed = 99999999999999999999", "c.toml:2"},
      BadText{"[train]\nlr = 1\nlr = 2", "c.toml:3"},
      BadText{"[train]\nlr = 1\n[train]\nsteps = 2", "c.toml:3"},
      BadText{"[train]\nlr = ", "c.toml:2"},
      BadText{"[[train]]\nlr = 1", "there is one section train: write [train], not [[train]]"},
      BadText{"train = 3", "train is a section: write [train] above its keys"},
      BadText{"[train.group]\nmatch = \"a\"",
              "train.group takes several rows: write [[train.group]] above its keys"},
      BadText{"[train]\ngroup = [1]", "a row of train.group must be a table"},
      BadText{"[[data.domain]]\nnames = \"c\"", "did you mean data.domain.name?"},
      BadText{"[train]\nlr = {}", "train.lr must be a number above 0, not a section"},
  };
  for (const BadText& c : bad) {
    const std::string message = usage_error([&] { from_toml(c.text, "c.toml"); });
    EXPECT_NE(message.find(c.expected), std::string::npos) << c.text << "\n-> " << message;
  }
}

TEST(RunConfig, SeveralProblemsComeInOneMessageInLineOrder) {
  const std::string message = usage_error(
      [] { from_toml("[train]\nstepps = 1\nlr = 0\n[model]\nnum_expert = 3\n", "c.toml"); });
  const auto first = message.find("c.toml:2");
  const auto second = message.find("c.toml:3");
  const auto third = message.find("c.toml:5");
  EXPECT_LT(first, second);
  EXPECT_LT(second, third);
  EXPECT_NE(third, std::string::npos);
}

TEST(RunConfig, BadSetsAreRefused) {
  const std::array bad = {
      BadText{"train.lr", "write --set section.key=value"},
      BadText{"lr=1", "unknown key lr; did you mean train.lr?"},
      BadText{"train.lrr=1", "unknown key train.lrr; did you mean train.lr?"},
      BadText{"trian.lr=1", "unknown key trian.lr; did you mean train.lr?"},
      BadText{"train.steps=many", "train.steps must be a whole number of at least 1, not text"},
      BadText{"train.steps=-3", "train.steps = -3"},
      BadText{"parallel.ep_size=0", "must be \"auto\" or a whole number of at least 1"},
      BadText{"train.lr=", "train.lr must be a number above 0"},
      BadText{"train.group.1.match=a", "train.group has 0 rows; the next one is train.group.0"},
      BadText{"train.group.match=a", "did you mean train.group.0.match?"},
      BadText{"data.domain=c", "data.domain takes several rows"},
      BadText{"data.domain=[{nam=\"c\"}]", "did you mean data.domain.name?"},
  };
  for (const BadText& c : bad) {
    Config config;
    const std::string message = usage_error([&] { apply_set(config, c.text); });
    EXPECT_NE(message.find(std::string("--set ") + c.text), std::string::npos) << message;
    EXPECT_NE(message.find(c.expected), std::string::npos) << c.text << "\n-> " << message;
  }
}

TEST(RunConfig, SetsTakeBareWordsNumbersAndRows) {
  Config config;
  for (const char* assignment :
       {"run.dir=runs/first", "run.data = 2024", "train.lr=1e-3", "train.steps=7",
        "train.schedule=wsd", "train.recompute=true", "parallel.ep_size=auto",
        "train.group.0.match=embed|gate", "train.group.0.frozen=true", "train.group.1.match=[ab]",
        "data.domain=[{name = \"c\", weight = 2}, {name = \"prose\"}]", "data.domain.1.weight=3"}) {
    apply_set(config, assignment);
  }
  EXPECT_EQ(config.run.dir, "runs/first");
  EXPECT_EQ(config.run.data, "2024");
  EXPECT_EQ(config.train.lr, 1e-3);
  EXPECT_EQ(config.train.steps, 7);
  EXPECT_EQ(config.train.schedule, "wsd");
  EXPECT_TRUE(config.train.recompute);
  EXPECT_EQ(config.parallel.ep_size, 0);
  ASSERT_EQ(config.groups.size(), 2U);
  EXPECT_EQ(config.groups[0].match, "embed|gate");
  EXPECT_TRUE(config.groups[0].frozen);
  EXPECT_EQ(config.groups[1].match, "[ab]");
  ASSERT_EQ(config.data.domains.size(), 2U);
  EXPECT_EQ(config.data.domains[0].name, "c");
  EXPECT_EQ(config.data.domains[0].weight, 2);
  EXPECT_EQ(config.data.domains[1].weight, 3);
  apply_set(config, "data.domain=[]");
  EXPECT_TRUE(config.data.domains.empty());
}

TEST(RunConfig, AutoIsKeptAsZeroAndPrintedAsAuto) {
  const Config config = from_toml("[model]\nvocab_size = \"auto\"\n[parallel]\nep_size = 4\n", "c");
  EXPECT_EQ(config.model.vocab_size, 0);
  EXPECT_EQ(config.parallel.ep_size, 4);
  EXPECT_NE(to_toml(config).find("vocab_size = \"auto\""), std::string::npos);
}

struct BadRule {
  std::vector<std::string> sets;
  const char* expected;
};

/// Each combination must be refused with its message.
void expect_refused(const std::vector<BadRule>& bad) {
  for (const BadRule& c : bad) {
    Config config;
    for (const std::string& assignment : c.sets) apply_set(config, assignment);
    const std::string message = usage_error([&] { validate(config); });
    EXPECT_NE(message.find(c.expected), std::string::npos) << c.sets[0] << "\n-> " << message;
  }
}

TEST(RunConfig, CrossFieldRulesNameFieldsValuesAndARemedy) {
  const std::vector<BadRule> bad = {
      {{"train.global_batch_seqs=7", "train.micro_batch_seqs=2"},
       "train.global_batch_seqs (7) must be a multiple of train.micro_batch_seqs (2); set "
       "global_batch_seqs to 8"},
      {{"train.steps=10", "train.warmup_steps=11"},
       "train.warmup_steps (11) must be between 0 and train.steps (10)"},
      {{"train.eps=1e-12"}, "train.eps is 1e-12; with gradients summed in units of 2^-50"},
      {{"train.group.0.lr_scale=2"}, "train.group.0.match is missing"},
      {{"train.group.0.match=\"(\""}, "is no regular expression"},
      {{"data.domain.0.weight=2"}, "data.domain.0.name is missing"},
      {{"data.domain.0.name=c", "data.domain.1.name=c"}, "data.domain \"c\" is given twice"},
      {{"model.topk=9"}, "model.topk (9) exceeds model.num_experts (8)"},
      {{"model.topk=1"}, "routing.renormalize"},
      {{"model.num_kv_heads=3"}, "model.num_kv_heads (3)"},
      {{"model.head_dim=5"}, "model.head_dim (5) must be even"},
      {{"model.position=learned"},
       "model.position is \"learned\" and model.max_positions is 0; set max_positions to"},
      {{"model.position=learned", "model.max_positions=255"},
       "train.seq_len (256) exceeds model.max_positions (255), the positions that the model "
       "learns; set seq_len to at most 255"},
      {{"routing.min_capacity=100000"}, "routing.min_capacity (100000) exceeds the 512 tokens"},
  };
  EXPECT_EQ(usage_error([] { validate(Config()); }), "");
  expect_refused(bad);
}

TEST(RunConfig, BlocksLikeGpt2sAreAccepted) {
  Config config;
  for (const char* assignment :
       {"model.norm=layer", "model.activation=gelu_new", "model.mlp_bias=true", "model.o_bias=true",
        "model.position=learned", "model.max_positions=256", "model.head_dim=5"}) {
    apply_set(config, assignment);
  }
  EXPECT_EQ(usage_error([&] { validate(config); }), "");
  apply_set(config, "model.position=none");
  apply_set(config, "model.max_positions=0");
  EXPECT_EQ(usage_error([&] { validate(config); }), "");
}

TEST(RunConfig, RoutingsThatMakeNoSenseAreRefusedWithOneThatDoes) {
  const std::vector<BadRule> bad = {
      {{"routing.n_group=4", "routing.topk_group=4"},
       "routing.topk_group (4) must be smaller than routing.n_group (4); set routing.n_group to 1 "
       "and routing.topk_group "
       "to 1"},
      {{"routing.n_group=3"}, "routing.n_group (3) must divide model.num_experts (8)"},
      {{"routing.topk_group=2"}, "routing.topk_group (2) needs groups"},
      {{"routing.n_group=4", "routing.topk_group=1", "model.topk=3"},
       "model.topk (3) exceeds the 2 experts that routing.topk_group (1) groups of 2 hold; set "
       "routing.topk_group to 2, or set routing.n_group to 1 and routing.topk_group to 1"},
      {{"routing.n_group=8", "routing.topk_group=4"},
       "\"top2_sum\" needs groups of two experts or more"},
      {{"routing.select=sinkhorn", "routing.expert_bias_rate=0.001"},
       "does not go with routing.expert_bias_rate = 0.001; set routing.expert_bias_rate to 0, or "
       "set routing.select "
       "to \"topk\""},
      {{"routing.select=dense"}, "does not go with model.topk = 2; set model.topk to 8"},
      {{"routing.select=dense", "model.topk=8", "routing.aux_loss=0", "routing.capacity_factor=1"},
       "does not go with routing.capacity_factor = 1; set routing.capacity_factor to 0"},
      {{"routing.select=hash"},
       "does not go with routing.aux_loss = 0.01; set routing.aux_loss to 0"},
      {{"routing.select=hash", "routing.aux_loss=0", "routing.noise=1"},
       "does not go with routing.noise = 1"},
      {{"routing.select=second_sampled", "model.topk=3"},
       "does not go with model.topk = 3; set model.topk to 2"},
      {{"routing.select=expert_choice", "routing.aux_loss=0", "routing.capacity_factor=1",
        "routing.renormalize=false"},
       "looks at later tokens"},
      {{"routing.select=expert_choice"}, "does not go with routing.capacity_factor = 0"},
      {{"routing.load_loss=0.1"}, "routing.load_loss (0.1) counts chances under noise"},
      {{"routing.load_loss=0.1", "routing.noise=1", "model.topk=8"}, "needs model.topk (8) below"},
      {{"routing.center_bias=true"},
       "set routing.center_bias to false, or set routing.expert_bias_rate to 0.001"},
      {{"routing.quantile_rate=0.5", "routing.expert_bias_rate=0.1"}, "set the same bias"},
      {{"routing.quantile_rate=0.5", "model.topk=8"}, "needs model.topk (8) below"},
      {{"routing.override.0.layers=2-9", "routing.override.0.z_loss=1"},
       "layers \"2-9\" are not all MoE layers; those are 0-3"},
      {{"routing.override.0.layers=1-0", "routing.override.0.z_loss=1"}, "end before they begin"},
      {{"model.first_k_dense=4", "routing.override.0.layers=1", "routing.override.0.z_loss=1"},
       "no layer routes"},
      {{"routing.override.0.layers=1", "routing.override.0.min_capacity=1000"},
       "routing.min_capacity (1000) exceeds the 512 tokens"},
      {{"routing.pad_to_capacity=true"},
       "set routing.pad_to_capacity to false, or set routing.capacity_factor to 1.25"},
      {{"routing.pad_to_capacity=true", "routing.capacity_factor=1", "routing.stream=threshold"},
       "lets any number pass by; set routing.stream to \"weighted\""},
      {{"routing.stream=capacity"}, "looks at later tokens"},
      {{"routing.stream_target_loss=0.1"},
       "needs a decision layer, but routing.stream is \"none\"; set routing.stream_target_loss to "
       "0, or set routing.stream to \"threshold\""},
      {{"routing.stream=threshold", "routing.quantile_rate=0.5"},
       "set routing.stream to \"weighted\""},
      {{"routing.override.0.layers=some"}, "it must be a layer or a range such as \"4-7\""},
      {{"routing.override.0.layers=1-2", "routing.override.1.layers=2"}, "layer 2 is named twice"},
      {{"routing.override.0.layers=1", "routing.override.0.topk=9"},
       "in layer 1: model.topk (9) exceeds model.num_experts (8)"},
  };
  expect_refused(bad);
}

/// Values that keys of a routing may have, nonsensical together or not.
const std::vector<std::vector<std::string>>& setting_choices() {
  static const std::vector<std::vector<std::string>> choices{
      {"model.num_experts=1", "model.num_experts=2", "model.num_experts=8"},
      {"model.topk=1", "model.topk=2", "model.topk=3", "model.topk=8"},
      {"routing.select=topk", "routing.select=second_sampled", "routing.select=hash",
       "routing.select=sinkhorn", "routing.select=expert_choice", "routing.select=dense"},
      {"routing.stream=none", "routing.stream=threshold", "routing.stream=weighted",
       "routing.stream=capacity"},
      {"routing.renormalize=true", "routing.renormalize=false"},
      {"routing.renormalize_after_drop=false", "routing.renormalize_after_drop=true"},
      {"routing.n_group=1", "routing.n_group=2", "routing.n_group=3", "routing.n_group=8"},
      {"routing.topk_group=1", "routing.topk_group=2", "routing.topk_group=7"},
      {"routing.group_score=top2_sum", "routing.group_score=max"},
      {"routing.capacity_factor=0", "routing.capacity_factor=1", "routing.capacity_factor=1e-9"},
      {"routing.eval_capacity_factor=0", "routing.eval_capacity_factor=2",
       "routing.eval_capacity_factor=1e-9"},
      {"routing.pad_to_capacity=false", "routing.pad_to_capacity=true"},
      {"routing.aux_loss=0", "routing.aux_loss=0.1"},
      {"routing.aux_scope=micro_batch", "routing.aux_scope=sequence", "routing.aux_scope=global"},
      {"routing.aux_loss_sequence=0", "routing.aux_loss_sequence=0.1"},
      {"routing.aux_loss_global=0", "routing.aux_loss_global=0.1"},
      {"routing.importance_loss=0", "routing.importance_loss=0.1"},
      {"routing.load_loss=0", "routing.load_loss=0.1"},
      {"routing.expert_bias_rate=0", "routing.expert_bias_rate=0.01"},
      {"routing.center_bias=false", "routing.center_bias=true"},
      {"routing.quantile_rate=0", "routing.quantile_rate=0.5"},
      {"routing.noise=0", "routing.noise=1"},
      {"routing.jitter=0", "routing.jitter=0.1"},
      {"routing.allow_future_leak=false", "routing.allow_future_leak=true"},
      {"routing.stream_target_loss=0", "routing.stream_target_loss=0.1"}};
  return choices;
}

std::vector<bool> rules_that_hold(const Config& config) {
  std::vector<bool> holds;
  for (const RoutingRule& rule : routing_rules()) {
    holds.push_back(rule.check(config.model, config.routing).empty());
  }
  return holds;
}

/// Every remedy of every broken rule makes it hold and breaks none that held, so that a user who
/// follows the messages, in any way, ends at a configuration that is accepted.
void expect_remedies_do(const Config& config, std::vector<int>& broken) {
  const std::vector<bool> before = rules_that_hold(config);
  for (std::size_t i = 0; i < before.size(); ++i) {
    if (before[i]) continue;
    ++broken[i];
    const Refusal refusal = routing_rules()[i].check(config.model, config.routing);
    for (const std::vector<Setting>& remedy : refusal.remedies) {
      Config changed = config;
      std::string applied;
      for (const Setting& setting : remedy) {
        apply_set(changed, setting.key + "=" + setting.value);
        applied += " " + setting.key + "=" + setting.value;
      }
      const std::vector<bool> after = rules_that_hold(changed);
      EXPECT_TRUE(after[i]) << applied << " does not help: " << refusal.message();
      for (std::size_t j = 0; j < after.size(); ++j) {
        EXPECT_TRUE(after[j] || !before[j]) << applied << " (" << refusal.message() << ") breaks \""
                                            << routing_rules()[j].rule << "\" in\n"
                                            << changed_from_defaults(config);
      }
    }
  }
}

TEST(RunConfig, WhatARefusalNamesInsteadIsAccepted) {
  std::vector<int> broken(routing_rules().size());
  const Rng rng(1, "remedies", "");
  std::uint64_t number = 0;
  constexpr int kConfigs = 4000;
  int accepted = 0;
  for (int i = 0; i < kConfigs && !::testing::Test::HasFailure(); ++i) {
    Config config;
    for (const auto& choices : setting_choices()) {
      // Most keys at their first value, so that a rule is also seen broken alone.
      const auto draw = static_cast<std::size_t>(rng.uniform(0, number++) * 2.5 *
                                                 static_cast<double>(choices.size()));
      if (draw < choices.size()) apply_set(config, choices[draw]);
    }
    expect_remedies_do(config, broken);
    const std::vector<bool> holds = rules_that_hold(config);
    const bool all = std::find(holds.begin(), holds.end(), false) == holds.end();
    accepted += all ? 1 : 0;
    EXPECT_EQ(usage_error([&] { check_routing(config.model, config.routing); }).empty(), all);
  }
  if (::testing::Test::HasFailure()) return;
  EXPECT_GT(accepted, 0);
  for (std::size_t i = 0; i < broken.size(); ++i) {
    EXPECT_GT(broken[i], 0) << "never broken: " << routing_rules()[i].rule;
  }
}

/// The settings that a message proposes: the first remedy ("set K to V and K to V") and what it
/// says is then needed too ("then also K = V and K = V").
std::vector<std::string> proposed_settings(const std::string& message) {
  std::vector<std::string> settings;
  const auto collect = [&](const std::string& text, const char* pattern) {
    const std::regex setting(pattern);
    for (auto it = std::sregex_iterator(text.begin(), text.end(), setting);
         it != std::sregex_iterator(); ++it) {
      settings.push_back((*it)[1].str() + "=" + (*it)[2].str());
    }
  };
  const std::string first = message.substr(message.find("; set ") + 2);
  const std::size_t also = first.find("then also ");
  collect(first.substr(0, std::min(first.find(", or set"), also)),
          "(?:set|and) (\\S+) to (\\S+?)(?=,|;|$| and| if)");
  if (also != std::string::npos) {
    collect(first.substr(also), "(?:also|and) (\\S+) = (\\S+?)(?=,|$| and| if)");
  }
  return settings;
}

// One message names a combination that would do, however many rules are broken.
TEST(RunConfig, ARefusalNamesAWholeCombinationThatWouldDo) {
  const Rng rng(2, "combinations", "");
  std::uint64_t number = 0;
  int refused = 0;
  for (int i = 0; i < 1000 && !::testing::Test::HasFailure(); ++i) {
    Config config;
    for (const auto& choices : setting_choices()) {
      const auto draw = static_cast<std::size_t>(rng.uniform(0, number++) * 2.5 *
                                                 static_cast<double>(choices.size()));
      if (draw < choices.size()) apply_set(config, choices[draw]);
    }
    const std::string message = usage_error([&] { validate(config); });
    if (message.empty()) continue;
    ++refused;
    Config changed = config;
    for (const std::string& setting : proposed_settings(message)) apply_set(changed, setting);
    EXPECT_EQ(usage_error([&] { validate(changed); }), "") << message;
  }
  EXPECT_GT(refused, 100);
}

// The same for a layer of its own: what the message names is that row's key.
TEST(RunConfig, RemediesOfAnOverrideNameItsKeys) {
  Config config;
  for (const char* assignment :
       {"routing.aux_loss=0.02", "routing.override.0.layers=0", "routing.override.0.z_loss=1",
        "routing.override.1.layers=1", "routing.override.1.select=hash",
        "routing.override.1.topk=1", "routing.override.1.n_group=2"}) {
    apply_set(config, assignment);
  }
  const std::string message = usage_error([&] { validate(config); });
  EXPECT_TRUE(message.starts_with("in layer 1: ")) << message;
  const std::vector<std::string> settings = proposed_settings(message);
  EXPECT_GE(settings.size(), 3U) << message;  // groups, the aux loss, renormalized top-1
  for (const std::string& setting : settings) {
    EXPECT_TRUE(setting.starts_with("routing.override.1.")) << message;
    apply_set(config, setting);
  }
  EXPECT_EQ(usage_error([&] { validate(config); }), "");
  EXPECT_EQ(config.routing.aux_loss, 0.02);
}

TEST(RunConfig, KeysWithoutEffectAreNamed) {
  const auto lines_of = [](std::initializer_list<const char*> sets) {
    Config config;
    for (const char* assignment : sets) apply_set(config, assignment);
    validate(config);
    return keys_without_effect(config);
  };
  using Lines = std::vector<std::string>;
  EXPECT_EQ(lines_of({}), Lines());
  EXPECT_EQ(lines_of({"routing.stream=weighted", "routing.stream_theta=0.3"}),
            Lines{"routing.stream_theta = 0.3 has no effect without stream \"threshold\""});
  EXPECT_EQ(lines_of({"routing.stream=threshold", "routing.stream_theta=0.3"}), Lines());
  EXPECT_EQ(lines_of({"routing.aux_loss=0", "routing.aux_scope=global"}),
            Lines{"routing.aux_scope = \"global\" has no effect without aux_loss"});
  // Where every token goes to every expert there is nothing to balance.
  EXPECT_EQ(lines_of({"model.num_experts=2", "routing.aux_loss=0.5"}),
            Lines{"routing.aux_loss = 0.5 has no effect without topk < num_experts"});
  EXPECT_EQ(lines_of({"routing.aux_loss=0.5"}), Lines());
  // A layer that an override names may be the one that uses the key of all.
  EXPECT_EQ(lines_of({"routing.min_capacity=4", "routing.override.0.layers=1",
                      "routing.override.0.capacity_factor=1"}),
            Lines());
  EXPECT_EQ(lines_of({"routing.override.0.layers=1", "routing.override.0.min_capacity=4"}),
            Lines{"routing.override.0.min_capacity = 4 has no effect without a capacity factor"});
  // No layer is left to which [routing] speaks alone.
  EXPECT_EQ(lines_of({"routing.capacity_factor=1", "routing.drop_policy=probs",
                      "routing.override.0.layers=0-3", "routing.override.0.capacity_factor=0"}),
            Lines{"routing.drop_policy = \"probs\" has no effect without a capacity factor that "
                  "drops"});
}

TEST(RunConfig, OverridesChangeTheirLayersAlone) {
  Config config = from_toml(
      "[routing]\naux_loss = 0.5\n[[routing.override]]\nlayers = \"1-2\"\ntopk = 4\n"
      "score = \"sigmoid\"\n[[routing.override]]\nlayers = \"3\"\naux_loss = 0\n",
      "test");
  validate(config);
  const auto overrides = resolve_overrides(config);
  const auto of = [&](std::int64_t layer) {
    return routing_of_layer(config.model, config.routing, overrides, layer);
  };
  EXPECT_EQ(of(0).topk, 2);
  EXPECT_EQ(of(0).routing.score, "softmax");
  EXPECT_EQ(of(2).topk, 4);
  EXPECT_EQ(of(2).routing.score, "sigmoid");
  EXPECT_EQ(of(2).routing.aux_loss, 0.5);
  EXPECT_EQ(of(3).topk, 2);
  EXPECT_EQ(of(3).routing.aux_loss, 0);
  // Keys that a row does not give stay so: they follow [routing] when that changes.
  Config again = from_toml(to_toml(config), "again");
  EXPECT_EQ(to_toml(again), to_toml(config));
  apply_set(again, "routing.aux_loss=0.25");
  EXPECT_EQ(resolve_overrides(again)[0].with.routing.aux_loss, 0.25);
  EXPECT_EQ(resolve_overrides(again)[1].with.routing.aux_loss, 0);
}

TEST(RunConfig, TheDocumentShowsWhatGoesWithWhat) {
  std::ifstream file(ARCUS_SOURCE_DIR "/src/model/ROUTING.md");
  const std::string text((std::istreambuf_iterator<char>(file)), {});
  EXPECT_NE(text.find(combinations_text()), std::string::npos)
      << "put the output of `arcus help routing` into src/model/ROUTING.md:\n"
      << combinations_text();
}

TEST(RunConfig, FilesThatCannotBeReadAreNamed) {
  const std::string missing = usage_error([] { load_config("no/such.toml", {}); });
  EXPECT_NE(missing.find("no/such.toml: No such file"), std::string::npos) << missing;
  const std::string folder = usage_error([] { load_config("/", {}); });
  EXPECT_NE(folder.find("/ is a folder"), std::string::npos) << folder;
}

TEST(RunConfig, ShippedConfigurationsAreValid) {
  int count = 0;
  const std::filesystem::path folder = std::filesystem::path(ARCUS_SOURCE_DIR) / "launch/configs";
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
    if (entry.path().extension() != ".toml") continue;
    ++count;
    EXPECT_EQ(usage_error([&] { validate(load_config(entry.path(), {})); }), "") << entry.path();
  }
  EXPECT_GE(count, 15);
}

}  // namespace
}  // namespace arcus
