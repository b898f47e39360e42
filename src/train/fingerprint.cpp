#include "src/train/fingerprint.hpp"

#include <vector>

#include "comm/backends.hpp"
#include "kernels/backend.hpp"
#include "src/base/hash.hpp"
#include "src/base/log.hpp"
#include "src/base/rng.hpp"
#include "src/train/batch.hpp"
#include "src/train/optimizer.hpp"

namespace arcus {
namespace {

InstanceOptions small_instance(const ModelConfig& model, DType compute, std::int64_t num_experts) {
  InstanceOptions o{.compute = compute, .micro_batch_seqs = 2, .seq_len = 80};
  o.model.vocab_size = 96;
  o.model.hidden_size = 64;
  o.model.num_layers = 1;
  o.model.num_heads = 4;
  o.model.num_kv_heads = 2;
  o.model.num_experts = num_experts;
  o.model.topk = num_experts > 1 ? 2 : 1;
  o.model.expert_ff_size = 64;
  o.model.num_shared_experts = 1;
  o.model.shared_expert_gate = true;
  o.model.qkv_bias = true;
  o.model.norm = model.norm;
  o.model.activation = model.activation;
  o.model.mlp_bias = model.mlp_bias;
  o.model.o_bias = model.o_bias;
  o.model.position = model.position;
  o.model.max_positions = model.position == "learned" ? o.seq_len : 0;
  o.model = resolve(o.model, o.model.vocab_size);
  o.routing.renormalize = num_experts > 1;
  o.routing.z_loss = 1e-3;
  o.routing.gate_bias = true;
  o.weight_decay = 0.1;
  o.lora = {.rank = 8, .match = "_proj"};
  o.groups = {{.match = "."}};
  return o;
}

/// One training step on fixed tokens: hash of the sums, the loss and the updated parameters.
void hash_step(const InstanceOptions& options, int num_threads, StreamHash& hash) {
  auto self = make_self_communicator();
  Stream stream(num_threads);
  ModelInstance instance(make_process_groups(*self, 1), stream, options);
  instance.initialize_parameters();
  TrainConfig train;
  Optimizer optimizer(instance, train);
  optimizer.adopt_parameters();
  BatchBuffers buffers(options.micro_batch_seqs, options.seq_len);
  std::vector<std::int32_t> ids, targets;
  const Rng rng(1, "fingerprint", "");
  const auto vocab = static_cast<std::uint32_t>(options.model.vocab_size);
  for (std::int64_t t = 0; t < options.micro_batch_seqs * options.seq_len; ++t) {
    const auto words = rng.words(0, static_cast<std::uint64_t>(t));
    ids.push_back(static_cast<std::int32_t>(words[0] % vocab));
    targets.push_back(static_cast<std::int32_t>(words[1] % vocab));
  }
  MicroBatch batch = buffers.fill(ids, targets, 0);
  batch.loss_scale = 1.0 / static_cast<double>(ids.size());
  batch.weight = 1;
  instance.params().start_sums(stream);
  MicroBatchStats stats = instance.transformer().make_stats();
  auto workspace = instance.transformer().make_workspace();
  PassContext ctx = instance.pass(batch, stats);
  instance.transformer().train(ctx, instance.params(), instance.dispatcher(), workspace, false);
  instance.params().complete_sums(stream);
  const auto add = [&](const TensorView& view) {
    hash.update(view.data, static_cast<std::size_t>(view.size()) * size_of(view.dtype));
  };
  for (const FlatId flat : kFlatIds) add(instance.params().flat_sums(flat));
  hash.update(&stats.token_loss_sum, sizeof stats.token_loss_sum);
  optimizer.reduce_gradients();
  const double norm = optimizer.gradient_norm();
  hash.update(&norm, sizeof norm);
  optimizer.apply(1e-3, 0.5, 1);
  for (const FlatId flat : kFlatIds) add(instance.params().flat_values(flat));
}

}  // namespace

std::string arithmetic_fingerprint(const ModelConfig& model, DType compute, int num_threads) {
  StreamHash hash;
  for (const std::int64_t experts : {1, 4})
    hash_step(small_instance(model, compute, experts), num_threads, hash);
  return fmt::format("{} {} {}", hex(hash.digest()), name_of(compute), backend_description());
}

std::string check_fingerprints(Communicator& world, Stream& stream, const ModelConfig& model,
                               DType compute, bool reproducible) {
  std::string mine = arithmetic_fingerprint(model, compute, stream.num_threads());
  const std::vector<std::string> all = gather_texts(world, stream, mine);
  std::string different;
  for (std::size_t rank = 1; rank < all.size(); ++rank) {
    if (all[rank] == all[0]) continue;
    different += fmt::format("{}rank {}: {}", different.empty() ? "" : "; ", rank, all[rank]);
  }
  if (different.empty()) return mine;
  ARCUS_REQUIRE(
      !reproducible, ExitCode::usage,
      "ranks compute different bits: rank 0: {}; {}. Use machines of one kind and one set "
      "of libraries, or set run.reproducible to false",
      all[0], different);
  if (world.rank() == 0) {
    spdlog::warn("ranks compute different bits: rank 0: {}; {}", all[0], different);
  }
  return mine;
}

}  // namespace arcus
