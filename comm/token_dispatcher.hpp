#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "comm/dispatch_plan.hpp"
#include "kernels/arena.hpp"

namespace arcus {

struct DispatcherOptions {
  std::int64_t num_experts = 0;
  std::int64_t max_tokens = 0;       ///< T of a full micro-batch
  std::int64_t slots_per_token = 0;  ///< K, the most of any layer
  std::int64_t hidden_size = 0;      ///< H
  DType dtype = DType::f32;          ///< of rows; scalars have accumulate_dtype(dtype)
  std::int64_t capacity = 0;         ///< most rows per (expert, micro-batch); 0 = dropless
  std::int64_t padded_capacity = 0;  ///< most rows_per_expert of any plan; 0 = none is padded
};

/// What combine returns to the token's rank: per slot a pointer to its row (null where dropped)
/// and its scalar. Valid until finish_combine, and as long as the rows that were combined live: a
/// row that never left its rank is pointed at where it is.
struct SlotRows {
  std::span<const void* const> rows;  ///< [T * K], each H elements
  ConstTensorView scalars;            ///< [T, K] accumulate type, 0 where dropped; empty if unused
};

/// Takes tokens to their experts' ranks and back. Given one row per token plus a scalar per slot,
/// never K rows, so that a strategy may send a row once per node. What is combined is never
/// pre-summed on the way. dispatch and (combine, then sum over K) are transposes. At most one
/// dispatch or combine of a dispatcher is under way at a time.
class TokenDispatcher {
 public:
  virtual ~TokenDispatcher();
  TokenDispatcher(const TokenDispatcher&) = delete;
  TokenDispatcher& operator=(const TokenDispatcher&) = delete;

  const DispatcherOptions& options() const { return options_; }
  const ExpertPartition& experts() const { return experts_; }
  Communicator& comm() { return *comm_; }

  /// Reserves a plan's storage for full micro-batches on all ranks.
  DispatchPlan make_plan_storage(Arena& arena) const;
  /// Fills `plan` from expert_of_slot [T, K] i32 (-1 = dropped): counting sort, then the counts
  /// exchange with its cross-check. Collective over the EP group; idle ranks pass T = 0 and
  /// micro_batch -1. Every rank's micro-batch number travels with its counts; no two ranks may have
  /// the same one. With rows_per_expert > 0 every expert gets exactly that many rows of a
  /// micro-batch that has tokens: the kept ones, then spare rows that arrive as zeros with scalar 0
  /// and are not read on the way back.
  void make_plan(Stream& stream, ConstTensorView expert_of_slot, std::int64_t micro_batch,
                 PlanTag tag, DispatchPlan& plan, std::int64_t rows_per_expert = 0);
  /// rows[R, H] = copies of tokens[T, H]; row_scalars[1, R] = copies of slot_scalars[T, K]. Scalars
  /// travel unless both views are null (data == nullptr); all ranks must do alike. The event
  /// completes the receive buffers; inputs and plan must live until then. `rows` is contiguous, and
  /// kWgradRowPadding further rows behind its end belong to the buffer: they are set to zero, since
  /// weight gradients read them.
  virtual Event dispatch(Stream& stream, const DispatchPlan& plan, ConstTensorView tokens,
                         ConstTensorView slot_scalars, TensorView rows, TensorView row_scalars) = 0;
  /// Memory for `rows` and `row_scalars` of dispatch and combine, both ways. Collective; to be
  /// called once, before the first dispatch, and to be kept as long as the dispatcher.
  virtual Arena make_row_memory(std::int64_t bytes);
  /// The way back of rows[R, H] (contiguous) and row_scalars[1, R]; null data: no scalars, on all
  /// ranks alike (a rank that received no row passes a view of no columns with data). `slot_rows`
  /// is filled at once and may be read when the event is complete. Rows of own tokens stay where
  /// they are and may still be written until then; scalars are all complete.
  virtual Event combine(Stream& stream, const DispatchPlan& plan, ConstTensorView rows,
                        ConstTensorView row_scalars, SlotRows& slot_rows) = 0;
  /// What combine gave has been used: other ranks may have their rows back. To be called after
  /// every combine, by all ranks.
  virtual void finish_combine() {}

  /// Most rows this rank can receive in one round.
  std::int64_t max_recv_rows() const;
  std::int64_t max_padded_rows() const;
  /// Bytes this dispatcher has set aside for rows under way (touched only as far as they are used).
  virtual std::int64_t buffer_bytes() const = 0;

 protected:
  TokenDispatcher(Communicator& comm, const DispatcherOptions& options);
  /// Throws unless views fit plan and options.
  void check_dispatch(const DispatchPlan& plan, const ConstTensorView& tokens,
                      const ConstTensorView& slot_scalars, const ConstTensorView& rows,
                      const ConstTensorView& row_scalars) const;
  void check_combine(const DispatchPlan& plan, const ConstTensorView& rows,
                     const ConstTensorView& row_scalars) const;
  /// Clears the rows behind the last one that arrives, which weight gradients read.
  void clear_padding(Stream& stream, const DispatchPlan& plan, TensorView rows) const;
  /// What a strategy needs in a plan beside the rest.
  virtual void add_plan_storage(Arena& /*arena*/, DispatchPlan& /*plan*/) const {}
  /// Takes `sent`, one message for every rank, to the ranks; `received` is what came from each.
  virtual void exchange_messages(Stream& stream, std::span<const std::int64_t> sent,
                                 std::span<std::int64_t> received, DispatchPlan& plan);
  /// Words of one such message, and the rows that it announces.
  static std::int64_t message_width(const DispatcherOptions& options, int num_ranks);
  static std::int64_t rows_of_message(const std::int64_t* message);

 private:
  void check_rows(const char* what, const ConstTensorView& view, std::int64_t expected) const;
  void check_scalars(const char* what, const ConstTensorView& view, std::int64_t expected) const;

  struct Counting;
  void sort_slots(ConstTensorView expert_of_slot, std::int64_t rows_per_expert, DispatchPlan& plan);
  void exchange_counts(Stream& stream, PlanTag tag, DispatchPlan& plan);
  void check_counts(PlanTag tag) const;
  void place_segments(DispatchPlan& plan);

  Communicator* comm_;
  DispatcherOptions options_;
  ExpertPartition experts_;
  std::unique_ptr<Counting> counting_;
};

/// Most rows a rank can send in one round.
std::int64_t max_send_rows(const DispatcherOptions& options);
/// Bounds on what `rank` of num_ranks receives in one round, for planning without a communicator.
std::int64_t max_recv_rows(const DispatcherOptions& options, int rank, int num_ranks);
std::int64_t max_padded_rows(const DispatcherOptions& options, int rank, int num_ranks);
/// buffer_bytes() of a flat dispatcher.
std::int64_t flat_dispatcher_bytes(const DispatcherOptions& options);

/// Through memory that the ranks of a node share, and one message for every (rank, other node).
/// Null, on all ranks alike, where some node's ranks cannot share memory. Collective.
std::unique_ptr<TokenDispatcher> make_shared_dispatcher(Communicator& ep,
                                                        const DispatcherOptions& options);
/// Its buffer_bytes() on the first of `num_ranks` ranks when every `ranks_per_node` consecutive
/// ones share a node.
std::int64_t shared_dispatcher_bytes(const DispatcherOptions& options, int num_ranks,
                                     int ranks_per_node);

enum class DispatchPath { automatic, flat, shared };
/// "auto", "flat" or "shared".
DispatchPath dispatch_path_from_name(std::string_view name);
/// The dispatcher of a path; `automatic`: shared where the ranks of `ep` are several and those of a
/// node can share memory. Throws (usage) where `shared` is asked for and cannot be. Collective.
std::unique_ptr<TokenDispatcher> make_dispatcher(Communicator& ep, const DispatcherOptions& options,
                                                 DispatchPath path);

/// One message per peer over any transport: rows packed in send order, own rows copied straight to
/// their place, segments read from the receive buffer without an unpermute.
std::unique_ptr<TokenDispatcher> make_flat_dispatcher(Communicator& ep,
                                                      const DispatcherOptions& options);

}  // namespace arcus
