#include "comm/communicator.hpp"

#include <algorithm>
#include <array>
#include <numeric>

#include "kernels/profile.hpp"
#include "src/base/hash.hpp"

namespace arcus {
namespace {

enum class CallKind : std::int64_t {
  all_to_all_v,
  all_reduce,
  all_gather_v,
  reduce_scatter_v,
  broadcast,
  barrier,
  split
};

const char* name_of(CallKind kind) {
  static constexpr std::array<const char*, 7> kNames = {
      "all_to_all_v", "all_reduce", "all_gather_v", "reduce_scatter_v",
      "broadcast",    "barrier",    "split"};
  return kNames[static_cast<std::size_t>(kind)];
}

const char* name_of(ReduceOp op) {
  return op == ReduceOp::sum ? "sum" : op == ReduceOp::max ? "max" : "min";
}

std::int64_t bytes_of(const TensorView& view) {
  return view.size() * static_cast<std::int64_t>(size_of(view.dtype));
}

std::uint64_t hash_counts(std::span<const std::int64_t> counts,
                          std::span<const std::int64_t> offsets) {
  const std::array<std::uint64_t, 2> hashes = {hash_bytes(counts.data(), counts.size_bytes()),
                                               hash_bytes(offsets.data(), offsets.size_bytes())};
  return hash_of_hashes(hashes);
}

void check_buffer(CallKind kind, const TensorView& buffer) {
  ARCUS_CHECK(buffer.contiguous(), "{}: the buffer of {} x {} has padded rows (stride {})",
              name_of(kind), buffer.rows, buffer.cols, buffer.stride);
  ARCUS_CHECK(buffer.data != nullptr || buffer.size() == 0, "{}: null buffer of {} elements",
              name_of(kind), buffer.size());
}

/// One entry per rank, none negative.
void check_counts(CallKind kind, const char* what, int size, std::span<const std::int64_t> counts,
                  std::span<const std::int64_t> offsets) {
  const auto expected = static_cast<std::size_t>(size);
  ARCUS_CHECK(counts.size() == expected && offsets.size() == expected,
              "{}: {} {} counts and {} offsets for {} ranks", name_of(kind), counts.size(), what,
              offsets.size(), size);
  for (std::size_t r = 0; r < expected; ++r) {
    ARCUS_CHECK(counts[r] >= 0 && offsets[r] >= 0, "{}: {} count {} at offset {} for rank {}",
                name_of(kind), what, counts[r], offsets[r], r);
  }
}

/// No two parts share an element. Parts in ascending order, the usual case, take one pass.
void check_disjoint(CallKind kind, std::span<const std::int64_t> counts,
                    std::span<const std::int64_t> offsets) {
  bool ascending = true;
  for (std::size_t r = 1; r < counts.size(); ++r) {
    ascending = ascending && offsets[r] >= offsets[r - 1] + counts[r - 1];
  }
  if (ascending) return;
  for (std::size_t a = 0; a < counts.size(); ++a) {
    for (std::size_t b = a + 1; b < counts.size(); ++b) {
      const bool apart = counts[a] == 0 || counts[b] == 0 || offsets[a] + counts[a] <= offsets[b] ||
                         offsets[b] + counts[b] <= offsets[a];
      ARCUS_CHECK(apart, "{}: the parts of ranks {} ({} at {}) and {} ({} at {}) overlap",
                  name_of(kind), a, counts[a], offsets[a], b, counts[b], offsets[b]);
    }
  }
}

void check_parts(CallKind kind, int size, const TensorView& buffer,
                 std::span<const std::int64_t> counts, std::span<const std::int64_t> offsets) {
  check_buffer(kind, buffer);
  check_counts(kind, "part", size, counts, offsets);
  check_disjoint(kind, counts, offsets);
  for (std::size_t r = 0; r < counts.size(); ++r) {
    ARCUS_CHECK(offsets[r] + counts[r] <= buffer.size(),
                "{}: rank {}'s part ({} elements at {}) ends behind the buffer of {} elements",
                name_of(kind), r, counts[r], offsets[r], buffer.size());
  }
}

void check_reduction(CallKind kind, const CommunicatorOptions& options, DType dtype) {
  ARCUS_CHECK(dtype != DType::bf16, "{} of bf16 is not supported: widen to f32 first",
              name_of(kind));
  ARCUS_CHECK(!options.reproducible || (dtype != DType::f32 && dtype != DType::f64),
              "{} of {} in a reproducible run: floating-point sums depend on the number of ranks; "
              "quantise to i64 or gather the parts and add them in order",
              name_of(kind), arcus::name_of(dtype));
}

/// First and one past the last row that counts and offsets speak of.
std::pair<std::int64_t, std::int64_t> extent(std::span<const std::int64_t> counts,
                                             std::span<const std::int64_t> offsets) {
  std::int64_t begin = std::numeric_limits<std::int64_t>::max(), end = 0;
  for (std::size_t r = 0; r < counts.size(); ++r) {
    if (counts[r] == 0) continue;
    begin = std::min(begin, offsets[r]);
    end = std::max(end, offsets[r] + counts[r]);
  }
  return {std::min(begin, end), end};
}

void check_apart(const char* what, const void* send, std::pair<std::int64_t, std::int64_t> sent,
                 const void* recv, std::pair<std::int64_t, std::int64_t> received,
                 std::int64_t row_bytes) {
  const bool sends = sent.first < sent.second, receives = received.first < received.second;
  ARCUS_CHECK((!sends || send != nullptr) && (!receives || recv != nullptr),
              "all_to_all_v: null {} buffer with {} rows to send and {} to receive", what,
              sent.second - sent.first, received.second - received.first);
  if (!sends || !receives) return;
  const auto* s = static_cast<const char*>(send);
  const auto* r = static_cast<const char*>(recv);
  ARCUS_CHECK(s + sent.second * row_bytes <= r + received.first * row_bytes ||
                  r + received.second * row_bytes <= s + sent.first * row_bytes,
              "all_to_all_v: the {} buffers for sending and receiving overlap", what);
}

void check_exchange(int rank, int size, const AllToAllV& args) {
  constexpr auto kKind = CallKind::all_to_all_v;
  ARCUS_CHECK(args.row_bytes > 0 && args.scalar_bytes >= 0,
              "all_to_all_v: rows of {} bytes with {} beside", args.row_bytes, args.scalar_bytes);
  check_counts(kKind, "send", size, args.send_counts, args.send_offsets);
  check_counts(kKind, "receive", size, args.recv_counts, args.recv_offsets);
  check_disjoint(kKind, args.recv_counts, args.recv_offsets);
  const auto me = static_cast<std::size_t>(rank);
  ARCUS_CHECK(args.send_counts[me] == args.recv_counts[me],
              "all_to_all_v: rank {} sends itself {} rows and expects {}", rank,
              args.send_counts[me], args.recv_counts[me]);
  const auto sent = extent(args.send_counts, args.send_offsets);
  const auto received = extent(args.recv_counts, args.recv_offsets);
  check_apart("row", args.send, sent, args.recv, received, args.row_bytes);
  if (args.scalar_bytes > 0) {
    check_apart("scalar", args.send_scalars, sent, args.recv_scalars, received, args.scalar_bytes);
  }
}

}  // namespace

/// What ranks must agree on. Plain int64 fields, so that records can be compared and sent.
struct Communicator::Call {
  CallKind kind;
  std::int64_t dtype = -1;    ///< or bytes beside a row
  std::int64_t elements = 0;  ///< or bytes of a row
  std::int64_t detail = 0;    ///< reduction, root
  std::uint64_t counts = 0;   ///< hash of counts and offsets
  std::int64_t refused = 0;   ///< this rank's own arguments are wrong

  bool operator==(const Call&) const = default;
  std::string text() const;
};

std::string Communicator::Call::text() const {
  const char* name = name_of(kind);
  switch (kind) {
    case CallKind::all_to_all_v:
      return fmt::format("{}(rows of {} bytes, {} beside)", name, elements, dtype);
    case CallKind::all_reduce:
      return fmt::format("{}({} {}, {})", name, elements, arcus::name_of(static_cast<DType>(dtype)),
                         name_of(static_cast<ReduceOp>(detail)));
    case CallKind::all_gather_v:
    case CallKind::reduce_scatter_v:
      return fmt::format("{}({} {}, counts {})", name, elements,
                         arcus::name_of(static_cast<DType>(dtype)), hex(counts));
    case CallKind::broadcast:
      return fmt::format("{}({} {}, root {})", name, elements,
                         arcus::name_of(static_cast<DType>(dtype)), detail);
    default:
      return name;
  }
}

struct Communicator::CallCheck {
  explicit CallCheck(int size)
      : calls(static_cast<std::size_t>(size)),
        call_bytes(calls.size(), sizeof(Call)),
        call_offsets(calls.size()),
        ones(calls.size(), 1),
        indices(calls.size()),
        peer_counts(calls.size()) {
    for (std::size_t r = 0; r < calls.size(); ++r) {
      call_offsets[r] = static_cast<std::int64_t>(r * sizeof(Call));
      indices[r] = static_cast<std::int64_t>(r);
    }
  }
  std::vector<Call> calls;
  std::vector<std::int64_t> call_bytes, call_offsets, ones, indices, peer_counts;
};

Communicator::Communicator(int rank, int size, CommunicatorOptions options)
    : rank_(rank), size_(size), options_(options) {
  ARCUS_CHECK(options.max_call_elements > 0 &&
                  options.max_call_elements <= std::numeric_limits<std::int32_t>::max(),
              "max_call_elements is {}; it must be in 1..2^31-1", options.max_call_elements);
  if (options.checked) check_ = std::make_unique<CallCheck>(size);
}

Communicator::~Communicator() = default;

template <class Validate>
void Communicator::enter(const Call& call, Validate&& validate) {
  if (!check_) return validate();
  try {
    validate();
  } catch (const Error&) {
    Call refused = call;
    refused.refused = 1;
    compare_calls(refused);
    throw;
  }
  compare_calls(call);
}

void Communicator::compare_calls(const Call& mine) {
  auto& calls = check_->calls;
  calls[static_cast<std::size_t>(rank_)] = mine;
  const auto bytes = static_cast<std::int64_t>(calls.size() * sizeof(Call));
  do_all_gather_v(
      {TensorView(calls.data(), DType::u8, 1, bytes), check_->call_bytes, check_->call_offsets})
      .wait();
  if (mine.refused != 0) return;  // the caller throws its own message
  for (std::size_t r = 0; r < calls.size(); ++r) {
    ARCUS_REQUIRE(calls[r].refused == 0, ExitCode::comm,
                  "rank {} passed wrong arguments to {}; its own message says which", r,
                  name_of(calls[r].kind));
  }
  if (std::all_of(calls.begin(), calls.end(), [&](const Call& c) { return c == calls[0]; })) return;
  std::string text = "ranks make different collective calls:";
  for (std::size_t r = 0; r < calls.size(); ++r) {
    text += fmt::format("{} rank {}: {}", r == 0 ? "" : ";", r, calls[r].text());
  }
  ARCUS_FAIL(ExitCode::comm, "{}", text);
}

void Communicator::compare_counts(const AllToAllV& args) {
  if (!check_) return;
  do_all_to_all_v({args.send_counts.data(), check_->ones, check_->indices,
                   check_->peer_counts.data(), check_->ones, check_->indices, sizeof(std::int64_t)})
      .wait();
  std::string text;
  for (std::size_t r = 0; r < check_->peer_counts.size(); ++r) {
    if (check_->peer_counts[r] == args.recv_counts[r]) continue;
    text += fmt::format(" rank {} sends {} rows to rank {}, which expects {};", r,
                        check_->peer_counts[r], rank_, args.recv_counts[r]);
  }
  // One more exchange, so that a mismatch seen by one rank ends the call on all of them.
  auto& bad = check_->peer_counts;
  bad[static_cast<std::size_t>(rank_)] = text.empty() ? 0 : 1;
  do_all_gather_v({TensorView(bad.data(), DType::i64, 1, size_), check_->ones, check_->indices})
      .wait();
  ARCUS_REQUIRE(text.empty(), ExitCode::comm, "all_to_all_v: counts differ:{}", text);
  for (std::size_t r = 0; r < bad.size(); ++r) {
    ARCUS_REQUIRE(
        bad[r] == 0, ExitCode::comm,
        "all_to_all_v: rank {} expects other counts than it is sent; its own message says "
        "which",
        r);
  }
}

Event Communicator::all_to_all_v(Stream& stream, const AllToAllV& args) {
  const Span span(stream, "all_to_all_v");
  enter({CallKind::all_to_all_v, args.scalar_bytes, args.row_bytes},
        [&] { check_exchange(rank_, size_, args); });
  compare_counts(args);
  const auto rows = std::accumulate(args.send_counts.begin(), args.send_counts.end(),
                                    -args.send_counts[static_cast<std::size_t>(rank_)]);
  sent_bytes_ += rows * (args.row_bytes + args.scalar_bytes);
  return do_all_to_all_v(args);
}

Event Communicator::all_reduce(Stream& stream, const AllReduce& args) {
  const Span span(stream, "all_reduce");
  enter({CallKind::all_reduce, static_cast<std::int64_t>(args.buffer.dtype), args.buffer.size(),
         static_cast<std::int64_t>(args.op)},
        [&] {
          check_buffer(CallKind::all_reduce, args.buffer);
          check_reduction(CallKind::all_reduce, options_, args.buffer.dtype);
        });
  sent_bytes_ += 2 * bytes_of(args.buffer) * (size_ - 1) / size_;
  return timed([&] { return do_all_reduce(args); });
}

Event Communicator::all_gather_v(Stream& stream, const AllGatherV& args) {
  const Span span(stream, "all_gather_v");
  enter(
      {CallKind::all_gather_v, static_cast<std::int64_t>(args.buffer.dtype), args.buffer.size(), 0,
       hash_counts(args.counts, args.offsets)},
      [&] { check_parts(CallKind::all_gather_v, size_, args.buffer, args.counts, args.offsets); });
  sent_bytes_ += args.counts[static_cast<std::size_t>(rank_)] * (size_ - 1) *
                 static_cast<std::int64_t>(size_of(args.buffer.dtype));
  return timed([&] { return do_all_gather_v(args); });
}

Event Communicator::reduce_scatter_v(Stream& stream, const ReduceScatterV& args) {
  const Span span(stream, "reduce_scatter_v");
  enter({CallKind::reduce_scatter_v, static_cast<std::int64_t>(args.buffer.dtype),
         args.buffer.size(), 0, hash_counts(args.counts, args.offsets)},
        [&] {
          check_parts(CallKind::reduce_scatter_v, size_, args.buffer, args.counts, args.offsets);
          check_reduction(CallKind::reduce_scatter_v, options_, args.buffer.dtype);
        });
  const auto elements = std::accumulate(args.counts.begin(), args.counts.end(),
                                        -args.counts[static_cast<std::size_t>(rank_)]);
  sent_bytes_ += elements * static_cast<std::int64_t>(size_of(args.buffer.dtype));
  return timed([&] { return do_reduce_scatter_v(args); });
}

Event Communicator::broadcast(Stream& stream, const Broadcast& args) {
  const Span span(stream, "broadcast");
  enter({CallKind::broadcast, static_cast<std::int64_t>(args.buffer.dtype), args.buffer.size(),
         args.root},
        [&] {
          check_buffer(CallKind::broadcast, args.buffer);
          ARCUS_CHECK(args.root >= 0 && args.root < size_, "broadcast: root {} of {} ranks",
                      args.root, size_);
        });
  if (rank_ == args.root) sent_bytes_ += bytes_of(args.buffer) * (size_ - 1);
  return timed([&] { return do_broadcast(args); });
}

void Communicator::meet(Stream& stream) {
  if (stream.profile() != nullptr && stream.profile()->separates_waits()) barrier(stream);
}

void Communicator::barrier(Stream& stream) {
  const Span span(stream, "barrier");
  enter({CallKind::barrier}, [] {});
  do_barrier();
}

std::unique_ptr<Communicator> Communicator::split(int color, int key) {
  enter({CallKind::split},
        [&] { ARCUS_CHECK(color >= 0, "split: colour {} of rank {} is negative", color, rank_); });
  return do_split(color, key);
}

std::unique_ptr<Communicator> Communicator::split_by_node() {
  if (options_.ranks_per_node > 0) return split(rank_ / options_.ranks_per_node, rank_);
  enter({CallKind::split}, [] {});
  return do_split_by_node();
}

std::unique_ptr<SharedMemory> Communicator::share_memory(std::int64_t /*bytes*/) { return nullptr; }

}  // namespace arcus
