#include <fmt/format.h>

#include <cstring>
#include <vector>

#include "comm/backends.hpp"
#include "comm/token_dispatcher.hpp"
#include "kernels/elementwise.hpp"
#include "launch/bench.hpp"
#include "src/base/error.hpp"
#include "src/base/rng.hpp"

namespace arcus {
namespace {

/// One dispatcher with a plan for T tokens of uniformly random routing, and its buffers.
class Exchange {
 public:
  Exchange(Session& session, const BenchOptions& options, std::int64_t tokens, DispatchPath path)
      : session_(session),
        options_{.num_experts = options.config.model.num_experts,
                 .max_tokens = tokens,
                 .slots_per_token = options.config.model.topk,
                 .hidden_size = options.config.model.hidden_size,
                 .dtype = dtype_from_name(options.config.train.dtype)},
        dispatcher_(make_dispatcher(session.comm(), options_, path)),
        row_memory_(dispatcher_->make_row_memory(dispatcher_->max_recv_rows() * row_bytes() + 4096 +
                                                 kWgradRowPadding * row_bytes())),
        arena_("bench", std::int64_t{1} << 33) {
    const std::int64_t h = options_.hidden_size;
    const std::int64_t k = options_.slots_per_token;
    const std::int64_t most = dispatcher_->max_recv_rows();
    plan_ = dispatcher_->make_plan_storage(arena_);
    expert_of_slot_ = arena_.allocate(DType::i32, tokens, k);
    tokens_ = arena_.allocate(options_.dtype, tokens, h);
    rows_ = row_memory_.allocate(options_.dtype, most + kWgradRowPadding, h);
    out_ = arena_.allocate(options_.dtype, tokens, h);
    weight_ = arena_.allocate(accumulate_dtype(options_.dtype), tokens, k);
    packed_ = arena_.allocate(options_.dtype, tokens * k, h);
    back_ = arena_.allocate(options_.dtype, tokens * k, h);
    sorted_ = arena_.allocate(options_.dtype, most, h);
    slots_.resize(static_cast<std::size_t>(tokens * k));
    route(tokens, k);
    make_plan();
  }

  void make_plan() {
    dispatcher_->make_plan(session_.stream(), expert_of_slot_, session_.rank(), {}, plan_);
  }
  void dispatch() {
    Stream& stream = session_.stream();
    stream.wait(dispatcher_->dispatch(stream, plan_, tokens_, {}, received(), {}));
  }
  /// With the weighted sum over choices, which takes rows from where the dispatcher has them.
  void combine() {
    Stream& stream = session_.stream();
    SlotRows slot_rows;
    stream.wait(dispatcher_->combine(stream, plan_, received(), {}, slot_rows));
    sum(slot_rows.rows.data());
    dispatcher_->finish_combine();
  }
  /// The library's exchange of the same rows, there and back.
  void library_dispatch() {
    library_all_to_all_v(session_.comm(), {.send = packed_.data,
                                           .send_counts = plan_.send_counts,
                                           .send_offsets = plan_.send_offsets,
                                           .recv = rows_.data,
                                           .recv_counts = plan_.recv_counts,
                                           .recv_offsets = plan_.recv_offsets,
                                           .row_bytes = row_bytes()});
  }
  void library_combine() {
    library_all_to_all_v(session_.comm(), {.send = rows_.data,
                                           .send_counts = plan_.recv_counts,
                                           .send_offsets = plan_.recv_offsets,
                                           .recv = back_.data,
                                           .recv_counts = plan_.send_counts,
                                           .recv_offsets = plan_.send_offsets,
                                           .row_bytes = row_bytes()});
  }
  /// What a dispatch built on the library does: rows packed in send order, exchanged, and put into
  /// the order of local experts.
  void reference_dispatch() {
    for (std::int64_t row = 0; row < plan_.num_send_rows; ++row) {
      const std::int64_t slot = plan_.slot_of_row[static_cast<std::size_t>(row)];
      copy_row(packed_, row, tokens_, slot / options_.slots_per_token);
    }
    library_dispatch();
    std::int64_t next = 0;
    for (const Segment& segment : plan_.segments) {
      for (std::int64_t i = 0; i < segment.rows; ++i) {
        copy_row(sorted_, next++, rows_, segment.row_begin + i);
      }
    }
  }
  /// The same on the way back.
  void reference_combine() {
    std::int64_t next = 0;
    for (const Segment& segment : plan_.segments) {
      for (std::int64_t i = 0; i < segment.rows; ++i) {
        copy_row(rows_, segment.row_begin + i, sorted_, next++);
      }
    }
    library_combine();
    for (std::int64_t row = 0; row < plan_.num_send_rows; ++row) {
      copy_row(packed_, plan_.slot_of_row[static_cast<std::size_t>(row)], back_, row);
    }
    for (std::size_t slot = 0; slot < slots_.size(); ++slot) {
      slots_[slot] = packed_.row_range(static_cast<std::int64_t>(slot), 1).data;
    }
    sum(slots_.data());
  }

  /// Bytes that this rank sends, and those of them that leave it.
  double sent_bytes() const { return static_cast<double>(plan_.num_send_rows * row_bytes()); }
  double remote_bytes() const {
    const auto own = plan_.send_counts[static_cast<std::size_t>(session_.rank())];
    return static_cast<double>((plan_.num_send_rows - own) * row_bytes());
  }

 private:
  void route(std::int64_t tokens, std::int64_t k) {
    const Rng rng(1, "bench", fmt::format("rank {}", session_.rank()));
    const std::int64_t experts = options_.num_experts;
    for (std::int64_t t = 0; t < tokens; ++t) {
      // K neighbouring experts from a random one on.
      const float draw = rng.uniform(0, static_cast<std::uint64_t>(t));
      const auto first = static_cast<std::int64_t>(draw * static_cast<float>(experts));
      for (std::int64_t j = 0; j < k; ++j) {
        expert_of_slot_.row<std::int32_t>(t)[j] = static_cast<std::int32_t>((first + j) % experts);
      }
    }
    std::memset(tokens_.data, 1, static_cast<std::size_t>(tokens * row_bytes()));
    std::memset(packed_.data, 1, static_cast<std::size_t>(packed_.rows * row_bytes()));
  }

  std::int64_t row_bytes() const {
    return options_.hidden_size * static_cast<std::int64_t>(size_of(options_.dtype));
  }
  void sum(const void* const* slot_rows) {
    weighted_sum(session_.stream(), {.out = out_,
                                     .slot_rows = slot_rows,
                                     .weight = weight_,
                                     .slots_per_token = options_.slots_per_token});
  }
  TensorView received() const { return rows_.row_range(0, plan_.num_recv_rows); }
  void copy_row(TensorView to, std::int64_t to_row, TensorView from, std::int64_t from_row) const {
    std::memcpy(to.row_range(to_row, 1).data, from.row_range(from_row, 1).data,
                static_cast<std::size_t>(row_bytes()));
  }

  Session& session_;
  DispatcherOptions options_;
  std::unique_ptr<TokenDispatcher> dispatcher_;
  Arena row_memory_;
  Arena arena_;
  DispatchPlan plan_;
  TensorView expert_of_slot_, tokens_, rows_, packed_, back_, sorted_, out_, weight_;
  std::vector<const void*> slots_;
};

void print_row(std::int64_t tokens, const char* what, const Samples& samples, double algbw,
               double busbw, double reference_ms) {
  fmt::print("{:>6} {:<34} {:>9.3f} {:>9.3f} {:>9.3f}", tokens, what, samples.median(),
             samples.least(), samples.most());
  if (algbw > 0) fmt::print(" {:>8.2f} {:>8.2f}", algbw, busbw);
  if (reference_ms > 0) fmt::print(" {:>8.2f}", reference_ms / samples.median());
  fmt::print("\n");
}

void bench_tokens(Session& session, const BenchOptions& options, std::int64_t tokens,
                  DispatchPath path) {
  Exchange exchange(session, options, tokens, path);
  const double ranks = session.comm().size();
  const double bytes = sum_over_ranks(session, exchange.sent_bytes()) / ranks;
  const double remote = sum_over_ranks(session, exchange.remote_bytes()) / ranks;
  const auto run = [&](const std::function<void()>& fn) {
    return measure(session, session.stream(), options.repeats, fn);
  };
  const auto report = [&](const char* what, const Samples& samples, int ways,
                          double reference_ms = 0) {
    if (!session.is_root()) return;
    print_row(tokens, what, samples, ways * bytes / samples.median() / 1e6,
              ways * remote / samples.median() / 1e6, reference_ms);
  };
  const Samples there = run([&] { exchange.reference_dispatch(); });
  const Samples back = run([&] { exchange.reference_combine(); });
  const Samples both = run([&] {
    exchange.reference_dispatch();
    exchange.reference_combine();
  });
  report("plan and counts", run([&] { exchange.make_plan(); }), 0);
  report("dispatch", run([&] { exchange.dispatch(); }), 1, there.median());
  report("combine and weighted sum", run([&] { exchange.combine(); }), 1, back.median());
  report("both", run([&] {
           exchange.dispatch();
           exchange.combine();
         }),
         2, both.median());
  if (path != DispatchPath::flat) return;
  report("permute + MPI_Alltoallv + unpermute", there, 1);
  report("the same back and weighted sum", back, 1);
  report("both", both, 2);
  report("MPI_Alltoallv alone", run([&] { exchange.library_dispatch(); }), 1);
}

}  // namespace

ExitCode bench_dispatch(Session& session, const BenchOptions& options) {
  session.together([&] {
    ARCUS_REQUIRE(MpiSession::launched(), ExitCode::usage,
                  "bench dispatch exchanges rows between MPI ranks: start it with mpirun -np 4");
  });
  if (session.is_root()) {
    fmt::print(
        "{} ranks, {} experts, {} per token, rows of {} x {}; median of {} of the slowest "
        "rank's times\nalgbw: bytes of all kept rows a rank sends / time, busbw: those that "
        "leave the rank; GB/s\n",
        session.comm().size(), options.config.model.num_experts, options.config.model.topk,
        options.config.model.hidden_size, options.config.train.dtype, options.repeats);
    fmt::print("{:>6} {:<34} {:>9} {:>9} {:>9} {:>8} {:>8} {:>8}\n", "tokens", "what", "ms",
               "least", "most", "algbw", "busbw", "x library");
  }
  const std::int64_t full = options.config.train.micro_batch_seqs * options.config.train.seq_len;
  const DispatchPath path = dispatch_path_from_name(options.config.parallel.dispatch);
  for (const std::int64_t tokens : {full / 8, full, full * 8}) {
    if (tokens == 0) continue;
    if (path != DispatchPath::flat) {
      if (session.is_root()) fmt::print("through shared memory where the ranks have it:\n");
      bench_tokens(session, options, tokens, path);
    }
    if (path == DispatchPath::shared) continue;
    if (session.is_root()) fmt::print("one message per peer:\n");
    bench_tokens(session, options, tokens, DispatchPath::flat);
  }
  return ExitCode::ok;
}

}  // namespace arcus
