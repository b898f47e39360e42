#include "launch/run_config.hpp"

#include <gtest/gtest.h>

#include <array>
#include <filesystem>
#include <fstream>
#include <functional>

#include "src/base/error.hpp"
#include "src/model/routing.hpp"

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
      {{"routing.min_capacity=100000"}, "routing.min_capacity (100000) exceeds the 512 tokens"},
  };
  EXPECT_EQ(usage_error([] { validate(Config()); }), "");
  expect_refused(bad);
}

TEST(RunConfig, RoutingsThatMakeNoSenseAreRefusedWithOneThatDoes) {
  const std::vector<BadRule> bad = {
      {{"routing.n_group=4", "routing.topk_group=4"},
       "routing.topk_group (4) must be smaller than routing.n_group (4); set both to 1"},
      {{"routing.n_group=3"}, "routing.n_group (3) must divide model.num_experts (8)"},
      {{"routing.topk_group=2"}, "routing.topk_group (2) needs groups"},
      {{"routing.n_group=4", "routing.topk_group=1", "model.topk=3"},
       "model.topk (3) exceeds the 2 experts that routing.topk_group (1) groups of 2 hold; set "
       "topk to 2"},
      {{"routing.n_group=8", "routing.topk_group=4"},
       "\"top2_sum\" needs groups of two experts or more"},
      {{"routing.select=sinkhorn", "routing.expert_bias_rate=0.001"},
       "does not go with routing.expert_bias_rate = 0.001; set it to 0, or select to \"topk\""},
      {{"routing.select=dense"},
       "does not go with model.topk = 2; set it to model.num_experts (8)"},
      {{"routing.select=dense", "model.topk=8", "routing.aux_loss=0", "routing.capacity_factor=1"},
       "does not go with routing.capacity_factor = 1; set it to 0 (dropless)"},
      {{"routing.select=hash"}, "does not go with routing.aux_loss = 0.01; set it to 0"},
      {{"routing.select=hash", "routing.aux_loss=0", "routing.noise=1"},
       "does not go with routing.noise = 1"},
      {{"routing.select=second_sampled", "model.topk=3"},
       "does not go with model.topk = 3; set it to 2"},
      {{"routing.select=expert_choice", "routing.aux_loss=0", "routing.capacity_factor=1",
        "routing.renormalize=false"},
       "looks at later tokens"},
      {{"routing.select=expert_choice"}, "does not go with routing.capacity_factor = 0"},
      {{"routing.load_loss=0.1"}, "routing.load_loss (0.1) counts chances under noise"},
      {{"routing.load_loss=0.1", "routing.noise=1", "model.topk=8"}, "needs model.topk (8) below"},
      {{"routing.center_bias=true"}, "set center_bias to false, or expert_bias_rate to 0.001"},
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
       "set pad_to_capacity to false, or capacity_factor to 1.25"},
      {{"routing.pad_to_capacity=true", "routing.capacity_factor=1", "routing.stream=threshold"},
       "lets any number pass by; set stream to \"weighted\""},
      {{"routing.stream=capacity"}, "looks at later tokens"},
      {{"routing.stream_target_loss=0.1"}, "needs a decision layer; set routing.stream to"},
      {{"routing.stream=threshold", "routing.quantile_rate=0.5"}, "set stream to \"weighted\""},
      {{"routing.override.0.layers=some"}, "it must be a layer or a range such as \"4-7\""},
      {{"routing.override.0.layers=1-2", "routing.override.1.layers=2"}, "layer 2 is named twice"},
      {{"routing.override.0.layers=1", "routing.override.0.topk=9"},
       "in layer 1: model.topk (9) exceeds model.num_experts (8)"},
  };
  expect_refused(bad);
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
  EXPECT_NE(text.find(combinations_table()), std::string::npos)
      << "put the output of `arcus help routing` into src/model/ROUTING.md:\n"
      << combinations_table();
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
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (entry.path().extension() != ".toml") continue;
    ++count;
    EXPECT_EQ(usage_error([&] { validate(load_config(entry.path(), {})); }), "") << entry.path();
  }
  EXPECT_GE(count, 3);
}

}  // namespace
}  // namespace arcus
