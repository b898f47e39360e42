// What is written for another program is what was there, whatever the family; what a family cannot
// say is refused, and so is what Arcus cannot compute.
#include <gtest/gtest.h>

#include <bit>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>

#include "checkpoints/interop/export_model.hpp"
#include "checkpoints/interop/model_files.hpp"
#include "src/base/rng.hpp"
#include "tests/support/temporary_folder.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;

/// A small model that every switch below can be set on.
PortableModel small_model() {
  PortableModel p;
  p.model = {.vocab_size = 40,
             .hidden_size = 16,
             .num_layers = 3,
             .num_heads = 4,
             .num_kv_heads = 2,
             .head_dim = 6,
             .qk_norm = "none",
             .dense_ff_size = 20,
             .num_experts = 8,
             .topk = 2,
             .expert_ff_size = 12};
  p.context_length = 64;
  return p;
}

using Change = std::function<void(ModelConfig&, RoutingConfig&)>;
struct Case {
  const char* name;
  const char* hf;    ///< the family that is chosen, "" = none
  const char* gguf;  ///< its architecture
  Change change;
};

void make_qwen2_moe(ModelConfig& m, RoutingConfig& r) {
  r.renormalize = false;
  m.num_shared_experts = 2;
  m.shared_expert_gate = true;
  m.head_dim = 4;
}
void make_olmoe(ModelConfig& m, RoutingConfig& r) {
  r.renormalize = false;
  m.qk_norm = "full";
  m.num_kv_heads = 4;
  m.head_dim = 4;
  m.norm_eps = 1e-5;
}
void make_glm(ModelConfig& m, RoutingConfig& r) {
  r.score = "sigmoid";
  r.expert_bias_rate = 0.001;
  r.aux_loss = 0;
  r.n_group = 4;
  r.topk_group = 2;
  m.num_shared_experts = 1;
  m.first_k_dense = 1;
  r.routed_scaling_factor = 2.5;
}

const std::vector<Case>& cases() {
  static const std::vector<Case> all = {
      {"mixtral", "mixtral", "llama", [](ModelConfig&, RoutingConfig&) {}},
      {"mixtral_tied", "mixtral", "llama",
       [](ModelConfig& m, RoutingConfig&) { m.tie_embeddings = true; }},
      {"mixtral_llama3", "mixtral", "llama",
       [](ModelConfig& m, RoutingConfig&) {
         m.rope_theta = 500000;
         m.rope_scaling = "llama3";
         m.rope_factor = 32;
       }},
      {"mixtral_linear", "mixtral", "llama",
       [](ModelConfig& m, RoutingConfig&) {
         m.rope_scaling = "linear";
         m.rope_factor = 4;
       }},
      {"qwen3_moe", "qwen3_moe", "qwen3moe",
       [](ModelConfig& m, RoutingConfig&) { m.qk_norm = "head"; }},
      {"qwen3_moe_tied", "qwen3_moe", "qwen3moe",
       [](ModelConfig& m, RoutingConfig&) {
         m.qk_norm = "head";
         m.tie_embeddings = true;
       }},
      {"qwen3_moe_no_renorm", "qwen3_moe", "glm4moe",
       [](ModelConfig& m, RoutingConfig& r) {
         m.qk_norm = "head";
         r.renormalize = false;
       }},
      {"top_1", "qwen3_moe", "glm4moe",
       [](ModelConfig& m, RoutingConfig& r) {
         m.qk_norm = "head";
         m.topk = 1;
         r.renormalize = false;
       }},
      {"olmoe", "olmoe", "olmoe", make_olmoe},
      {"olmoe_tied", "olmoe", "olmoe",
       [](ModelConfig& m, RoutingConfig& r) {
         make_olmoe(m, r);
         m.tie_embeddings = true;
       }},
      {"qwen2_moe", "qwen2_moe", "qwen2moe", make_qwen2_moe},
      {"qwen2_moe_bias", "qwen2_moe", "qwen2moe",
       [](ModelConfig& m, RoutingConfig& r) {
         make_qwen2_moe(m, r);
         m.qkv_bias = true;
       }},
      {"glm4_moe", "glm4_moe", "glm4moe", make_glm},
      {"glm4_moe_plain", "glm4_moe", "glm4moe",
       [](ModelConfig& m, RoutingConfig& r) {
         r.score = "sigmoid";
         r.renormalize = false;
         m.partial_rotary_factor = 2.0 / 3;
         m.qkv_bias = true;
         m.tie_embeddings = true;
       }},
      {"glm4_moe_two_shared", "glm4_moe", "glm4moe",
       [](ModelConfig& m, RoutingConfig& r) {
         make_glm(m, r);
         m.num_shared_experts = 2;
         m.qk_norm = "head";
         m.first_k_dense = 2;
       }},
      // GGUF's glm4moe takes what no class of transformers does.
      {"softmax_scaled", "", "glm4moe",
       [](ModelConfig&, RoutingConfig& r) { r.routed_scaling_factor = 4; }},
      {"softmax_groups", "", "glm4moe",
       [](ModelConfig&, RoutingConfig& r) {
         r.n_group = 4;
         r.topk_group = 2;
       }},
      {"softmax_bias", "", "glm4moe",
       [](ModelConfig& m, RoutingConfig& r) {
         r.expert_bias_rate = 0.01;
         r.aux_loss = 0;
         m.qkv_bias = true;
       }},
      {"cosine", "", "", [](ModelConfig&, RoutingConfig& r) { r.score = "cosine"; }},
      {"hash", "", "",
       [](ModelConfig&, RoutingConfig& r) {
         r.select = "hash";
         r.aux_loss = 0;
       }},
      {"gate_bias", "", "", [](ModelConfig&, RoutingConfig& r) { r.gate_bias = true; }},
      {"full_norm_grouped_queries", "", "",
       [](ModelConfig& m, RoutingConfig&) { m.qk_norm = "full"; }},
      {"shared_gate_renorm", "", "",
       [](ModelConfig& m, RoutingConfig&) {
         m.num_shared_experts = 1;
         m.shared_expert_gate = true;
       }},
  };
  return all;
}

PortableModel model_of(const Case& c) {
  PortableModel p = small_model();
  c.change(p.model, p.routing);
  validate(p.model, p.routing);
  return p;
}

/// A number of the model: addressed by name, unit and place, so that nothing can be mixed up.
/// Biases of gates are partly below zero.
void numbers(const ModelUnit& unit, std::span<float> out) {
  const Rng rng(7, "interop test", unit.tensor);
  for (std::size_t i = 0; i < out.size(); ++i) {
    out[i] = rng.normal(static_cast<std::uint64_t>(unit.unit), i);
  }
}

ExportSource source_of(const PortableModel& model, const Family& family, FileType type) {
  return {.model = model, .family = &family, .type = type, .name = "test", .read = numbers};
}

class Families : public ::testing::TestWithParam<std::tuple<std::size_t, FileType>> {
 protected:
  const Case& which() const { return cases()[std::get<0>(GetParam())]; }
  FileType type() const { return std::get<1>(GetParam()); }
  testing::TemporaryFolder folder_;
};

float rounded(FileType type, float x) {
  if (type == FileType::f16) return float_from_f16(f16_from_float(x));
  return type == FileType::bf16 ? static_cast<float>(bf16(x)) : x;
}

/// Every number of the model stands in the files, rounded to the type; what was added is zero, or
/// the embedding where a tied model needs a head.
void expect_same_numbers(const ExportSource& source, const ModelFiles& files) {
  std::map<std::string, TensorSpec> own;
  for (const TensorSpec& spec : portable_tensors(source.model)) own.emplace(spec.name, spec);
  std::size_t found = 0;
  for (const TensorSpec& spec : files.tensors()) {
    const bool mine = own.contains(spec.name);
    found += mine ? 1 : 0;
    if (mine) {
      EXPECT_EQ(own.at(spec.name).shape, spec.shape) << spec.name;
    }
    std::vector<float> expected(static_cast<std::size_t>(spec.num_elements() / spec.num_units));
    std::vector<float> actual(expected.size());
    for (std::int64_t unit = 0; unit < spec.num_units; ++unit) {
      std::ranges::fill(expected, 0.0F);
      if (mine) source.read({spec.name, unit}, expected);
      if (spec.name == "lm_head.weight" && !mine)
        source.read({"model.embed_tokens.weight"}, expected);
      files.read({spec.name, unit}, actual);
      const bool norm_or_gate = spec.shape.size() == 1 || spec.name.ends_with("gate.weight");
      const float least = *std::ranges::min_element(expected);
      const bool shift = spec.name.ends_with("e_score_correction_bias") &&
                         source.model.routing.n_group > 1 && least < 0;
      for (std::size_t i = 0; i < actual.size(); ++i) {
        float x = shift ? expected[i] - least : expected[i];
        if (!norm_or_gate) x = rounded(source.type, x);
        ASSERT_EQ(std::bit_cast<std::uint32_t>(x), std::bit_cast<std::uint32_t>(actual[i]))
            << spec.name << "[" << unit << "] element " << i;
      }
    }
  }
  EXPECT_EQ(found, own.size());
}

/// What decides what a model computes comes back as it was.
void expect_same_model(const PortableModel& a, const PortableModel& b) {
  EXPECT_EQ(a.model.num_experts, b.model.num_experts);
  EXPECT_EQ(a.model.topk, b.model.topk);
  EXPECT_EQ(a.model.first_k_dense, b.model.first_k_dense);
  EXPECT_EQ(a.model.rope_theta, b.model.rope_theta);
  EXPECT_EQ(a.model.norm_eps, b.model.norm_eps);
  EXPECT_EQ(a.model.qk_norm, b.model.qk_norm);
  EXPECT_EQ(rope_inv_freq(a.model), rope_inv_freq(b.model));
  EXPECT_EQ(a.routing.score, b.routing.score);
  EXPECT_EQ(a.routing.renormalize, b.routing.renormalize);
  EXPECT_EQ(a.routing.routed_scaling_factor, b.routing.routed_scaling_factor);
  EXPECT_EQ(a.routing.n_group, b.routing.n_group);
  EXPECT_EQ(a.routing.topk_group, b.routing.topk_group);
  EXPECT_EQ(a.context_length, b.context_length);
}

TEST_P(Families, AHuggingFaceDirectoryHoldsTheModel) {
  const PortableModel model = model_of(which());
  if (std::string(which().hf).empty()) {
    EXPECT_THROW(choose_family(model, Target::hf), Error);
    return;
  }
  const Family& family = choose_family(model, Target::hf);
  EXPECT_EQ(family.name, which().hf);
  const ExportSource source = source_of(model, family, type());
  // Shards of a few tensors each.
  write_hf(source, folder_.path(), {}, 4000);
  EXPECT_TRUE(fs::exists(folder_.path() / "model.safetensors.index.json"));
  const ModelFiles files(folder_.path());
  EXPECT_EQ(files.family().name, family.name);
  expect_same_model(model, files.model());
  expect_same_numbers(source, files);
}

TEST_P(Families, AGgufFileHoldsTheModel) {
  const PortableModel model = model_of(which());
  if (std::string(which().gguf).empty()) {
    EXPECT_THROW(choose_family(model, Target::gguf), Error);
    return;
  }
  const Family& family = choose_family(model, Target::gguf);
  EXPECT_EQ(family.gguf_arch, which().gguf);
  const ExportSource source = source_of(model, family, type());
  write_gguf(source, folder_.path() / "model.gguf", {});
  const ModelFiles files(folder_.path() / "model.gguf");
  EXPECT_EQ(files.family().gguf_arch, family.gguf_arch);
  expect_same_model(model, files.model());
  expect_same_numbers(source, files);
}

INSTANTIATE_TEST_SUITE_P(All, Families,
                         ::testing::Combine(::testing::Range(std::size_t{0}, cases().size()),
                                            ::testing::Values(FileType::f32, FileType::bf16,
                                                              FileType::f16)),
                         [](const auto& param) {
                           return std::string(cases()[std::get<0>(param.param)].name) + "_" +
                                  std::string(name_of(std::get<1>(param.param)));
                         });

std::string message_of(const std::function<void()>& fn) {
  try {
    fn();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// Each remedy of a misfit, applied, leaves fewer in the way, until the family fits.
TEST(FamilyRules, WhatAMisfitAsksForMakesItFit) {
  const auto apply = [](PortableModel& p, const Misfit& misfit) {
    ModelConfig& m = p.model;
    RoutingConfig& r = p.routing;
    const auto number = [&] { return std::stoll(misfit.wanted); };
    const auto text = [&] { return misfit.wanted.substr(1, misfit.wanted.size() - 2); };
    const std::map<std::string, std::function<void()>> setters = {
        {"model.qk_norm", [&] { m.qk_norm = text(); }},
        {"model.qkv_bias", [&] { m.qkv_bias = misfit.wanted == "true"; }},
        {"model.partial_rotary_factor",
         [&] { m.partial_rotary_factor = std::stod(misfit.wanted); }},
        {"model.head_dim", [&] { m.head_dim = number(); }},
        {"model.num_kv_heads", [&] { m.num_kv_heads = number(); }},
        {"model.norm_eps", [&] { m.norm_eps = std::stod(misfit.wanted); }},
        {"model.num_shared_experts", [&] { m.num_shared_experts = number(); }},
        {"model.shared_expert_gate", [&] { m.shared_expert_gate = misfit.wanted == "true"; }},
        {"model.first_k_dense", [&] { m.first_k_dense = number(); }},
        {"model.rope_scaling", [&] { m.rope_scaling = text(); }},
        {"routing.score", [&] { r.score = text(); }},
        {"routing.select", [&] { r.select = text(); }},
        {"routing.renormalize", [&] { r.renormalize = misfit.wanted == "true"; }},
        {"routing.gate_bias", [&] { r.gate_bias = false; }},
        {"routing.expert_bias_rate", [&] { r.expert_bias_rate = 0; }},
        {"routing.routed_scaling_factor", [&] { r.routed_scaling_factor = 1; }},
        {"routing.n_group", [&] { r.n_group = r.topk_group = 1; }}};
    ASSERT_TRUE(setters.contains(misfit.key)) << misfit.key;
    setters.at(misfit.key)();
  };
  for (const Case& c : cases()) {
    for (const Family& family : families()) {
      if (!family.exported) continue;
      for (const Target target : {Target::hf, Target::gguf}) {
        PortableModel p = model_of(c);
        for (const Misfit& misfit : misfits(p, family, target)) apply(p, misfit);
        EXPECT_EQ(describe(misfits(p, family, target)), "") << c.name << " as " << family.name;
      }
    }
  }
}

TEST(FamilyRules, MessagesNameKeysValuesAndRemedies) {
  PortableModel p = small_model();
  p.routing.score = "cosine";
  const std::string message = message_of([&] { choose_family(p, Target::hf); });
  EXPECT_TRUE(contains(message, "routing.score = \"cosine\" (train with \"softmax\")")) << message;
  p = small_model();
  p.routing.routed_scaling_factor = 4;
  EXPECT_TRUE(contains(message_of([&] { choose_family(p, Target::hf); }), "--to gguf"));
  EXPECT_TRUE(contains(message_of([&] { choose_family(small_model(), Target::hf, "olmoe"); }),
                       "model.qk_norm = \"none\" (train with \"full\")"));
  EXPECT_TRUE(
      contains(message_of([&] { find_exported_family("llama"); }), "must be auto, mixtral"));
  p = small_model();
  p.model.first_k_dense = p.model.num_layers;
  EXPECT_TRUE(contains(message_of([&] { choose_family(p, Target::hf); }), "arcus upcycle"));
  p = small_model();
  p.overrides.push_back({1, 1, {3, p.routing}});
  EXPECT_TRUE(contains(message_of([&] { choose_family(p, Target::gguf); }), "routing.override"));
  // An override of what serves training alone stands in nobody's way.
  p.overrides[0].with.topk = p.model.topk;
  p.overrides[0].with.routing.aux_loss = 0.5;
  EXPECT_EQ(choose_family(p, Target::gguf).name, "mixtral");
}

/// A directory that was written, for changing what it says.
class Directories : public ::testing::Test {
 protected:
  void write(const Change& change, const char* family = "auto") {
    PortableModel p = small_model();
    change(p.model, p.routing);
    family_ = &choose_family(p, Target::hf, family);
    write_hf(source_of(p, *family_, FileType::f32), folder_.path(), {});
  }
  void write() {
    write([](ModelConfig&, RoutingConfig&) {});
  }
  nlohmann::json config() const {
    std::ifstream file(folder_.path() / "config.json");
    return nlohmann::json::parse(file);
  }
  void put(const nlohmann::json& json) {
    std::ofstream(folder_.path() / "config.json") << json.dump();
  }
  /// The message of reading it with one key set.
  std::string with(const std::string& key, const nlohmann::json& value) {
    const nlohmann::json before = config();
    nlohmann::json changed = before;
    changed[key] = value;
    put(changed);
    std::string message = message_of([&] { const ModelFiles files(folder_.path()); });
    put(before);
    return message;
  }
  testing::TemporaryFolder folder_;
  const Family* family_ = nullptr;
};

TEST_F(Directories, WhatArcusDoesNotComputeIsRefusedByName) {
  write();
  EXPECT_EQ(with("use_cache", false), "no error");
  const std::pair<const char*, nlohmann::json> refused[] = {
      {"quantization_config", {{"bits", 4}}},
      {"q_lora_rank", 128},
      {"kv_lora_rank", 64},
      {"sliding_window", 16},
      {"clip_qkv", 8.0},
      {"attention_bias", true},
      {"mlp_bias", true},
      {"hidden_act", "gelu"},
      {"final_logit_softcapping", 30.0},
      {"layer_types", {"full_attention", "sliding_attention", "full_attention"}},
      {"rope_scaling", {{"rope_type", "yarn"}, {"factor", 4.0}}},
      {"rope_parameters", {{"rope_type", "longrope"}}},
      {"model_type", "deepseek_v3"},
      {"attention_sinks", 4},
      {"num_local_experts", -4},
      {"hidden_size", "16"},
      {"num_attention_heads", 0}};
  for (const auto& [key, value] : refused) {
    const std::string message = with(key, value);
    EXPECT_NE(message, "no error") << key;
    EXPECT_TRUE(contains(message, key)) << message;
    EXPECT_TRUE(contains(message, "config.json")) << message;
  }
  // A window that is never reached, and keys that say nothing, are fine.
  EXPECT_EQ(with("sliding_window", 64), "no error");
  EXPECT_EQ(with("attention_sinks", nullptr), "no error");
  EXPECT_EQ(with("made_up", false), "no error");
  EXPECT_TRUE(contains(with("made_up", 3), "--ignore-key made_up"));
  nlohmann::json json = config();
  json["made_up"] = 3;
  put(json);
  EXPECT_EQ(ModelFiles(folder_.path(), {"made_up"}).notes().size(), 1U);
}

TEST_F(Directories, OtherLayersThanItsOwnAreRefused) {
  write([](ModelConfig& m, RoutingConfig&) { m.qk_norm = "head"; });
  EXPECT_TRUE(contains(with("decoder_sparse_step", 2), "decoder_sparse_step"));
  EXPECT_TRUE(contains(with("mlp_only_layers", {1}), "mlp_only_layers"));
  // More layers, experts or wider ones than there are tensors.
  EXPECT_TRUE(contains(with("num_hidden_layers", 4), "tensors are missing: model.layers.3."));
  EXPECT_TRUE(contains(with("num_hidden_layers", 2), "would be lost"));
  EXPECT_TRUE(contains(with("num_experts", 9), "the description asks for [9, 16]"));
  EXPECT_TRUE(contains(with("moe_intermediate_size", 13), "the description asks for [13, 16]"));
  EXPECT_TRUE(contains(with("head_dim", 8), "the description asks for [32, 16]"));
  EXPECT_TRUE(contains(with("num_experts_per_tok", 9), "topk"));
}

TEST_F(Directories, FilesThatAreNotThereAreNamed) {
  write();
  fs::remove(folder_.path() / "config.json");
  EXPECT_TRUE(contains(message_of([&] { const ModelFiles files(folder_.path()); }),
                       "config.json is missing"));
  write();
  fs::remove(folder_.path() / "model.safetensors");
  EXPECT_TRUE(contains(message_of([&] { const ModelFiles files(folder_.path()); }),
                       "neither model.safetensors nor"));
  fs::remove_all(folder_.path());
  fs::create_directories(folder_.path());
  write_hf(source_of(small_model(), choose_family(small_model(), Target::hf), FileType::f32),
           folder_.path(), {}, 4000);
  for (const auto& entry : fs::directory_iterator(folder_.path())) {
    if (entry.path().filename().string().starts_with("model-00002")) fs::remove(entry.path());
  }
  const std::string message = message_of([&] { const ModelFiles files(folder_.path()); });
  EXPECT_TRUE(contains(message, "is missing, though the index names it")) << message;
  EXPECT_TRUE(contains(message_of([&] { const ModelFiles files(folder_.path() / "none"); }),
                       "does not exist"));
}

TEST_F(Directories, ATiedModelsHeadMayStandThereTwiceIfItIsTheEmbedding) {
  write();  // with a head of its own
  EXPECT_TRUE(contains(with("tie_word_embeddings", true), "differs from the embedding"));
}

// Multi-token prediction layers of GLM and others stand behind the last one.
TEST_F(Directories, LayersBehindTheLastOneAreLeftOutWithANote) {
  write(make_glm);
  nlohmann::json json = config();
  json["num_hidden_layers"] = 2;
  json["num_nextn_predict_layers"] = 1;
  put(json);
  const ModelFiles files(folder_.path());
  ASSERT_EQ(files.notes().size(), 1U);
  EXPECT_TRUE(contains(files.notes()[0], "layers behind the last one")) << files.notes()[0];
}

// Whatever a key holds, the description is taken or refused, in one line that names the file.
TEST_F(Directories, NoValueOfAKeyDoesMoreThanBeRefused) {
  const nlohmann::json values[] = {nullptr,
                                   true,
                                   false,
                                   0,
                                   1,
                                   -1,
                                   3,
                                   0.5,
                                   -0.5,
                                   1e308,
                                   "",
                                   "x",
                                   4611686018427387904LL,
                                   -9223372036854775807LL,
                                   18446744073709551615ULL,
                                   std::string(100000, 'a'),
                                   nlohmann::json::array(),
                                   nlohmann::json::object(),
                                   {1, 2, 3},
                                   {{"rope_type", 7}},
                                   {{"rope_type", "llama3"}, {"factor", -1.0}},
                                   {{"rope_theta", "many"}}};
  int refused = 0;
  const auto try_all = [&](const char* family) {
    const nlohmann::json before = config();
    for (const auto& [key, original] : before.items()) {
      for (const nlohmann::json& value : values) {
        const std::string message = with(key, value);
        if (message == "no error") continue;
        ++refused;
        EXPECT_EQ(message.find('\n'), std::string::npos) << message;
        EXPECT_LT(message.size(), 1000U) << family << " " << key << ": " << message;
      }
    }
  };
  write();
  try_all("mixtral");
  write(make_qwen2_moe);
  try_all("qwen2_moe");
  write(make_glm);
  try_all("glm4_moe");
  EXPECT_GT(refused, 500);
  for (const char* text : {"", "{", "[]", "3", "{\"model_type\": \"mixtral\", \"model_type\": 3}",
                           "{\"a\": \"\xff\"}"}) {
    std::ofstream(folder_.path() / "config.json") << text;
    const std::string message = message_of([&] { const ModelFiles files(folder_.path()); });
    EXPECT_NE(message, "no error") << text;
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  }
  std::ofstream(folder_.path() / "config.json") << std::string(100000, '[');
  EXPECT_NE(message_of([&] { const ModelFiles files(folder_.path()); }), "no error");
}

}  // namespace
}  // namespace arcus
