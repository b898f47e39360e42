#pragma once

#include <algorithm>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "tests/support/model_fixture.hpp"
#include "tests/support/routing_cases.hpp"

namespace arcus::testing {

/// A model of one MoE layer in f32 and a micro-batch for it.
class OneLayer {
 public:
  OneLayer(const RoutingCase& routing, std::int64_t seqs, std::int64_t seq_len) {
    small_.model.num_layers = 1;
    small_.model.num_experts = 8;
    small_.model.hidden_size = 16;
    small_.micro_batch_seqs = seqs;
    small_.seq_len = seq_len;
    small_.num_micro_batches = 1;
    routing.apply(small_.model, small_.routing);
    validate(small_.model, small_.routing);
    world_ = make_self_communicator();
    instance_ = std::make_unique<ModelInstance>(self_groups(*world_), stream_,
                                                small_.options(DType::f32, DType::i64));
    instance_->initialize_parameters();
    for (float& w : values_of("mlp.gate.weight")) w *= 30;
  }

  /// One pass; calls `check` with the layer's routing. Returns the token losses in evaluation.
  std::vector<float> run(bool training,
                         const std::function<void(const MicroBatch&, const Routing&)>& check) {
    BatchBuffers buffers(small_.micro_batch_seqs, small_.seq_len);
    const MicroBatch batch = synthetic_batch(buffers, instance_->options(), 0);
    stats_ = instance_->transformer().make_stats();
    PassContext ctx = instance_->pass(batch, stats_);
    ctx.training = training;
    const RoutingObserver observer = [&](std::int64_t, const MicroBatch& seen, const Routing& r) {
      check(seen, r);
    };
    ctx.observer = &observer;
    std::vector<float> losses(static_cast<std::size_t>(batch.num_tokens()));
    if (training) {
      auto workspace = instance_->transformer().make_workspace();
      instance_->params().start_sums(stream_);
      instance_->transformer().train(ctx, instance_->params(), instance_->dispatcher(), workspace,
                                     false);
      instance_->params().complete_sums(stream_);
    } else {
      instance_->transformer().evaluate(ctx, instance_->params(), instance_->dispatcher(),
                                        {losses.data(), DType::f32, 1, batch.num_tokens()});
    }
    return losses;
  }

  /// The rows of a parameter, one per expert.
  TensorView rows_of(const std::string& suffix) {
    for (const ParamRow& row : instance_->registry().rows()) {
      if (!row.name.ends_with(suffix)) continue;
      const TensorView flat = instance_->params().flat_values(row.flat);
      const std::int64_t experts = small_.model.num_experts;
      const bool expert = row.kind == ParamKind::expert;
      const std::int64_t size = expert ? row.unit_elements() : row.unit_elements() / experts;
      return {flat.as<float>() + row.offset, DType::f32, experts, size,
              expert ? row.expert_stride : size};
    }
    return {};
  }
  /// A parameter that is no expert's; empty if there is none of that name.
  std::span<float> values_of(const std::string& suffix) {
    for (const ParamRow& row : instance_->registry().rows()) {
      if (!row.name.ends_with(suffix)) continue;
      auto* values = instance_->params().flat_values(row.flat).as<float>() + row.offset;
      return {values, static_cast<std::size_t>(row.unit_elements())};
    }
    return {};
  }
  void clear_gate() { std::ranges::fill(values_of("mlp.gate.weight"), 0.0F); }

  const SmallModel& small() const { return small_; }
  const SelectRow& select() const { return find_select(small_.routing.select); }
  const MicroBatchStats& stats() const { return stats_; }
  ModelInstance& instance() { return *instance_; }

 private:
  SmallModel small_;
  std::unique_ptr<Communicator> world_;
  Stream stream_{1};
  std::unique_ptr<ModelInstance> instance_;
  MicroBatchStats stats_;
};

}  // namespace arcus::testing
