#include "comm/rails.hpp"

#include <algorithm>
#include <cstring>

#include "kernels/permute.hpp"

namespace arcus {
namespace {

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

std::int64_t row_bytes_of(const DispatcherOptions& options) {
  return options.hidden_size * static_cast<std::int64_t>(size_of(options.dtype));
}
std::int64_t scalar_bytes_of(const DispatcherOptions& options) {
  return static_cast<std::int64_t>(size_of(accumulate_dtype(options.dtype)));
}

}  // namespace

Rails::Rails(Communicator& ep, const NodeMap& nodes, const DispatcherOptions& options,
             std::int64_t message_width)
    : ep_(&ep),
      nodes_(nodes),
      num_ranks_(ep.size()),
      hidden_size_(options.hidden_size),
      dtype_(options.dtype),
      row_bytes_(row_bytes_of(options)),
      scalar_bytes_(scalar_bytes_of(options)),
      max_tokens_(options.max_tokens),
      max_rows_(max_send_rows(options)),
      message_width_(message_width),
      sources_(nodes.relayed_by(nodes.rank)),
      // Exchanges start when the node's results are there, so in an order of their own.
      comm_(ep.split(0, ep.rank())),
      memory_("messages between nodes", buffer_bytes(nodes, options)),
      send_(static_cast<char*>(memory_.allocate_bytes(most_sent(nodes, options)))),
      recv_(static_cast<char*>(memory_.allocate_bytes(most_received(nodes, options)))),
      send_counts_(index(num_ranks_)),
      send_offsets_(send_counts_.size()),
      recv_counts_(send_counts_.size()),
      recv_offsets_(send_counts_.size()),
      count_messages_(index(num_ranks_ * message_width + nodes.num_nodes())),
      place_of_token_(index(options.max_tokens)),
      filled_(sources_.size()) {}

/// Most bytes of one message: a micro-batch's tokens with the list of their copies, or all its
/// rows.
std::int64_t Rails::most_token_bytes(const DispatcherOptions& options) {
  return options.max_tokens * row_bytes_of(options) +
         max_send_rows(options) * (4 + scalar_bytes_of(options)) + 3 * kUnit;
}
std::int64_t Rails::most_row_bytes(const DispatcherOptions& options) {
  return max_send_rows(options) * (row_bytes_of(options) + scalar_bytes_of(options)) + 2 * kUnit;
}

std::int64_t Rails::most_sent(const NodeMap& nodes, const DispatcherOptions& options) {
  const auto sources = std::ssize(nodes.relayed_by(nodes.rank));
  return whole_units(std::max((nodes.num_nodes() - 1) * most_token_bytes(options),
                              sources * most_row_bytes(options)));
}
/// A rank's rows come back spread over all nodes.
std::int64_t Rails::most_received(const NodeMap& nodes, const DispatcherOptions& options) {
  const auto sources = std::ssize(nodes.relayed_by(nodes.rank));
  return whole_units(std::max(sources * most_token_bytes(options),
                              most_row_bytes(options) + (nodes.num_nodes() - 1) * 2 * kUnit));
}

std::int64_t Rails::buffer_bytes(const NodeMap& nodes, const DispatcherOptions& options) {
  return most_sent(nodes, options) + most_received(nodes, options) + 2 * kUnit;
}

void Rails::add_plan_storage(Arena& arena, DispatchPlan& plan) const {
  const std::int64_t tokens = std::min(max_tokens_ * (nodes_.num_nodes() - 1), max_rows_);
  plan.storage.unique_tokens = arena.allocate_array<std::int32_t>(tokens);
  plan.unique_of_row = arena.allocate_array<std::int32_t>(max_rows_);
  plan.unique_counts = arena.allocate_array<std::int64_t>(nodes_.num_nodes());
  plan.relayed_unique = arena.allocate_array<std::int64_t>(std::ssize(sources_));
}

std::int64_t Rails::relayed_words(const NodeMap& nodes, std::int64_t message_width) {
  return 1 + std::ssize(nodes.mine()) * message_width;
}

std::int64_t Rails::rows_to(const DispatchPlan& plan, int node) const {
  std::int64_t rows = 0;
  for (const int rank : nodes_.ranks_of(node)) rows += plan.send_counts[index(rank)];
  return rows;
}

std::int64_t Rails::rows_from(const DispatchPlan& plan, std::size_t i) const {
  std::int64_t rows = 0;
  for (std::size_t place = 0; place < nodes_.mine().size(); ++place) {
    rows += plan.node_counts[place * index(num_ranks_) + index(sources_[i])];
  }
  return rows;
}

std::int64_t Rails::message_bytes(std::int64_t rows, std::int64_t indices,
                                  std::int64_t scalars) const {
  return whole_units(rows * row_bytes_) + whole_units(indices * 4) +
         (scalars_ ? whole_units(scalars * scalar_bytes_) : 0);
}

/// Tokens in the order in which the node's ranks and experts first ask for them.
void Rails::find_unique(DispatchPlan& plan) {
  std::size_t found = 0;
  for (int node = 0; node < nodes_.num_nodes(); ++node) {
    plan.unique_counts[index(node)] = 0;
    if (node == nodes_.node()) continue;
    std::fill_n(place_of_token_.begin(), plan.num_tokens, -1);
    std::int32_t count = 0;
    for (const int rank : nodes_.ranks_of(node)) {
      const std::int64_t begin = plan.send_offsets[index(rank)];
      for (std::int64_t row = begin; row < begin + plan.send_counts[index(rank)]; ++row) {
        const std::int32_t slot = plan.slot_of_row[index(row)];
        std::int32_t place = -1;
        if (slot >= 0) {
          const auto token = static_cast<std::int32_t>(slot / plan.slots_per_token);
          std::int32_t& known = place_of_token_[index(token)];
          if (known < 0) {
            known = count++;
            plan.storage.unique_tokens[found++] = token;
          }
          place = known;
        }
        plan.unique_of_row[index(row)] = place;
      }
    }
    plan.unique_counts[index(node)] = count;
  }
}

void Rails::clear_counts() {
  for (auto* counts : {&send_counts_, &send_offsets_, &recv_counts_, &recv_offsets_}) {
    std::ranges::fill(*counts, 0);
  }
}

void Rails::exchange_counts(Stream& stream, std::span<const std::int64_t> sent,
                            std::int64_t* relayed, DispatchPlan& plan) {
  find_unique(plan);
  clear_counts();
  std::int64_t end = 0;
  for (int node = 0; node < nodes_.num_nodes(); ++node) {
    if (node == nodes_.node()) continue;
    const std::size_t relay = index(nodes_.relay(nodes_.rank, node));
    send_offsets_[relay] = end;
    count_messages_[index(end++)] = plan.unique_counts[index(node)];
    for (const int rank : nodes_.ranks_of(node)) {
      std::copy_n(sent.begin() + rank * message_width_, message_width_,
                  count_messages_.begin() + end);
      end += message_width_;
    }
    send_counts_[relay] = end - send_offsets_[relay];
  }
  const std::int64_t words = relayed_words(nodes_, message_width_);
  for (std::size_t i = 0; i < sources_.size(); ++i) {
    recv_counts_[index(sources_[i])] = words;
    recv_offsets_[index(sources_[i])] = static_cast<std::int64_t>(i) * words;
  }
  stream.wait(exchange(stream, count_messages_.data(), relayed, sizeof(std::int64_t)));
  for (std::size_t i = 0; i < sources_.size(); ++i) {
    plan.relayed_unique[i] = relayed[static_cast<std::int64_t>(i) * words];
  }
}

Event Rails::exchange(Stream& stream, const void* send, void* recv, std::int64_t unit) {
  const std::int64_t before = comm_->sent_bytes();
  const Event event = comm_->all_to_all_v(
      stream, {send, send_counts_, send_offsets_, recv, recv_counts_, recv_offsets_, unit});
  ep_->count_sent(comm_->sent_bytes() - before);
  return event;
}

Event Rails::send_tokens(Stream& stream, const DispatchPlan& plan, ConstTensorView tokens,
                         ConstTensorView slot_scalars, bool scalars) {
  clear_counts();
  scalars_ = scalars;
  char* end = send_;
  const std::int32_t* unique = plan.storage.unique_tokens.data();
  for (int node = 0; node < nodes_.num_nodes(); ++node) {
    const std::int64_t rows = rows_to(plan, node);
    if (node == nodes_.node() || rows == 0) continue;
    const std::size_t relay = index(nodes_.relay(nodes_.rank, node));
    const std::int64_t count = plan.unique_counts[index(node)];
    send_offsets_[relay] = (end - send_) / kUnit;
    send_counts_[relay] = message_bytes(count, rows, rows) / kUnit;
    if (count > 0) {
      gather_rows(stream, {.y = {end, dtype_, count, hidden_size_},
                           .x = tokens,
                           .index = {unique, DType::i32, 1, count}});
    }
    unique += count;
    end += whole_units(count * row_bytes_);
    char* scalars_end = end + whole_units(rows * 4);
    for (const int rank : nodes_.ranks_of(node)) {
      const std::int64_t begin = plan.send_offsets[index(rank)];
      const std::int64_t sent = plan.send_counts[index(rank)];
      if (sent == 0) continue;
      std::memcpy(end, plan.unique_of_row.data() + begin, index(sent * 4));
      end += sent * 4;
      if (!scalars) continue;
      gather_rows(stream, {.y = {scalars_end, slot_scalars.dtype, sent, 1},
                           .x = {slot_scalars.data, slot_scalars.dtype, slot_scalars.size(), 1},
                           .index = {plan.slot_of_row.data() + begin, DType::i32, 1, sent}});
      scalars_end += sent * scalar_bytes_;
    }
    end = send_ + (send_offsets_[relay] + send_counts_[relay]) * kUnit;
  }
  std::int64_t at = 0;
  for (std::size_t i = 0; i < sources_.size(); ++i) {
    const std::int64_t rows = rows_from(plan, i);
    recv_offsets_[index(sources_[i])] = at;
    recv_counts_[index(sources_[i])] =
        rows == 0 ? 0 : message_bytes(plan.relayed_unique[i], rows, rows) / kUnit;
    at += recv_counts_[index(sources_[i])];
  }
  return exchange(stream, send_, recv_, kUnit);
}

void Rails::place_tokens(Stream& stream, const DispatchPlan& plan, std::size_t i, std::size_t place,
                         char* rows, char* row_scalars) const {
  const std::size_t source = index(sources_[i]);
  const std::int64_t* counts = plan.node_counts.data();
  const std::int64_t count = counts[place * index(num_ranks_) + source];
  if (count == 0) return;
  std::int64_t before = 0;
  for (std::size_t p = 0; p < place; ++p) before += counts[p * index(num_ranks_) + source];
  const std::int64_t unique = plan.relayed_unique[i];
  const char* message = recv_ + recv_offsets_[source] * kUnit;
  const char* list = message + whole_units(unique * row_bytes_);
  gather_rows(stream, {.y = {rows, dtype_, count, hidden_size_},
                       .x = {message, dtype_, unique, hidden_size_},
                       .index = {list + before * 4, DType::i32, 1, count}});
  if (!scalars_) return;
  const char* scalars = list + whole_units(rows_from(plan, i) * 4);
  std::memcpy(row_scalars, scalars + before * scalar_bytes_, index(count * scalar_bytes_));
}

void Rails::begin_return(const DispatchPlan& plan, bool scalars) {
  clear_counts();
  scalars_ = scalars;
  std::int64_t at = 0;
  for (std::size_t i = 0; i < sources_.size(); ++i) {
    const std::int64_t rows = rows_from(plan, i);
    filled_[i] = 0;
    send_offsets_[index(sources_[i])] = at;
    send_counts_[index(sources_[i])] = message_bytes(rows, 0, rows) / kUnit;
    at += send_counts_[index(sources_[i])];
  }
  at = 0;
  for (int node = 0; node < nodes_.num_nodes(); ++node) {
    if (node == nodes_.node()) continue;
    const std::size_t relay = index(nodes_.relay(nodes_.rank, node));
    const std::int64_t rows = rows_to(plan, node);
    recv_offsets_[relay] = at;
    recv_counts_[relay] = message_bytes(rows, 0, rows) / kUnit;
    at += recv_counts_[relay];
  }
}

void Rails::pack_return(const DispatchPlan& plan, std::size_t i, std::size_t place,
                        const char* rows, const char* scalars) {
  const std::size_t source = index(sources_[i]);
  const std::size_t entry = place * index(num_ranks_) + source;
  const std::int64_t count = plan.node_counts[entry];
  if (count == 0) return;
  const std::int64_t first = plan.node_offsets[entry];
  char* message = send_ + send_offsets_[source] * kUnit;
  std::memcpy(message + filled_[i] * row_bytes_, rows + first * row_bytes_,
              index(count * row_bytes_));
  if (scalars != nullptr) {
    char* to = message + whole_units(rows_from(plan, i) * row_bytes_);
    std::memcpy(to + filled_[i] * scalar_bytes_, scalars + first * scalar_bytes_,
                index(count * scalar_bytes_));
  }
  filled_[i] += count;
}

const char* Rails::returned_message(int node) const {
  return recv_ + recv_offsets_[index(nodes_.relay(nodes_.rank, node))] * kUnit;
}

std::int64_t Rails::rows_before(const DispatchPlan& plan, int owner) const {
  std::int64_t before = 0;
  for (const int rank : nodes_.ranks_of(nodes_.node_of[index(owner)])) {
    if (rank < owner) before += plan.send_counts[index(rank)];
  }
  return before;
}

const char* Rails::returned_rows(const DispatchPlan& plan, int owner) const {
  return returned_message(nodes_.node_of[index(owner)]) + rows_before(plan, owner) * row_bytes_;
}

const char* Rails::returned_scalars(const DispatchPlan& plan, int owner) const {
  const int node = nodes_.node_of[index(owner)];
  return returned_message(node) + whole_units(rows_to(plan, node) * row_bytes_) +
         rows_before(plan, owner) * scalar_bytes_;
}

}  // namespace arcus
