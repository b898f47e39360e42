#pragma once

#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "checkpoints/checkpoint.hpp"
#include "comm/backends.hpp"
#include "kernels/cpu/gemm_cache.hpp"
#include "src/base/hash.hpp"
#include "src/data/prepare.hpp"
#include "src/train/trainer.hpp"
#include "tests/support/temporary_folder.hpp"

namespace arcus::testing {

/// The compute types that this processor has.
inline std::vector<const char*> compute_dtypes() {
  return cpu::bf16_is_native() ? std::vector<const char*>{"f32", "bf16"}
                               : std::vector<const char*>{"f32"};
}

/// Two domains of bytes from texts of this repository.
inline TokenDataset small_dataset(const std::filesystem::path& dir) {
  PrepareOptions options{.out = dir / "data", .valid_fraction = 0.2};
  options.domains = {{"license", {ARCUS_SOURCE_DIR "/LICENSE"}, {}},
                     {"code", {ARCUS_SOURCE_DIR "/tests/train/text"}, {}}};
  prepare(options, {});
  return TokenDataset::open(options.out);
}

/// A small exportable-looking model that trains in milliseconds; N = 5 micro-batches, so that 2, 3
/// and 4 ranks have idle ones in the last round.
inline TrainerOptions small_training() {
  TrainerOptions o;
  o.model.vocab_size = 256;
  o.model.hidden_size = 32;
  o.model.num_layers = 2;
  o.model.num_heads = 4;
  o.model.num_kv_heads = 2;
  o.model.num_experts = 8;
  o.model.topk = 2;
  o.model.expert_ff_size = 24;
  o.routing.z_loss = 1e-3;
  o.train.steps = 40;
  o.train.warmup_steps = 5;
  o.train.lr = 3e-3;
  o.train.seq_len = 24;
  o.train.micro_batch_seqs = 2;
  o.train.global_batch_seqs = 10;
  o.model = resolve(o.model, 256);
  return o;
}

/// One rank's trainer on `world` at a given EP size.
class TrainingRun {
 public:
  TrainingRun(Communicator& world, int ep_size, const TrainerOptions& options,
              const TokenDataset& dataset, int threads = 1, const DataConfig& data = {})
      : world_(world),
        stream_(threads),
        instance_(make_process_groups(world, ep_size), stream_, instance_options(options)),
        trainer_(instance_, options),
        sampler_(dataset, data, options.train.seq_len, options.seed) {
    trainer_.set_observer([this](std::int64_t layer, const MicroBatch& batch, const Routing& r) {
      StreamHash hash;
      for (const TensorView& part : {r.topk_idx, r.expert_of_slot, r.weight}) {
        hash.update(part.data, static_cast<std::size_t>(part.size()) * size_of(part.dtype));
      }
      // Added, since micro-batches are spread over ranks: one word a (micro-batch, layer).
      const std::uint64_t parts[3] = {hash.digest(), static_cast<std::uint64_t>(layer),
                                      static_cast<std::uint64_t>(batch.number)};
      routing_hash_ += hash_bytes(parts, sizeof parts);
    });
  }

  /// `count` steps; appends a line per step: metrics without timing, and the routing's hash.
  void steps(std::int64_t count, std::vector<std::string>& lines) {
    for (std::int64_t i = 0; i < count; ++i) {
      StepRequests requests;
      routing_hash_ = 0;
      StepMetrics metrics = trainer_.step(sampler_, requests);
      metrics.timing = {};
      std::int64_t hash = static_cast<std::int64_t>(routing_hash_);
      stream_.wait(world_.all_reduce(stream_, {.buffer = {&hash, DType::i64, 1, 1}}));
      lines.push_back(to_json_line(metrics) + " " + hex(static_cast<std::uint64_t>(hash)));
    }
  }
  std::string digest() { return hex(state_digest(world_, stream_, trainer_.state())); }
  Trainer& trainer() { return trainer_; }
  ModelInstance& instance() { return instance_; }
  Stream& stream() { return stream_; }
  const BatchSampler& sampler() const { return sampler_; }

 private:
  Communicator& world_;
  Stream stream_;
  ModelInstance instance_;
  Trainer trainer_;
  BatchSampler sampler_;
  std::uint64_t routing_hash_ = 0;
};

/// Lines of `count` steps from the start, and the digest at the end as the last line.
inline std::vector<std::string> trace_of_run(Communicator& world, int ep_size,
                                             const TrainerOptions& options,
                                             const TokenDataset& dataset, std::int64_t count,
                                             int threads = 1) {
  std::vector<std::string> lines;
  TrainingRun run(world, ep_size, options, dataset, threads);
  run.trainer().initialize();
  run.steps(count, lines);
  lines.push_back(run.digest());
  return lines;
}

}  // namespace arcus::testing
