#include <fmt/format.h>
#include <sys/resource.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "comm/backends.hpp"
#include "comm/node_map.hpp"
#include "comm/token_dispatcher.hpp"
#include "kernels/elementwise.hpp"
#include "launch/bench.hpp"
#include "launch/bench_experts.hpp"
#include "src/base/error.hpp"
#include "src/base/rng.hpp"
#include "src/model/dense_ffn.hpp"

namespace arcus {
namespace {

/// One dispatcher with a plan for T tokens of uniformly random routing, and its buffers.
class Exchange {
 public:
  Exchange(Session& session, const BenchOptions& options, std::int64_t tokens, const NodeMap& nodes,
           bool shared)
      : session_(session),
        nodes_(nodes),
        options_{.num_experts = options.config.model.num_experts,
                 .max_tokens = tokens,
                 .slots_per_token = options.config.model.topk,
                 .hidden_size = options.config.model.hidden_size,
                 .dtype = dtype_from_name(options.config.train.dtype)},
        dispatcher_(shared ? make_shared_dispatcher(session.comm(), options_)
                           : make_flat_dispatcher(session.comm(), options_)),
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
  /// Both ways without the weighted sum, `beside` meanwhile: polled between its tasks.
  void dispatch_beside(const std::function<void()>& beside) {
    Stream& stream = session_.stream();
    const Event arrived = dispatcher_->dispatch(stream, plan_, tokens_, {}, received(), {});
    stream.poll_between_tasks(arrived);
    beside();
    stream.wait(arrived);
  }
  void combine_beside(const std::function<void()>& beside) {
    Stream& stream = session_.stream();
    SlotRows slot_rows;
    const Event returned = dispatcher_->combine(stream, plan_, received(), {}, slot_rows);
    stream.poll_between_tasks(returned);
    beside();
    stream.wait(returned);
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

  /// Bytes that this rank sends, those of them that leave it, and those that leave its node if
  /// every row does, or every token once for each node.
  double sent_bytes() const { return static_cast<double>(plan_.num_send_rows * row_bytes()); }
  double remote_bytes() const {
    const auto own = plan_.send_counts[static_cast<std::size_t>(session_.rank())];
    return static_cast<double>((plan_.num_send_rows - own) * row_bytes());
  }
  double leaving_bytes() const {
    std::int64_t rows = plan_.num_send_rows;
    for (const int rank : nodes_.mine()) rows -= plan_.send_counts[static_cast<std::size_t>(rank)];
    return static_cast<double>(rows * row_bytes());
  }
  double unique_bytes() const {
    const ExpertPartition& experts = dispatcher_->experts();
    std::int64_t rows = 0;
    for (std::int64_t t = 0; t < expert_of_slot_.rows; ++t) {
      std::vector<bool> there(static_cast<std::size_t>(nodes_.num_nodes()));
      const auto* choice = expert_of_slot_.row<std::int32_t>(t);
      for (int rank = 0; rank < nodes_.num_ranks(); ++rank) {
        const int node = nodes_.node_of[static_cast<std::size_t>(rank)];
        for (std::int64_t k = 0; k < expert_of_slot_.cols; ++k) {
          const bool owns = choice[k] >= experts.begin(rank) && choice[k] < experts.begin(rank + 1);
          if (owns && node != nodes_.node()) there[static_cast<std::size_t>(node)] = true;
        }
      }
      rows += std::count(there.begin(), there.end(), true);
    }
    return static_cast<double>(rows * row_bytes());
  }
  /// Bytes that left this rank's node in one dispatch, through rails.
  double measured_bytes() {
    const std::int64_t before = session_.comm().sent_bytes();
    dispatch();
    std::int64_t inside = 0;
    for (const int rank : nodes_.mine()) {
      if (rank != session_.rank()) inside += plan_.send_counts[static_cast<std::size_t>(rank)];
    }
    return static_cast<double>(session_.comm().sent_bytes() - before - inside * row_bytes());
  }

 private:
  void route(std::int64_t tokens, std::int64_t k) {
    const Rng rng(1, "bench", fmt::format("rank {}", session_.rank()));
    const std::int64_t experts = options_.num_experts;
    std::vector<std::int32_t> order(static_cast<std::size_t>(experts));
    std::iota(order.begin(), order.end(), 0);
    for (std::int64_t t = 0; t < tokens; ++t) {
      // The first K of a shuffle: any K different experts.
      for (std::int64_t j = 0; j < k; ++j) {
        const float draw =
            rng.uniform(static_cast<std::uint64_t>(j), static_cast<std::uint64_t>(t));
        const auto other = j + static_cast<std::int64_t>(draw * static_cast<float>(experts - j));
        std::swap(order[static_cast<std::size_t>(j)], order[static_cast<std::size_t>(other)]);
        expert_of_slot_.row<std::int32_t>(t)[j] = order[static_cast<std::size_t>(j)];
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
  const NodeMap& nodes_;
  DispatcherOptions options_;
  std::unique_ptr<TokenDispatcher> dispatcher_;
  Arena row_memory_;
  Arena arena_;
  DispatchPlan plan_;
  TensorView expert_of_slot_, tokens_, rows_, packed_, back_, sorted_, out_, weight_;
  std::vector<const void*> slots_;
};

/// One measured thing, and the places of those it is compared with; -1 = none.
struct Line {
  const char* what;
  std::function<void()> fn;
  int ways;  ///< 1 there or back, 2 both, 0 no rows travel
  int library = -1;
  int flat = -1;
};

/// Dispatch, combine and both at `first` of the lines.
void add_lines(std::vector<Line>& lines, Exchange& exchange, bool library, int flat) {
  const int same = library ? 0 : -1;
  const auto beside = [&](int base, int line) { return base < 0 ? -1 : base + line; };
  lines.push_back({"dispatch", [&] { exchange.dispatch(); }, 1, beside(same, 0), beside(flat, 0)});
  lines.push_back({"combine and weighted sum", [&] { exchange.combine(); }, 1, beside(same, 1),
                   beside(flat, 1)});
  lines.push_back({"both",
                   [&] {
                     exchange.dispatch();
                     exchange.combine();
                   },
                   2, beside(same, 2), beside(flat, 2)});
  lines.push_back({"plan and counts", [&] { exchange.make_plan(); }, 0, -1, beside(flat, 3)});
}

void print_line(std::int64_t tokens, const Line& line, const std::vector<Samples>& samples,
                std::size_t i, double bytes, double remote) {
  const double ms = samples[i].median();
  fmt::print("{:>6} {:<34} {:>9.3f} {:>9.3f} {:>9.3f}", tokens, line.what, ms, samples[i].least(),
             samples[i].most());
  if (line.ways > 0) {
    fmt::print(" {:>8.2f} {:>8.2f}", line.ways * bytes / ms / 1e6, line.ways * remote / ms / 1e6);
  } else {
    fmt::print(" {:>8} {:>8}", "", "");
  }
  const auto ratio = [&](int base) {
    return base < 0 ? std::string()
                    : fmt::format("{:.2f}", samples[static_cast<std::size_t>(base)].median() / ms);
  };
  fmt::print(" {:>9} {:>8}\n", ratio(line.library), ratio(line.flat));
}

void print_node_bytes(Session& session, Exchange& flat, Exchange& rails) {
  const double ranks = session.comm().size();
  const double all = sum_over_ranks(session, flat.leaving_bytes()) / ranks;
  const double unique = sum_over_ranks(session, rails.unique_bytes()) / ranks;
  const double sent = sum_over_ranks(session, rails.measured_bytes()) / ranks;
  if (!session.is_root() || unique == 0) return;
  fmt::print(
      "dispatch, KiB that leave the node per rank: every row {:.0f}, every token once a node "
      "{:.0f}, "
      "sent {:.0f} ({:+.1f} %)\n",
      all / 1024, unique / 1024, sent / 1024, 100 * (sent / unique - 1));
}

/// Seconds that the kernel worked for this process: what a transport costs beside waiting.
double system_seconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_stime.tv_sec) +
         1e-6 * static_cast<double>(usage.ru_stime.tv_usec);
}

/// How much of an exchange disappears behind the feed-forward of segments that are there already
/// (more than half as long again as the exchange): 1 - (both together - feed-forward alone) /
/// exchange alone.
void bench_overlap(Session& session, const BenchOptions& options, Exchange& exchange,
                   std::int64_t tokens) {
  constexpr std::int64_t kRows = 64;  // a piece of a fifth of a millisecond or so between polls
  const ModelConfig& model = options.config.model;
  BenchedExperts experts(session.stream(), ffn_shape(model, model.expert_ff_size),
                         dtype_from_name(options.config.train.dtype), 1, kRows);
  struct Way {
    const char* name;
    std::function<void(const std::function<void()>&)> run;
  };
  const std::vector<Way> ways = {
      {"dispatch", [&](const auto& beside) { exchange.dispatch_beside(beside); }},
      {"combine", [&](const auto& beside) { exchange.combine_beside(beside); }}};
  const auto nothing = [] {};
  for (const Way& way : ways) {
    const auto first = measure_in_turn(session, session.stream(), 5,
                                       {[&] { way.run(nothing); }, [&] { experts.forward(); }});
    const auto pieces = static_cast<std::int64_t>(
        std::ceil(1.7 * first[0].median() / std::max(1e-3, first[1].median())));
    const auto compute = [&] {
      for (std::int64_t i = 0; i < pieces; ++i) experts.forward();
    };
    double system = 0;
    const auto samples = measure_in_turn(session, session.stream(), options.repeats,
                                         {[&] { way.run(nothing); }, compute,
                                          [&] {
                                            const double before = system_seconds();
                                            way.run(compute);
                                            system += system_seconds() - before;
                                          }});
    const double mean_system = 1e3 * sum_over_ranks(session, system) /
                               static_cast<double>(session.comm().size() * (options.repeats + 2));
    if (!session.is_root()) continue;
    const double alone = samples[0].median();
    const double beside = samples[1].median();
    const double both = samples[2].median();
    fmt::print(
        "{:>6} {}: {:.2f} ms alone; feed-forward {:.2f} ms alone, {:.2f} with it: {:.0f} % hidden; "
        "{:.2f} ms of kernel time a rank\n",
        tokens, way.name, alone, beside, both, 100 * (1 - (both - beside) / alone), mean_system);
  }
}

void bench_tokens(Session& session, const BenchOptions& options, std::int64_t tokens,
                  const NodeMap& nodes, DispatchPath path, bool can_share) {
  Exchange flat(session, options, tokens, nodes, /*shared=*/false);
  std::optional<Exchange> shared;
  if (can_share && path != DispatchPath::flat)
    shared.emplace(session, options, tokens, nodes, true);
  std::vector<Line> lines;
  lines.push_back({"permute + MPI_Alltoallv + unpermute", [&] { flat.reference_dispatch(); }, 1});
  lines.push_back({"the same back and weighted sum", [&] { flat.reference_combine(); }, 1});
  lines.push_back({"both",
                   [&] {
                     flat.reference_dispatch();
                     flat.reference_combine();
                   },
                   2});
  lines.push_back({"MPI_Alltoallv alone", [&] { flat.library_dispatch(); }, 1});
  const std::size_t first_flat = lines.size();
  if (path != DispatchPath::shared || nodes.num_nodes() > 1) add_lines(lines, flat, true, -1);
  const std::size_t first_shared = lines.size();
  const int beside = first_shared > first_flat ? static_cast<int>(first_flat) : -1;
  if (shared) add_lines(lines, *shared, true, beside);
  std::vector<std::function<void()>> things;
  things.reserve(lines.size());
  for (const Line& line : lines) things.push_back(line.fn);
  const auto samples = measure_in_turn(session, session.stream(), options.repeats, things);
  const double ranks = session.comm().size();
  const double bytes = sum_over_ranks(session, flat.sent_bytes()) / ranks;
  const double remote = sum_over_ranks(session, flat.remote_bytes()) / ranks;
  for (std::size_t i = 0; i < lines.size() && session.is_root(); ++i) {
    if (i == 0) fmt::print("the library:\n");
    if (i == first_flat && first_shared > first_flat) fmt::print("one message per peer:\n");
    if (i == first_shared) {
      fmt::print("through shared memory{}:\n",
                 nodes.num_nodes() > 1 ? ", one message per (rank, node) between nodes" : "");
    }
    print_line(tokens, lines[i], samples, i, bytes, remote);
  }
  if (shared && nodes.num_nodes() > 1) print_node_bytes(session, flat, *shared);
  if (options.overlap) bench_overlap(session, options, shared ? *shared : flat, tokens);
}

}  // namespace

ExitCode bench_dispatch(Session& session, const BenchOptions& options) {
  session.together([&] {
    ARCUS_REQUIRE(MpiSession::launched(), ExitCode::usage,
                  "bench dispatch exchanges rows between MPI ranks: start it with mpirun -np 4");
  });
  const auto node = session.comm().split_by_node();
  const NodeMap nodes = map_nodes(session.comm(), *node);
  const bool can_share = session.comm().size() > 1 &&
                         sum_over_ranks(session, node->share_memory(4096) == nullptr ? 1 : 0) == 0;
  const DispatchPath path = dispatch_path_from_name(options.config.parallel.dispatch);
  session.together([&] {
    ARCUS_REQUIRE(
        path != DispatchPath::shared || can_share || session.comm().size() == 1, ExitCode::usage,
        "parallel.dispatch is \"shared\", but the ranks of a node cannot share memory; set "
        "it to \"auto\"");
  });
  if (session.is_root()) {
    fmt::print(
        "{} ranks on {} node{}, {} experts, {} per token, rows of {} x {}; median of {} of the "
        "slowest rank's times, taken in turn\nalgbw: bytes of all kept rows a rank sends / time, "
        "busbw: those that leave the rank; GB/s\n",
        session.comm().size(), nodes.num_nodes(), nodes.num_nodes() == 1 ? "" : "s",
        options.config.model.num_experts, options.config.model.topk,
        options.config.model.hidden_size, options.config.train.dtype, options.repeats);
    fmt::print("{:>6} {:<34} {:>9} {:>9} {:>9} {:>8} {:>8} {:>9} {:>8}\n", "tokens", "what", "ms",
               "least", "most", "algbw", "busbw", "x library", "x flat");
  }
  const std::int64_t full = options.config.train.micro_batch_seqs * options.config.train.seq_len;
  for (const std::int64_t tokens : {full / 8, full, full * 8}) {
    if (tokens > 0) bench_tokens(session, options, tokens, nodes, path, can_share);
  }
  return ExitCode::ok;
}

}  // namespace arcus
