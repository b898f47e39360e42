#include "comm/token_dispatcher.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <vector>

#include "kernels/elementwise.hpp"
#include "kernels/profile.hpp"
#include "src/base/hash.hpp"

namespace arcus {
namespace {

/// The message of the counts exchange, int64: what both sides must agree on, then one count for
/// each of the receiver's experts.
enum Field { kStep, kLayer, kMicroBatch, kRows, kConfiguration, kNumFields };

std::int64_t most_rows_per_segment(const DispatcherOptions& options) {
  return options.capacity > 0 ? std::min(options.capacity, options.max_tokens) : options.max_tokens;
}

std::int64_t hash_of(const DispatcherOptions& o) {
  const std::array<std::int64_t, 7> values = {o.num_experts,
                                              o.max_tokens,
                                              o.slots_per_token,
                                              o.hidden_size,
                                              static_cast<std::int64_t>(o.dtype),
                                              o.capacity,
                                              o.padded_capacity};
  return static_cast<std::int64_t>(hash_bytes(values.data(), sizeof(values)));
}

std::int64_t exclusive_prefix_sum(std::span<const std::int64_t> counts,
                                  std::span<std::int64_t> offsets) {
  std::int64_t sum = 0;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    offsets[i] = sum;
    sum += counts[i];
  }
  return sum;
}

}  // namespace

std::int64_t max_send_rows(const DispatcherOptions& options) {
  return std::max(options.max_tokens * options.slots_per_token,
                  options.num_experts * options.padded_capacity);
}

std::int64_t max_recv_rows(const DispatcherOptions& options, int rank, int num_ranks) {
  const ExpertPartition experts(options.num_experts, num_ranks);
  const std::int64_t per_source =
      std::min(options.max_tokens * std::min(options.slots_per_token, experts.count(rank)),
               experts.count(rank) * most_rows_per_segment(options));
  return std::max(per_source, experts.count(rank) * options.padded_capacity) * num_ranks;
}

std::int64_t max_padded_rows(const DispatcherOptions& options, int rank, int num_ranks) {
  const ExpertPartition experts(options.num_experts, num_ranks);
  const std::int64_t rows = max_recv_rows(options, rank, num_ranks);
  const std::int64_t segments = std::min(rows, experts.count(rank) * num_ranks);
  return std::min(rows + segments * (kWgradRowPadding - 1),
                  segments * padded_rows(most_rows_per_segment(options)));
}

/// Buffers of make_plan.
struct TokenDispatcher::Counting {
  Counting(const DispatcherOptions& options, const ExpertPartition& experts, int rank)
      : num_ranks(static_cast<std::size_t>(experts.num_ranks())),
        local_experts(experts.count(rank)),
        width(static_cast<std::size_t>(message_width(options, experts.num_ranks()))),
        configuration(hash_of(options)),
        next_row(static_cast<std::size_t>(options.num_experts + 1)),
        sent(num_ranks * width),
        received(num_ranks * width),
        ones(num_ranks, 1),
        indices(num_ranks),
        sources(num_ranks),
        next_of_source(num_ranks) {
    for (std::size_t r = 0; r < num_ranks; ++r) indices[r] = static_cast<std::int64_t>(r);
  }
  std::int64_t* to(int rank) { return sent.data() + static_cast<std::size_t>(rank) * width; }
  const std::int64_t* from(int rank) const {
    return received.data() + static_cast<std::size_t>(rank) * width;
  }

  std::size_t num_ranks;
  std::int64_t local_experts;
  std::size_t width;                   ///< of one message
  std::int64_t configuration;          ///< hash of the options
  std::vector<std::int64_t> next_row;  ///< [E + 1]
  std::vector<std::int64_t> sent, received;
  std::vector<std::int64_t> ones, indices;
  std::vector<int> sources;                  ///< ranks by micro-batch number
  std::vector<std::int64_t> next_of_source;  ///< first row not yet in a segment
};

TokenDispatcher::TokenDispatcher(Communicator& comm, const DispatcherOptions& options)
    : comm_(&comm), options_(options), experts_(options.num_experts, comm.size()) {
  ARCUS_CHECK(options.max_tokens > 0 && options.slots_per_token > 0 && options.hidden_size > 0 &&
                  options.capacity >= 0 && options.padded_capacity >= 0 &&
                  options.padded_capacity <= most_rows_per_segment(options),
              "dispatcher for {} tokens x {} slots of {} elements, capacity {}, padded to {}",
              options.max_tokens, options.slots_per_token, options.hidden_size, options.capacity,
              options.padded_capacity);
  ARCUS_REQUIRE(arcus::max_send_rows(options) <= std::numeric_limits<std::int32_t>::max(),
                ExitCode::usage,
                "a micro-batch of {} tokens has up to {} rows for experts, more than 2^31; lower "
                "train.micro_batch_seqs",
                options.max_tokens, arcus::max_send_rows(options));
  counting_ = std::make_unique<Counting>(options_, experts_, comm.rank());
}

TokenDispatcher::~TokenDispatcher() = default;

std::int64_t TokenDispatcher::max_recv_rows() const {
  return arcus::max_recv_rows(options_, comm_->rank(), comm_->size());
}
std::int64_t TokenDispatcher::max_padded_rows() const {
  return arcus::max_padded_rows(options_, comm_->rank(), comm_->size());
}

DispatchPlan TokenDispatcher::make_plan_storage(Arena& arena) const {
  const std::int64_t slots = options_.max_tokens * options_.slots_per_token, ranks = comm_->size();
  DispatchPlan plan;
  plan.storage.row_of_slot = arena.allocate_array<std::int32_t>(slots);
  plan.storage.slot_of_row = arena.allocate_array<std::int32_t>(max_send_rows(options_));
  for (auto* counts :
       {&plan.send_counts, &plan.send_offsets, &plan.recv_counts, &plan.recv_offsets}) {
    *counts = arena.allocate_array<std::int64_t>(ranks);
  }
  add_plan_storage(arena, plan);
  const auto segments = static_cast<std::size_t>(counting_->local_experts * ranks);
  for (auto* list : {&plan.storage.segments, &plan.storage.own_then_others}) {
    void* memory = arena.allocate_bytes(static_cast<std::int64_t>(segments * sizeof(Segment)));
    *list = {static_cast<Segment*>(memory), memory == nullptr ? 0 : segments};
  }
  plan.slots_per_token = options_.slots_per_token;
  return plan;
}

void TokenDispatcher::make_plan(Stream& stream, ConstTensorView expert_of_slot,
                                std::int64_t micro_batch, PlanTag tag, DispatchPlan& plan,
                                std::int64_t rows_per_expert) {
  const std::int64_t tokens = expert_of_slot.rows, slots = expert_of_slot.cols;
  ARCUS_CHECK(tokens <= options_.max_tokens && slots <= options_.slots_per_token,
              "expert_of_slot is {} x {}; the dispatcher was made for {} x {}", tokens, slots,
              options_.max_tokens, options_.slots_per_token);
  ARCUS_CHECK(tokens == 0 || micro_batch >= 0, "{} tokens of micro-batch {}", tokens, micro_batch);
  ARCUS_CHECK(rows_per_expert <= options_.padded_capacity,
              "{} rows per expert; the dispatcher was made for {}", rows_per_expert,
              options_.padded_capacity);
  const Span span(stream, "plan");
  plan.num_tokens = tokens;
  plan.slots_per_token = slots;
  plan.micro_batch = micro_batch;
  sort_slots(expert_of_slot, tokens > 0 ? rows_per_expert : 0, plan);
  comm_->meet(stream);
  exchange_counts(stream, tag, plan);
  place_segments(plan);
}

Arena TokenDispatcher::make_row_memory(std::int64_t bytes) { return {"received rows", bytes}; }

void TokenDispatcher::check_rows(const char* what, const ConstTensorView& view,
                                 std::int64_t expected) const {
  ARCUS_CHECK(view.rows == expected && (expected == 0 || view.cols == options_.hidden_size) &&
                  (expected == 0 || view.dtype == options_.dtype),
              "{} are {} x {} {}, the plan has {} of {} {}", what, view.rows, view.cols,
              name_of(view.dtype), expected, options_.hidden_size, name_of(options_.dtype));
}

void TokenDispatcher::check_scalars(const char* what, const ConstTensorView& view,
                                    std::int64_t expected) const {
  const DType dtype = accumulate_dtype(options_.dtype);
  ARCUS_CHECK(
      view.size() == expected && view.contiguous() && (expected == 0 || view.dtype == dtype),
      "{} {} scalars of {}, the plan has {} of {}", view.size(), what, name_of(view.dtype),
      expected, name_of(dtype));
}

void TokenDispatcher::check_dispatch(const DispatchPlan& plan, const ConstTensorView& tokens,
                                     const ConstTensorView& slot_scalars,
                                     const ConstTensorView& rows,
                                     const ConstTensorView& row_scalars) const {
  check_rows("tokens", tokens, plan.num_tokens);
  check_rows("rows", rows, plan.num_recv_rows);
  ARCUS_CHECK(rows.contiguous(), "dispatch: received rows have a stride of {}", rows.stride);
  if (slot_scalars.data == nullptr && row_scalars.data == nullptr) return;
  check_scalars("slot", slot_scalars, plan.num_tokens * plan.slots_per_token);
  check_scalars("row", row_scalars, plan.num_recv_rows);
}

void TokenDispatcher::clear_padding(Stream& stream, const DispatchPlan& plan,
                                    TensorView rows) const {
  if (rows.data == nullptr) return;
  const std::int64_t row_bytes = options_.hidden_size * size_of(options_.dtype);
  fill_zero(stream, {.y = {static_cast<char*>(rows.data) + plan.num_recv_rows * row_bytes,
                           options_.dtype, kWgradRowPadding, options_.hidden_size}});
}

void TokenDispatcher::check_combine(const DispatchPlan& plan, const ConstTensorView& rows,
                                    const ConstTensorView& row_scalars) const {
  check_rows("rows", rows, plan.num_recv_rows);
  ARCUS_CHECK(rows.contiguous(), "combine: rows have a stride of {}", rows.stride);
  if (row_scalars.data != nullptr) check_scalars("row", row_scalars, plan.num_recv_rows);
}

std::int64_t TokenDispatcher::message_width(const DispatcherOptions& options, int num_ranks) {
  // The first rank has the most experts.
  return kNumFields + ExpertPartition(options.num_experts, num_ranks).count(0);
}

std::int64_t TokenDispatcher::rows_of_message(const std::int64_t* message) {
  return message[kRows];
}

void TokenDispatcher::exchange_messages(Stream& stream, std::span<const std::int64_t> sent,
                                        std::span<std::int64_t> received, DispatchPlan&) {
  const Counting& c = *counting_;
  stream.wait(comm_->all_to_all_v(stream, {sent.data(), c.ones, c.indices, received.data(), c.ones,
                                           c.indices, static_cast<std::int64_t>(c.width * 8)}));
}

DispatchPath dispatch_path_from_name(std::string_view name) {
  if (name == "flat") return DispatchPath::flat;
  if (name == "shared") return DispatchPath::shared;
  ARCUS_REQUIRE(name == "auto", ExitCode::usage,
                "parallel.dispatch is \"{}\"; it must be \"auto\", \"flat\" or \"shared\"", name);
  return DispatchPath::automatic;
}

std::unique_ptr<TokenDispatcher> make_dispatcher(Communicator& ep, const DispatcherOptions& options,
                                                 DispatchPath path) {
  if (path == DispatchPath::flat || ep.size() == 1) return make_flat_dispatcher(ep, options);
  auto dispatcher = make_shared_dispatcher(ep, options);
  ARCUS_REQUIRE(dispatcher != nullptr || path == DispatchPath::automatic, ExitCode::usage,
                "parallel.dispatch is \"shared\", but the {} ranks that exchange tokens cannot "
                "share memory on their nodes (containers of their own?); set it to \"auto\"",
                ep.size());
  return dispatcher != nullptr ? std::move(dispatcher) : make_flat_dispatcher(ep, options);
}

/// Counting sort by expert, stable in (token, choice rank); since experts are numbered along the
/// ranks this also sorts by owner.
void TokenDispatcher::sort_slots(ConstTensorView expert_of_slot, std::int64_t rows_per_expert,
                                 DispatchPlan& plan) {
  auto& next_row = counting_->next_row;
  const std::int64_t tokens = plan.num_tokens, slots = plan.slots_per_token;
  std::fill(next_row.begin(), next_row.end(), 0);
  for (std::int64_t t = 0; t < tokens; ++t) {
    const auto* experts = expert_of_slot.row<std::int32_t>(t);
    for (std::int64_t k = 0; k < slots; ++k) {
      ARCUS_CHECK(experts[k] >= -1 && experts[k] < options_.num_experts,
                  "token {}, choice {} goes to expert {} of {}", t, k, experts[k],
                  options_.num_experts);
      if (experts[k] >= 0) ++next_row[static_cast<std::size_t>(experts[k]) + 1];
    }
  }
  for (std::size_t e = 1; e < next_row.size(); ++e) {
    ARCUS_CHECK(rows_per_expert == 0 || next_row[e] <= rows_per_expert,
                "expert {} is wanted by {} assignments, but has {} rows", e - 1, next_row[e],
                rows_per_expert);
    next_row[e] = next_row[e - 1] + (rows_per_expert > 0 ? rows_per_expert : next_row[e]);
  }
  plan.num_send_rows = next_row.back();
  for (int r = 0; r < comm_->size(); ++r) {
    const auto begin = static_cast<std::size_t>(experts_.begin(r));
    const auto end = static_cast<std::size_t>(experts_.begin(r + 1));
    const auto rank = static_cast<std::size_t>(r);
    plan.send_offsets[rank] = next_row[begin];
    plan.send_counts[rank] = next_row[end] - next_row[begin];
    std::int64_t* counts = counting_->to(r) + kNumFields;
    for (std::size_t e = begin; e < end; ++e) counts[e - begin] = next_row[e + 1] - next_row[e];
  }
  plan.row_of_slot = plan.storage.row_of_slot.first(static_cast<std::size_t>(tokens * slots));
  plan.slot_of_row = plan.storage.slot_of_row.first(static_cast<std::size_t>(plan.num_send_rows));
  if (rows_per_expert > 0) std::ranges::fill(plan.slot_of_row, -1);
  for (std::int64_t t = 0; t < tokens; ++t) {
    const auto* experts = expert_of_slot.row<std::int32_t>(t);
    for (std::int64_t k = 0; k < slots; ++k) {
      const std::int64_t slot = t * slots + k;
      const std::int64_t row =
          experts[k] < 0 ? -1 : next_row[static_cast<std::size_t>(experts[k])]++;
      plan.row_of_slot[static_cast<std::size_t>(slot)] = static_cast<std::int32_t>(row);
      if (row >= 0) {
        plan.slot_of_row[static_cast<std::size_t>(row)] = static_cast<std::int32_t>(slot);
      }
    }
  }
}

void TokenDispatcher::exchange_counts(Stream& stream, PlanTag tag, DispatchPlan& plan) {
  const Span span(stream, "counts exchange");
  Counting& c = *counting_;
  for (int r = 0; r < comm_->size(); ++r) {
    std::int64_t* message = c.to(r);
    message[kStep] = tag.step;
    message[kLayer] = tag.layer;
    message[kMicroBatch] = plan.micro_batch;
    message[kRows] = plan.send_counts[static_cast<std::size_t>(r)];
    message[kConfiguration] = c.configuration;
  }
  exchange_messages(stream, c.sent, c.received, plan);
  check_counts(tag);
  for (int r = 0; r < comm_->size(); ++r) {
    plan.recv_counts[static_cast<std::size_t>(r)] = c.from(r)[kRows];
  }
  plan.num_recv_rows = exclusive_prefix_sum(plan.recv_counts, plan.recv_offsets);
  ARCUS_REQUIRE(
      plan.num_recv_rows <= max_recv_rows(), ExitCode::comm,
      "step {}, layer {}: rank {} is to receive {} rows, at most {} are possible; a token "
      "was sent to one expert twice or the capacity was exceeded",
      tag.step, tag.layer, comm_->rank(), plan.num_recv_rows, max_recv_rows());
}

/// A rank that is elsewhere, or counts that do not add up, end the run here: the payload exchange
/// that follows could only hang or mix up rows.
void TokenDispatcher::check_counts(PlanTag tag) const {
  const Counting& c = *counting_;
  for (int r = 0; r < comm_->size(); ++r) {
    const std::int64_t* message = c.from(r);
    ARCUS_REQUIRE(message[kStep] == tag.step && message[kLayer] == tag.layer, ExitCode::comm,
                  "counts exchange: rank {} is at step {}, layer {} while rank {} is at step {}, "
                  "layer {}",
                  r, message[kStep], message[kLayer], comm_->rank(), tag.step, tag.layer);
    ARCUS_REQUIRE(message[kConfiguration] == c.configuration, ExitCode::comm,
                  "counts exchange at step {}, layer {}: rank {} has another dispatch "
                  "configuration than rank {}",
                  tag.step, tag.layer, r, comm_->rank());
    std::int64_t sum = 0;
    bool possible = true;
    for (std::int64_t e = 0; e < c.local_experts; ++e) {
      const std::int64_t rows = message[kNumFields + e];
      possible = possible && rows >= 0 && rows <= most_rows_per_segment(options_);
      sum += rows;
    }
    ARCUS_REQUIRE(
        sum == message[kRows], ExitCode::comm,
        "counts exchange at step {}, layer {}: rank {} announces {} rows for rank {}, its "
        "counts per expert add up to {}",
        tag.step, tag.layer, r, message[kRows], comm_->rank(), sum);
    ARCUS_REQUIRE(possible && (sum == 0 || message[kMicroBatch] >= 0), ExitCode::comm,
                  "counts exchange at step {}, layer {}: rank {} (micro-batch {}) announces an "
                  "impossible number of rows for one expert of rank {}; at most {} can be",
                  tag.step, tag.layer, r, message[kMicroBatch], comm_->rank(),
                  most_rows_per_segment(options_));
    for (int other = 0; other < r; ++other) {
      ARCUS_REQUIRE(
          message[kMicroBatch] < 0 || message[kMicroBatch] != c.from(other)[kMicroBatch],
          ExitCode::comm,
          "counts exchange at step {}, layer {}: ranks {} and {} both have micro-batch {}",
          tag.step, tag.layer, other, r, message[kMicroBatch]);
    }
  }
}

/// Segments by (local expert, micro-batch); received rows lie by (source rank, local expert).
void TokenDispatcher::place_segments(DispatchPlan& plan) {
  Counting& c = *counting_;
  for (std::size_t r = 0; r < c.num_ranks; ++r) {
    c.sources[r] = static_cast<int>(r);
    c.next_of_source[r] = plan.recv_offsets[r];
  }
  std::sort(c.sources.begin(), c.sources.end(), [&](int a, int b) {
    return std::pair(c.from(a)[kMicroBatch], a) < std::pair(c.from(b)[kMicroBatch], b);
  });
  std::size_t num_segments = 0;
  plan.num_padded_rows = 0;
  for (std::int64_t e = 0; e < c.local_experts; ++e) {
    for (const int source : c.sources) {
      const std::int64_t rows = c.from(source)[kNumFields + e];
      if (rows == 0) continue;
      auto& next = c.next_of_source[static_cast<std::size_t>(source)];
      plan.storage.segments[num_segments++] = {static_cast<std::int32_t>(e),
                                               c.from(source)[kMicroBatch], next,
                                               plan.num_padded_rows, rows};
      next += rows;
      plan.num_padded_rows += padded_rows(rows);
    }
  }
  plan.segments = plan.storage.segments.first(num_segments);
  const std::int64_t own_begin = plan.recv_offsets[static_cast<std::size_t>(comm_->rank())];
  const std::int64_t own_end =
      own_begin + plan.recv_counts[static_cast<std::size_t>(comm_->rank())];
  const auto is_own = [&](const Segment& segment) {
    return segment.row_begin >= own_begin && segment.row_begin < own_end;
  };
  const std::span<Segment> apart = plan.storage.own_then_others.first(num_segments);
  const auto own = static_cast<std::size_t>(
      std::copy_if(plan.segments.begin(), plan.segments.end(), apart.begin(), is_own) -
      apart.begin());
  std::copy_if(plan.segments.begin(), plan.segments.end(), apart.begin() + own,
               [&](const Segment& segment) { return !is_own(segment); });
  plan.own_segments = apart.first(own);
  plan.other_segments = apart.subspan(own);
}

}  // namespace arcus
