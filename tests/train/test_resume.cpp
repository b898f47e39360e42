// Law: n steps, save, load on other ranks and EP size, n steps = 2n steps, bit for bit.

#include <gtest/gtest.h>

#include <cmath>

#include "tests/support/gpt2_blocks.hpp"
#include "tests/support/training_fixture.hpp"

namespace arcus::testing {
namespace {

constexpr std::int64_t kHalf = 6;

struct Layout {
  int ranks, ep;
};

class Resume : public ::testing::Test {
 protected:
  using Legs = std::vector<std::pair<Layout, Layout>>;
  void expect_two_halves(const TrainerOptions& options, const Legs& legs) {
    auto self = make_self_communicator();
    const auto whole = trace_of_run(*self, 1, options, dataset_, 2 * kHalf);
    for (const auto& [first, second] : legs) {
      std::filesystem::remove_all(folder_.path() / "checkpoints");
      auto lines = leg(first, options, kHalf);
      lines.pop_back();
      for (std::string& line : leg(second, options, kHalf)) lines.push_back(std::move(line));
      EXPECT_EQ(lines, whole) << options.train.dtype << ", norm " << options.model.norm << ": "
                              << first.ranks << " ranks EP " << first.ep << ", then "
                              << second.ranks << " ranks EP " << second.ep;
    }
  }

  TemporaryFolder folder_{"arcus_resume"};
  TokenDataset dataset_ = small_dataset(folder_.path());

  /// `count` steps on a layout, from the run folder's checkpoint if there is one; saves at the end.
  std::vector<std::string> leg(Layout layout, const TrainerOptions& options, std::int64_t count) {
    std::vector<std::string> lines;
    run_on_threads(layout.ranks, {}, [&](Communicator& world) {
      std::vector<std::string> mine;
      TrainingRun run(world, layout.ep, options, dataset_);
      const auto state = run.trainer().state();
      if (resume_checkpoint(world, run.stream(), folder_.path(), "auto", state)) {
        run.trainer().finish_reading();
      } else {
        run.trainer().initialize();
      }
      run.steps(count, mine);
      const CheckpointInfo info{.step = run.trainer().steps_done()};
      const SaveReport report =
          save_checkpoint(world, run.stream(), folder_.path(), info, run.trainer().state());
      mine.push_back(hex(report.digest));
      if (world.rank() == 0) lines = std::move(mine);
    });
    return lines;
  }
};

TEST_F(Resume, TwoHalvesOnOtherLayoutsAreTheWhole) {
  for (const char* dtype : compute_dtypes()) {
    TrainerOptions options = small_training();
    options.routing.capacity_factor = 1.0;
    options.train.dtype = dtype;
    expect_two_halves(options,
                      {{{1, 1}, {3, 3}}, {{4, 2}, {1, 1}}, {{2, 2}, {4, 4}}, {{3, 1}, {2, 1}}});
    use_gpt2_blocks(options.model, options.train.seq_len);
    expect_two_halves(options, {{{4, 2}, {3, 3}}});
  }
}
TEST_F(Resume, AnyTensorCanBeFrozen) {
  TrainerOptions options = small_training();
  options.model.num_shared_experts = 1;
  options.model.shared_expert_gate = true;
  options.model.first_k_dense = 1;
  options.model.dense_ff_size = 24;
  options.model.qkv_bias = true;
  options.routing.gate_bias = true;
  options.model.norm = "layer";
  options.model.o_bias = options.model.mlp_bias = true;
  options.model.position = "learned";
  options.model.max_positions = options.train.seq_len;
  auto self = make_self_communicator();
  std::vector<std::string> names;
  {
    TrainingRun run(*self, 1, options, dataset_);
    for (const ParamRow& row : run.instance().registry().rows()) names.push_back(row.name);
  }
  for (const std::string& name : names) {
    options.groups = {{.match = "^" + name + "$", .frozen = true}};
    TrainingRun run(*self, 1, options, dataset_);
    run.trainer().initialize();
    std::vector<std::string> lines;
    run.steps(1, lines);
    EXPECT_TRUE(std::isfinite(run.trainer().metrics().grad_norm)) << name;
  }
}

TEST_F(Resume, FrozenParametersKeepTheirValuesAndHaveNoMoments) {
  TrainerOptions options = small_training();
  options.groups = {{.match = "self_attn", .frozen = true}};
  auto self = make_self_communicator();
  TrainingRun run(*self, 1, options, dataset_);
  run.trainer().initialize();
  const auto hash_of = [&](const std::string& name) {
    StreamHash hash;
    for (const StateView& view : run.trainer().state()) {
      if (view.spec.name != name) continue;
      for (const StateSlice& slice : view.slices) {
        hash.update(
            slice.data,
            static_cast<std::size_t>((slice.rows.end - slice.rows.begin) * view.spec.cols()) * 4);
      }
    }
    return hash.digest();
  };
  const std::string frozen = "model.layers.0.self_attn.q_proj.weight";
  const std::string trained = "model.layers.0.mlp.experts.up_proj.weight";
  const auto frozen_before = hash_of(frozen);
  const auto trained_before = hash_of(trained);
  std::vector<std::string> lines;
  run.steps(3, lines);
  EXPECT_EQ(hash_of(frozen), frozen_before);
  EXPECT_NE(hash_of(trained), trained_before);
  for (const StateView& view : run.trainer().state()) {
    EXPECT_FALSE(view.spec.name.starts_with("optimizer/") &&
                 view.spec.name.find("self_attn") != std::string::npos)
        << view.spec.name;
  }
}

}  // namespace
}  // namespace arcus::testing
