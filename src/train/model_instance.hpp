#pragma once

#include <memory>
#include <string>
#include <vector>

#include "comm/token_dispatcher.hpp"
#include "src/model/balance_state.hpp"
#include "src/model/transformer.hpp"
#include "src/train/config.hpp"
#include "src/train/shards.hpp"

namespace arcus {

struct InstanceOptions {
  ModelConfig model;  ///< resolved
  RoutingConfig routing;
  std::vector<RoutingOverride> overrides;  ///< layers that route in another way
  DType compute = DType::f32;
  DType sum_dtype = DType::i64;
  bool training = true;
  bool recompute = false;
  std::int64_t micro_batch_seqs = 1;
  std::int64_t seq_len = 1;
  std::int64_t num_micro_batches = 1;  ///< of a step
  std::uint64_t seed = 1;
  double weight_decay = 0;
  std::vector<ParamGroupConfig> groups;
  LoraConfig lora;
  DispatchPath dispatch_path = DispatchPath::automatic;
};

/// Without a limit on what an expert takes outside training, in any layer.
InstanceOptions dropless_outside_training(InstanceOptions options);

/// Bytes of one rank by purpose: with experts evenly loaded, and the most that can happen.
struct ByteRow {
  std::string purpose;
  std::int64_t balanced = 0;
  std::int64_t worst = 0;
};

/// A model placed on the ranks of a world: registry, parameters, dispatcher, memory.
class ModelInstance {
 public:
  ModelInstance(ProcessGroups groups, Stream& stream, const InstanceOptions& options);

  const InstanceOptions& options() const { return options_; }
  const ParamRegistry& registry() const { return registry_; }
  const Transformer& transformer() const { return *transformer_; }
  ParamStore& params() { return *params_; }
  const ParamStore& params() const { return *params_; }
  TokenDispatcher& dispatcher() { return *dispatcher_; }
  ProcessGroups& groups() { return groups_; }
  Communicator& world() { return *groups_.world; }
  Stream& stream() { return *stream_; }
  Arena& saved() { return *saved_; }
  Arena& scratch() { return *scratch_; }
  Arena& rows() { return *rows_; }
  BalanceState& balance() { return balance_; }
  /// For a pass over `batch`: this rank's memory, seed and balancing state.
  PassContext pass(const MicroBatch& batch, MicroBatchStats& stats);

  std::int64_t micro_batch_tokens() const { return options_.micro_batch_seqs * options_.seq_len; }
  const FlatShards& shards(FlatId flat) const { return shards_[index_of(flat)]; }
  /// The group over which a flat is shared out: the world for dense ones, EDP for those by expert.
  Communicator& group(FlatId flat);
  /// Bytes this rank has sent over all its groups.
  std::int64_t sent_bytes() const {
    return groups_.world->sent_bytes() + groups_.ep->sent_bytes() + groups_.edp->sent_bytes();
  }
  /// Time this rank has spent in communication that was not hidden behind work.
  double comm_seconds() const {
    return stream_->waited_seconds() + groups_.world->blocked_seconds() +
           groups_.ep->blocked_seconds() + groups_.edp->blocked_seconds();
  }
  /// Writes the seed's initial values to all parameters of this rank.
  void initialize_parameters();
  /// Every rank's part of a flat to all ranks of its group; `trained_only`: of those that a step
  /// changes.
  void gather_parameters(bool trained_only);
  /// Builds all matrix-product primitives.
  PrimitiveReport build_primitives();
  /// Parameters, sums and activations; not the optimizer.
  std::vector<ByteRow> byte_rows() const;
  /// All rows that this rank holds of every parameter, and the balancing state, for reading a
  /// checkpoint without an optimizer. bf16 models read into `staging`; call finish_reading
  /// afterwards.
  std::vector<StateView> parameter_views();
  void finish_reading();

 private:
  void apply_groups();
  RoundMemory round_memory(bool worst) const;

  InstanceOptions options_;
  ProcessGroups groups_;
  Stream* stream_;
  ParamRegistry registry_;
  BalanceState balance_;
  std::unique_ptr<Transformer> transformer_;
  std::unique_ptr<ParamStore> params_;
  std::unique_ptr<TokenDispatcher> dispatcher_;
  std::unique_ptr<Arena> rows_, saved_, scratch_;
  std::vector<std::unique_ptr<Arena>> staging_;
  std::array<FlatShards, kFlatIds.size()> shards_;
};

}  // namespace arcus
