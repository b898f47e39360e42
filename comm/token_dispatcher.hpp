#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "comm/dispatch_plan.hpp"

namespace arcus {

struct DispatcherOptions {
  std::int64_t num_experts = 0;
  std::int64_t max_tokens = 0;       ///< T of a full micro-batch
  std::int64_t slots_per_token = 0;  ///< K
  std::int64_t hidden_size = 0;      ///< H
  DType dtype = DType::f32;          ///< of rows; scalars have accumulate_dtype(dtype)
  std::int64_t capacity = 0;         ///< most rows per (expert, micro-batch); 0 = max_tokens
};

/// What combine returns to the token's rank: per slot a pointer to its row (null where dropped)
/// and its scalar. Valid until the next combine on the same dispatcher.
struct SlotRows {
  std::span<const void* const> rows;  ///< [T * K], each H elements
  ConstTensorView scalars;            ///< [T, K] accumulate type, 0 where dropped; empty if unused
};

/// Takes tokens to their experts' ranks and back. Given one row per token plus a scalar per slot,
/// never K rows, so that a strategy may send a row once per node. What is combined is never
/// pre-summed on the way. dispatch and (combine, then sum over K) are transposes.
class TokenDispatcher {
 public:
  virtual ~TokenDispatcher() = default;

  const DispatcherOptions& options() const { return options_; }
  const ExpertPartition& experts() const { return experts_; }
  Communicator& comm() { return *comm_; }

  /// Reserves a plan's storage for full micro-batches on all ranks.
  DispatchPlan make_plan_storage(Arena& arena) const;
  /// Fills `plan` from expert_of_slot [T, K] i32 (-1 = dropped): counting sort, then the counts
  /// exchange with its cross-check. Collective over the EP group; idle ranks pass T = 0 and
  /// micro_batch -1. Every rank's micro-batch number travels with its counts.
  void make_plan(Stream& stream, ConstTensorView expert_of_slot, std::int64_t micro_batch,
                 PlanTag tag, DispatchPlan& plan);
  /// rows[R, H] = copies of tokens[T, H]; row_scalars[1, R] = copies of slot_scalars[T, K] (both
  /// may be empty). The event completes the receive buffers; the inputs must live until then.
  virtual Event dispatch(Stream& stream, const DispatchPlan& plan, ConstTensorView tokens,
                         ConstTensorView slot_scalars, TensorView rows, TensorView row_scalars) = 0;
  /// The way back of rows[R, H] and row_scalars[1, R] (may be empty). `slot_rows` is filled at once
  /// and may be read when the event is complete.
  virtual Event combine(Stream& stream, const DispatchPlan& plan, ConstTensorView rows,
                        ConstTensorView row_scalars, SlotRows& slot_rows) = 0;

  /// Most rows this rank can receive in one round.
  std::int64_t max_recv_rows() const;
  std::int64_t max_padded_rows() const;

 protected:
  TokenDispatcher(Communicator& comm, const DispatcherOptions& options);

 private:
  Communicator* comm_;
  DispatcherOptions options_;
  ExpertPartition experts_;
};

/// One message per peer over any transport: rows packed in send order, own rows copied straight to
/// their place, segments read from the receive buffer without an unpermute.
std::unique_ptr<TokenDispatcher> make_flat_dispatcher(Communicator& ep,
                                                      const DispatcherOptions& options);

}  // namespace arcus
