// The parameters that a configuration declares: names, shapes, types and decay. Importers,
// exporters and checkpoints of old runs go by them.

#include <fmt/ranges.h>
#include <gtest/gtest.h>

#include "comm/backends.hpp"
#include "src/model/expert_count.hpp"
#include "tests/support/gpt2_blocks.hpp"
#include "tests/support/model_fixture.hpp"

namespace arcus::testing {
namespace {

/// "NAME [shape]" of every parameter, in order.
std::vector<std::string> declared(const ParamRegistry& registry) {
  std::vector<std::string> lines;
  for (const ParamRow& row : registry.rows()) {
    lines.push_back(fmt::format("{} [{}]", row.name, fmt::join(row.shape, ", ")));
  }
  return lines;
}

struct Declared {
  explicit Declared(const SmallModel& small)
      : world(make_self_communicator({})), stream(1), instance(self_groups(*world), stream, [&] {
          InstanceOptions o = small.options(DType::bf16, DType::i64);
          o.weight_decay = 0.1;
          return o;
        }()) {}
  std::unique_ptr<Communicator> world;
  Stream stream;
  ModelInstance instance;
};

SmallModel one_dense_one_moe() {
  SmallModel small;
  small.model.first_k_dense = 1;
  small.model.dense_ff_size = 10;
  small.model.num_shared_experts = 1;
  return small;
}

TEST(Parameters, OfAPlainModel) {
  const Declared plain(one_dense_one_moe());
  EXPECT_EQ(declared(plain.instance.registry()),
            (std::vector<std::string>{
                "model.embed_tokens.weight [11, 8]",
                "model.layers.0.input_layernorm.weight [8]",
                "model.layers.0.self_attn.q_proj.weight [16, 8]",
                "model.layers.0.self_attn.k_proj.weight [8, 8]",
                "model.layers.0.self_attn.v_proj.weight [8, 8]",
                "model.layers.0.self_attn.o_proj.weight [8, 16]",
                "model.layers.0.self_attn.q_norm.weight [4]",
                "model.layers.0.self_attn.k_norm.weight [4]",
                "model.layers.0.post_attention_layernorm.weight [8]",
                "model.layers.0.mlp.gate_proj.weight [10, 8]",
                "model.layers.0.mlp.up_proj.weight [10, 8]",
                "model.layers.0.mlp.down_proj.weight [8, 10]",
                "model.layers.1.input_layernorm.weight [8]",
                "model.layers.1.self_attn.q_proj.weight [16, 8]",
                "model.layers.1.self_attn.k_proj.weight [8, 8]",
                "model.layers.1.self_attn.v_proj.weight [8, 8]",
                "model.layers.1.self_attn.o_proj.weight [8, 16]",
                "model.layers.1.self_attn.q_norm.weight [4]",
                "model.layers.1.self_attn.k_norm.weight [4]",
                "model.layers.1.post_attention_layernorm.weight [8]",
                "model.layers.1.mlp.gate.weight [4, 8]",
                "model.layers.1.mlp.experts.gate_proj.weight [4, 6, 8]",
                "model.layers.1.mlp.experts.up_proj.weight [4, 6, 8]",
                "model.layers.1.mlp.experts.down_proj.weight [4, 8, 6]",
                "model.layers.1.mlp.shared_experts.gate_proj.weight [6, 8]",
                "model.layers.1.mlp.shared_experts.up_proj.weight [6, 8]",
                "model.layers.1.mlp.shared_experts.down_proj.weight [8, 6]",
                "model.norm.weight [8]",
                "lm_head.weight [11, 8]",
            }));
}

SmallModel like_gpt2() {
  SmallModel small = one_dense_one_moe();
  use_gpt2_blocks(small.model, 7);
  return small;
}

TEST(Parameters, OfBlocksLikeGpt2s) {
  const Declared gpt2(like_gpt2());
  EXPECT_EQ(declared(gpt2.instance.registry()),
            (std::vector<std::string>{
                "model.embed_tokens.weight [11, 8]",
                "model.embed_positions.weight [7, 8]",
                "model.layers.0.input_layernorm.weight [8]",
                "model.layers.0.input_layernorm.bias [8]",
                "model.layers.0.self_attn.q_proj.weight [16, 8]",
                "model.layers.0.self_attn.k_proj.weight [16, 8]",
                "model.layers.0.self_attn.v_proj.weight [16, 8]",
                "model.layers.0.self_attn.q_proj.bias [16]",
                "model.layers.0.self_attn.k_proj.bias [16]",
                "model.layers.0.self_attn.v_proj.bias [16]",
                "model.layers.0.self_attn.o_proj.weight [8, 16]",
                "model.layers.0.self_attn.o_proj.bias [8]",
                "model.layers.0.post_attention_layernorm.weight [8]",
                "model.layers.0.post_attention_layernorm.bias [8]",
                "model.layers.0.mlp.up_proj.weight [10, 8]",
                "model.layers.0.mlp.down_proj.weight [8, 10]",
                "model.layers.0.mlp.up_proj.bias [10]",
                "model.layers.0.mlp.down_proj.bias [8]",
                "model.layers.1.input_layernorm.weight [8]",
                "model.layers.1.input_layernorm.bias [8]",
                "model.layers.1.self_attn.q_proj.weight [16, 8]",
                "model.layers.1.self_attn.k_proj.weight [16, 8]",
                "model.layers.1.self_attn.v_proj.weight [16, 8]",
                "model.layers.1.self_attn.q_proj.bias [16]",
                "model.layers.1.self_attn.k_proj.bias [16]",
                "model.layers.1.self_attn.v_proj.bias [16]",
                "model.layers.1.self_attn.o_proj.weight [8, 16]",
                "model.layers.1.self_attn.o_proj.bias [8]",
                "model.layers.1.post_attention_layernorm.weight [8]",
                "model.layers.1.post_attention_layernorm.bias [8]",
                "model.layers.1.mlp.gate.weight [4, 8]",
                "model.layers.1.mlp.experts.up_proj.weight [4, 6, 8]",
                "model.layers.1.mlp.experts.down_proj.weight [4, 8, 6]",
                "model.layers.1.mlp.experts.up_proj.bias [4, 6]",
                "model.layers.1.mlp.experts.down_proj.bias [4, 8]",
                "model.layers.1.mlp.shared_experts.up_proj.weight [6, 8]",
                "model.layers.1.mlp.shared_experts.down_proj.weight [8, 6]",
                "model.layers.1.mlp.shared_experts.up_proj.bias [6]",
                "model.layers.1.mlp.shared_experts.down_proj.bias [8]",
                "model.norm.weight [8]",
                "model.norm.bias [8]",
            }));
}

// Biases and gains, an expert's too, are vectors: no decay, f32 beside bf16 weights.
TEST(Parameters, VectorsDoNotDecayAndKeepTheirType) {
  for (const bool swiglu : {false, true}) {
    SmallModel small = like_gpt2();
    if (swiglu) small.model.activation = "swiglu";
    Declared gpt2(small);
    const ParamStore& params = gpt2.instance.params();
    for (const ParamRow& row : gpt2.instance.registry().rows()) {
      const bool vector = row.name.ends_with(".bias") || row.name.ends_with("norm.weight");
      EXPECT_EQ(row.weight_decay, vector ? 0 : 0.1) << row.name;
      const bool gate = row.name.ends_with("mlp.gate.weight");
      EXPECT_EQ(params.dtype(row.flat), vector || gate ? DType::f32 : DType::bf16) << row.name;
    }
  }
}

TEST(Parameters, CountedAsATokenPassesThem) {
  const Declared gpt2(like_gpt2());
  const std::int64_t attention = 3 * (16 * 8 + 16) + 8 * 16 + 8;
  const std::int64_t norms = 2 * 2 * 8;
  const std::int64_t expert = 2 * 6 * 8 + 6 + 8;
  const std::int64_t rest =
      (11 + 7) * 8 + 2 * (attention + norms) + 2 * 10 * 8 + 10 + 8 + 4 * 8 + expert + 2 * 8;
  EXPECT_EQ(gpt2.instance.registry().total_parameters(), rest + 4 * expert);
  EXPECT_EQ(gpt2.instance.registry().active_parameters(), rest + 2 * expert);
  // Matrix products: head, projections, dense, gate, two experts and the shared one, attention.
  const double products = 11 * 8 + 2 * 4 * 16 * 8 + 2 * 10 * 8 + 4 * 8 + 3 * 2 * 6 * 8;
  EXPECT_EQ(gpt2.instance.transformer().training_flops_per_token(6),
            3 * (2 * products + 2 * 2 * 6 * 16));
}

TEST(Parameters, OfExpertsAreFound) {
  const SmallModel small = like_gpt2();
  const auto names = tensors_by_expert(resolve(small.model, 11), small.routing, {}, {});
  for (const char* name : {"gate.weight", "experts.up_proj.weight", "experts.up_proj.bias",
                           "experts.down_proj.weight", "experts.down_proj.bias"}) {
    EXPECT_TRUE(names.contains(std::string("model.layers.1.mlp.") + name)) << name;
  }
  EXPECT_FALSE(names.contains("model.layers.1.mlp.shared_experts.up_proj.bias"));
}

// Every position that a model learns is one that a sequence can have.
TEST(Parameters, SequencesDoNotExceedLearnedPositions) {
  SmallModel small = like_gpt2();
  small.seq_len = 8;
  EXPECT_THROW(Declared{small}, Error);
}

}  // namespace
}  // namespace arcus::testing
