#pragma once

#include <vector>

#include "comm/node_map.hpp"
#include "comm/token_dispatcher.hpp"

namespace arcus {

/// The part of an exchange that leaves the node: one message per (rank, node), to the rank there
/// that has the sender's place. On the way out a token's row travels once to a node, however many
/// of its experts are there, with a list of the rows that are copies of it; on the way back every
/// row travels, unsummed. Messages hold rows, then the list or nothing, then scalars, each part
/// beginning at a multiple of 64 bytes.
class Rails {
 public:
  /// `message_width`: words of a counts message.
  Rails(Communicator& ep, const NodeMap& nodes, const DispatcherOptions& options,
        std::int64_t message_width);

  /// Bytes set aside for messages under way (touched only as far as they are used).
  static std::int64_t buffer_bytes(const NodeMap& nodes, const DispatcherOptions& options);
  void add_plan_storage(Arena& arena, DispatchPlan& plan) const;

  /// Words that arrive of one relayed source: how many different tokens it sends, then its counts
  /// messages for this node's ranks.
  static std::int64_t relayed_words(const NodeMap& nodes, std::int64_t message_width);
  /// Ranks of other nodes that this one takes messages from.
  const std::vector<int>& sources() const { return sources_; }
  /// Finds the tokens that leave the node and takes `sent`, a counts message for every rank, to the
  /// relays; `relayed` [sources, relayed_words] is what came here.
  void exchange_counts(Stream& stream, std::span<const std::int64_t> sent, std::int64_t* relayed,
                       DispatchPlan& plan);

  /// Starts the way out.
  Event send_tokens(Stream& stream, const DispatchPlan& plan, ConstTensorView tokens,
                    ConstTensorView slot_scalars, bool scalars);
  /// When it is complete: copies what source number `i` sent for the node's rank at `place` to
  /// `rows` [count, H] and `row_scalars`.
  void place_tokens(Stream& stream, const DispatchPlan& plan, std::size_t i, std::size_t place,
                    char* rows, char* row_scalars) const;

  /// Starts the way back: `rows_at(place)` and `scalars_at(place)` are the results of the node's
  /// rank at `place`, all that it received.
  template <class RowsAt, class ScalarsAt>
  Event return_rows(Stream& stream, const DispatchPlan& plan, RowsAt&& rows_at,
                    ScalarsAt&& scalars_at, bool scalars) {
    begin_return(plan, scalars);
    for (std::size_t i = 0; i < sources_.size(); ++i) {
      for (std::size_t place = 0; place < nodes_.mine().size(); ++place) {
        pack_return(plan, i, place, rows_at(place), scalars ? scalars_at(place) : nullptr);
      }
    }
    return exchange(stream, send_, recv_, kUnit);
  }
  /// When that is complete: where the results of `owner`, a rank of another node, are: rows in send
  /// order from `row(plan, owner)` on.
  const char* returned_rows(const DispatchPlan& plan, int owner) const;
  const char* returned_scalars(const DispatchPlan& plan, int owner) const;

 private:
  /// Messages of rows are counted in units of this many bytes.
  static constexpr std::int64_t kUnit = 64;

  static std::int64_t whole_units(std::int64_t bytes) {
    return (bytes + kUnit - 1) / kUnit * kUnit;
  }
  /// Most bytes of one message: a micro-batch's tokens with the list of their copies, or all its
  /// rows; and most of all that this rank sends, and receives, at a time.
  static std::int64_t most_token_bytes(const DispatcherOptions& options);
  static std::int64_t most_row_bytes(const DispatcherOptions& options);
  static std::int64_t most_sent(const NodeMap& nodes, const DispatcherOptions& options);
  static std::int64_t most_received(const NodeMap& nodes, const DispatcherOptions& options);
  /// Rows of this rank's tokens for a node, and of a relayed source for this node.
  std::int64_t rows_to(const DispatchPlan& plan, int node) const;
  std::int64_t rows_from(const DispatchPlan& plan, std::size_t i) const;
  /// Of what comes back: a node's message, and the rows in it before those of `owner`.
  const char* returned_message(int node) const;
  std::int64_t rows_before(const DispatchPlan& plan, int owner) const;
  std::int64_t message_bytes(std::int64_t rows, std::int64_t indices, std::int64_t scalars) const;
  void find_unique(DispatchPlan& plan);
  void clear_counts();
  void begin_return(const DispatchPlan& plan, bool scalars);
  void pack_return(const DispatchPlan& plan, std::size_t i, std::size_t place, const char* rows,
                   const char* scalars);
  /// Takes messages of `unit` bytes each count, which `ep` counts as sent.
  Event exchange(Stream& stream, const void* send, void* recv, std::int64_t unit);

  Communicator* ep_;
  NodeMap nodes_;
  std::int64_t num_ranks_;
  std::int64_t hidden_size_;
  DType dtype_;
  std::int64_t row_bytes_, scalar_bytes_;
  std::int64_t max_tokens_, max_rows_, message_width_;
  std::vector<int> sources_;
  std::unique_ptr<Communicator> comm_;
  Arena memory_;
  char* send_;
  char* recv_;
  bool scalars_ = false;  ///< of the exchange under way
  std::vector<std::int64_t> send_counts_, send_offsets_, recv_counts_, recv_offsets_;  ///< [P]
  std::vector<std::int64_t> count_messages_;
  std::vector<std::int32_t> place_of_token_;
  std::vector<std::int64_t> filled_;  ///< [sources] rows packed so far
};

}  // namespace arcus
