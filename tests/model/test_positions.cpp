// What a model knows of places: nothing without positions, one vector a place with learned ones.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "tests/support/model_fixture.hpp"

namespace arcus::testing {
namespace {

constexpr std::int64_t kSeqLen = 6;

/// Two sequences through a model in f32.
class Positions : public ::testing::Test {
 protected:
  void build(const std::string& position, std::int64_t num_layers) {
    SmallModel small;
    small.model.num_layers = num_layers;
    small.model.qk_norm = "none";
    small.model.position = position;
    small.model.max_positions = position == "learned" ? kSeqLen : 0;
    small.num_micro_batches = 1;
    instance_ = std::make_unique<ModelInstance>(self_groups(*world_), stream_,
                                                small.options(DType::f32, DType::i64));
    instance_->initialize_parameters();
    // So that attention looks more at some tokens than at others, and that it shows.
    for (const char* name : {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"}) {
      for (float& w : values_of(name)) w *= 20;
    }
  }

  /// The first parameter whose name ends so.
  std::span<float> values_of(const std::string& suffix) {
    const auto& rows = instance_->registry().rows();
    const auto row = std::find_if(rows.begin(), rows.end(), [&](const ParamRow& each) {
      return each.name.ends_with(suffix);
    });
    float* flat = instance_->params().flat_values(row->flat).as<float>();
    return {flat + row->offset, static_cast<std::size_t>(row->unit_elements())};
  }

  /// Losses of the same target at every place.
  std::vector<float> losses(const std::vector<std::int32_t>& sequence) {
    std::vector<std::int32_t> ids = sequence;
    ids.insert(ids.end(), sequence.begin(), sequence.end());
    BatchBuffers buffers(2, kSeqLen);
    const std::vector<std::int32_t> targets(ids.size(), 7);
    const MicroBatch batch = buffers.fill(ids, targets, 0);
    MicroBatchStats stats = instance_->transformer().make_stats();
    PassContext ctx = instance_->pass(batch, stats);
    ctx.training = false;
    std::vector<float> result(ids.size());
    instance_->transformer().evaluate(
        ctx, instance_->params(), instance_->dispatcher(),
        {result.data(), DType::f32, 1, static_cast<std::int64_t>(result.size())});
    // The second sequence begins at place 0 again.
    EXPECT_TRUE(std::equal(result.begin(), result.begin() + kSeqLen, result.begin() + kSeqLen));
    result.resize(kSeqLen);
    return result;
  }

  std::unique_ptr<Communicator> world_ = make_self_communicator();
  Stream stream_{1};
  std::unique_ptr<ModelInstance> instance_;
};

// In one layer the last token sees a set; with positions it sees a sequence.
TEST_F(Positions, WithoutThemTheOrderOfWhatCameBeforeDoesNotMatter) {
  const std::vector<std::int32_t> text{3, 1, 4, 0, 5, 9};
  const std::vector<std::int32_t> reordered{5, 3, 0, 4, 1, 9};
  build("none", 1);
  EXPECT_NEAR(losses(text).back(), losses(reordered).back(), 1e-5);
  for (const char* position : {"rope", "learned"}) {
    build(position, 1);
    if (std::string(position) == "learned") {
      for (float& w : values_of("embed_positions.weight")) w *= 20;
    }
    EXPECT_GT(std::abs(losses(text).back() - losses(reordered).back()), 1e-3) << position;
  }
}

TEST_F(Positions, ALearnedTableOfZerosIsNone) {
  const std::vector<std::int32_t> text{3, 1, 4, 0, 5, 9};
  build("none", 2);
  const std::vector<float> none = losses(text);
  build("learned", 2);
  std::ranges::fill(values_of("embed_positions.weight"), 0.0F);
  EXPECT_EQ(losses(text), none);
}

TEST_F(Positions, ARowOfTheTableActsFromItsPlaceOn) {
  const std::vector<std::int32_t> text{3, 1, 4, 0, 5, 9};
  build("learned", 2);
  const std::vector<float> before = losses(text);
  const std::size_t hidden = values_of("embed_positions.weight").size() / kSeqLen;
  for (std::size_t place = 0; place < kSeqLen; ++place) {
    const auto row = values_of("embed_positions.weight").subspan(place * hidden, hidden);
    const float was = std::exchange(row[0], 1.0F);
    const std::vector<float> after = losses(text);
    row[0] = was;
    for (std::size_t t = 0; t < kSeqLen; ++t) {
      EXPECT_EQ(after[t] == before[t], t < place) << "row " << place << ", token " << t;
    }
  }
}

}  // namespace
}  // namespace arcus::testing
