#include <sched.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <utility>
#include <vector>

#include "comm/combining.hpp"
#include "comm/rails.hpp"
#include "comm/token_dispatcher.hpp"
#include "kernels/permute.hpp"
#include "kernels/profile.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace arcus {
namespace {

void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

/// Looks again some hundred times, then lets others run: ranks may share cores.
constexpr int kSpins = 200;
/// Turns of waiting between looks at whether the other ranks still live.
constexpr int kTurnsBetweenChecks = 64;

/// A counter of one rank that others wait for, on a cache line of its own.
struct alignas(64) Flag {
  std::atomic<std::uint64_t> count;
};
static_assert(std::atomic<std::uint64_t>::is_always_lock_free);

/// What a rank shows the others of its node beside its rows. All zero at first.
struct Board {
  Flag counts;    ///< plans whose counts stand in messages
  Flag ready;     ///< dispatches whose rows may be written
  Flag pushed;    ///< dispatches whose rows this rank has written everywhere
  Flag returned;  ///< combines whose rows may be read
  Flag pulled;    ///< combines whose rows this rank has read everywhere
  /// Byte offsets in the row memory, of the dispatch and of the combine under way; -1 = none.
  std::int64_t rows, row_scalars, back, back_scalars;

  /// Two sets of messages stand behind it: one may be read while the next is written.
  std::int64_t* messages(std::uint64_t plan, std::int64_t words) {
    return reinterpret_cast<std::int64_t*>(this + 1) + static_cast<std::int64_t>(plan % 2) * words;
  }
};

/// Inside a node a sender writes each row once, straight to its place among the receiver's rows; on
/// the way back the sum over choices reads rows where the experts left them. Ranks of a node meet
/// at flags in shared memory: counts known, rows may be written, rows written, results may be read,
/// results read. What comes from other nodes (Rails) is put in its place by the rank that takes it,
/// as if it were its own; results for other nodes are fetched in the same way.
class SharedDispatcher final : public TokenDispatcher {
 public:
  SharedDispatcher(Communicator& ep, const DispatcherOptions& options, const NodeMap& nodes,
                   std::unique_ptr<Communicator> node, std::unique_ptr<SharedMemory> boards)
      : TokenDispatcher(ep, options),
        nodes_(nodes),
        ranks_(nodes_.mine()),
        place_(index(nodes_.place_of[index(ep.rank())])),
        row_bytes_(options.hidden_size * static_cast<std::int64_t>(size_of(options.dtype))),
        scalar_bytes_(static_cast<std::int64_t>(size_of(accumulate_dtype(options.dtype)))),
        width_(message_width(options, ep.size())),
        node_(std::move(node)),
        boards_(std::move(boards)),
        row_pointers_(static_cast<std::size_t>(options.max_tokens * options.slots_per_token)),
        scalars_("slot scalars", std::ssize(row_pointers_) * scalar_bytes_),
        slot_scalars_(
            static_cast<char*>(scalars_.allocate_bytes(std::ssize(row_pointers_) * scalar_bytes_))),
        owner_rows_(index(ep.size())),
        owner_scalars_(owner_rows_.size()),
        counted_(*this, &Board::counts),
        ready_(*this, &Board::ready),
        pushed_(*this, &Board::pushed),
        returned_(*this, &Board::returned),
        pulled_(*this, &Board::pulled),
        arrival_(*this),
        way_back_(*this),
        combined_(*this) {
    if (nodes_.num_nodes() > 1) rails_.emplace(ep, nodes_, options, width_);
    for (std::size_t peer = 0; peer < ranks_.size(); ++peer) {
      relayed_.push_back(nodes_.relayed_by(ranks_[peer]));
    }
  }

  static std::int64_t board_bytes(const NodeMap& nodes, const DispatcherOptions& options) {
    const std::int64_t width = message_width(options, nodes.num_ranks());
    const auto sources = std::ssize(nodes.relayed_by(nodes.rank));
    const std::int64_t words =
        nodes.num_ranks() * width + sources * Rails::relayed_words(nodes, width);
    return static_cast<std::int64_t>(sizeof(Board)) + 2 * 8 * words;
  }

  Arena make_row_memory(std::int64_t bytes) override {
    ARCUS_CHECK(memory_ == nullptr, "a dispatcher's row memory is made once");
    memory_ = node_->share_memory(std::max<std::int64_t>(bytes, 4096));
    ARCUS_REQUIRE(memory_ != nullptr, ExitCode::comm,
                  "ranks of one node cannot share {} bytes of memory; set parallel.dispatch to "
                  "\"flat\"",
                  bytes);
    return {"received rows", memory_->part(static_cast<int>(place_)), memory_->bytes()};
  }
  static std::int64_t buffer_bytes(const NodeMap& nodes, const DispatcherOptions& options) {
    const std::int64_t scalar = static_cast<std::int64_t>(size_of(accumulate_dtype(options.dtype)));
    return options.max_tokens * options.slots_per_token * (scalar + std::int64_t{sizeof(void*)}) +
           (nodes.num_nodes() > 1 ? Rails::buffer_bytes(nodes, options) : 0);
  }
  std::int64_t buffer_bytes() const override { return buffer_bytes(nodes_, options()); }

  Event dispatch(Stream& stream, const DispatchPlan& plan, ConstTensorView tokens,
                 ConstTensorView slot_scalars, TensorView rows, TensorView row_scalars) override {
    const Span span(stream, "dispatch");
    const bool scalars = slot_scalars.data != nullptr || row_scalars.data != nullptr;
    check_dispatch(plan, tokens, slot_scalars, rows, row_scalars);
    // Rows that others may still be reading from the last combine may lie where these will.
    stream.wait(pulled_.until(num_combines_));
    Board& mine = board(place_);
    mine.rows = offset_of(rows.data);
    mine.row_scalars = scalars ? offset_of(row_scalars.data) : -1;
    raise(mine.ready, ++num_dispatches_);
    // What travels longest first.
    const Event incoming =
        rails_ ? rails_->send_tokens(stream, plan, tokens, slot_scalars, scalars) : Event();
    clear_padding(stream, plan, rows);
    // The own rows first: others may not be ready yet.
    for (std::size_t i = 0; i < ranks_.size(); ++i) {
      const std::size_t peer = (place_ + i) % ranks_.size();
      if (plan.send_counts[index(ranks_[peer])] == 0) continue;
      if (i > 0) stream.wait(ready_.until(num_dispatches_, static_cast<int>(peer), incoming));
      push(stream, plan, tokens, slot_scalars, peer);
    }
    if (!rails_) {
      raise(mine.pushed, num_dispatches_);
      return pushed_.until(num_dispatches_);
    }
    arrival_.begin(stream, incoming, plan);
    return Event(&arrival_);
  }

  Event combine(Stream& stream, const DispatchPlan& plan, ConstTensorView rows,
                ConstTensorView row_scalars, SlotRows& slot_rows) override {
    const Span span(stream, "combine");
    comm().meet(stream);
    const bool scalars = row_scalars.data != nullptr;
    check_combine(plan, rows, row_scalars);
    // Nobody looks for the rows of the combine before any more.
    stream.wait(pulled_.until(num_combines_));
    Board& mine = board(place_);
    mine.back = offset_of(rows.data);
    mine.back_scalars = scalars ? offset_of(row_scalars.data) : -1;
    raise(mine.returned, ++num_combines_);
    slot_rows.rows = std::span(row_pointers_).first(plan.row_of_slot.size());
    slot_rows.scalars = {};
    if (scalars) {
      slot_rows.scalars = {slot_scalars_, accumulate_dtype(options().dtype), plan.num_tokens,
                           plan.slots_per_token};
    }
    combined_.scalars = scalars;
    way_back_.begin(stream, plan, scalars);
    combined_.begin(rails_ ? Event(&way_back_) : returned_.until(num_combines_), plan);
    return Event(&combined_);
  }

  void finish_combine() override { raise(board(place_).pulled, num_combines_); }

 protected:
  void add_plan_storage(Arena& arena, DispatchPlan& plan) const override {
    const std::int64_t pairs = std::ssize(ranks_) * nodes_.num_ranks();
    plan.node_counts = arena.allocate_array<std::int64_t>(pairs);
    plan.node_offsets = arena.allocate_array<std::int64_t>(pairs);
    if (rails_) rails_->add_plan_storage(arena, plan);
  }

  void exchange_messages(Stream& stream, std::span<const std::int64_t> sent,
                         std::span<std::int64_t> received, DispatchPlan& plan) override {
    const std::int64_t words = std::ssize(sent);
    std::int64_t* mine = messages(place_, ++num_plans_);
    std::copy(sent.begin(), sent.end(), mine);
    if (rails_) rails_->exchange_counts(stream, sent, mine + words, plan);
    raise(board(place_).counts, num_plans_);
    stream.wait(counted_.until(num_plans_));
    for (int source = 0; source < comm().size(); ++source) {
      std::copy_n(message(source, place_), width_, received.begin() + source * width_);
    }
    const auto ranks = index(comm().size());
    for (std::size_t peer = 0; peer < ranks_.size(); ++peer) {
      std::int64_t end = 0;
      for (std::size_t source = 0; source < ranks; ++source) {
        const std::int64_t rows = rows_of_message(message(static_cast<int>(source), peer));
        plan.node_counts[peer * ranks + source] = rows;
        plan.node_offsets[peer * ranks + source] = end;
        end += rows;
      }
    }
  }

 private:
  /// Waits until a flag of one rank of the node, or of all, has come to a count.
  class Waiting final : public Pending {
   public:
    Waiting(SharedDispatcher& owner, Flag Board::*flag) : owner_(owner), flag_(flag) {}
    /// `moving`: an exchange that goes on only when it is looked at.
    Event until(std::uint64_t count, int only = -1, Event moving = Event()) {
      count_ = count;
      only_ = only;
      moving_ = moving;
      return Event(this);
    }
    bool test() override {
      if (only_ >= 0) return reached(only_);
      for (std::size_t peer = 0; peer < owner_.ranks_.size(); ++peer) {
        if (!reached(static_cast<int>(peer))) return false;
      }
      return true;
    }
    void wait() override {
      for (int turn = 1; !test(); ++turn) {
        for (int spin = 0; spin < kSpins; ++spin) {
          pause_briefly();
          if (test()) return;
        }
        moving_.test();
        sched_yield();
        if (turn % kTurnsBetweenChecks == 0) owner_.comm().check_peers();
      }
    }

   private:
    bool reached(int peer) {
      return (owner_.board(index(peer)).*flag_).count.load(std::memory_order_acquire) >= count_;
    }
    SharedDispatcher& owner_;
    Flag Board::*flag_;
    std::uint64_t count_ = 0;
    int only_ = -1;
    Event moving_;
  };

  /// A dispatch with rails: what has come is put in its place, then all have to say so.
  class Arrival final : public Pending {
   public:
    explicit Arrival(SharedDispatcher& owner) : owner_(owner) {}
    void begin(Stream& stream, Event incoming, const DispatchPlan& plan) {
      stream_ = &stream;
      incoming_ = incoming;
      plan_ = &plan;
    }
    bool test() override {
      if (plan_ != nullptr) {
        if (!incoming_.test() || !owner_.ready_.until(owner_.num_dispatches_).test()) return false;
        place();
      }
      return owner_.pushed_.until(owner_.num_dispatches_).test();
    }
    void wait() override {
      if (plan_ != nullptr) {
        incoming_.wait();
        owner_.ready_.until(owner_.num_dispatches_).wait();
        place();
      }
      owner_.pushed_.until(owner_.num_dispatches_).wait();
    }

   private:
    void place() {
      // Its ops poll what is pending, which is this: not placed twice.
      const DispatchPlan& plan = *std::exchange(plan_, nullptr);
      incoming_ = Event();
      owner_.place_relayed(*stream_, plan);
      raise(owner_.board(owner_.place_).pushed, owner_.num_dispatches_);
    }
    SharedDispatcher& owner_;
    Stream* stream_ = nullptr;
    Event incoming_;
    const DispatchPlan* plan_ = nullptr;
  };

  /// A combine with rails: results of the node's ranks leave when all are there.
  class WayBack final : public Pending {
   public:
    explicit WayBack(SharedDispatcher& owner) : owner_(owner) {}
    void begin(Stream& stream, const DispatchPlan& plan, bool scalars) {
      stream_ = &stream;
      plan_ = &plan;
      scalars_ = scalars;
    }
    bool test() override {
      if (plan_ != nullptr) {
        if (!owner_.returned_.until(owner_.num_combines_).test()) return false;
        send();
      }
      return incoming_.test();
    }
    void wait() override {
      if (plan_ != nullptr) {
        owner_.returned_.until(owner_.num_combines_).wait();
        send();
      }
      incoming_.wait();
    }

   private:
    void send() {
      incoming_ = owner_.return_by_rail(*stream_, *std::exchange(plan_, nullptr), scalars_);
    }
    SharedDispatcher& owner_;
    Stream* stream_ = nullptr;
    Event incoming_;
    const DispatchPlan* plan_ = nullptr;
    bool scalars_ = false;
  };

  /// A combine: once all results are there, slots point at them.
  class Combined final : public Combining {
   public:
    explicit Combined(SharedDispatcher& owner) : owner_(owner) {}
    bool scalars = false;

   private:
    void place(const DispatchPlan& plan) override { owner_.point_at_rows(plan, scalars); }
    SharedDispatcher& owner_;
  };

  static std::size_t index(std::int64_t rank) { return static_cast<std::size_t>(rank); }
  static void raise(Flag& flag, std::uint64_t count) {
    flag.count.store(count, std::memory_order_release);
  }
  /// Of the rank at a place of this node.
  Board& board(std::size_t peer) {
    return *reinterpret_cast<Board*>(boards_->part(static_cast<int>(peer)));
  }
  char* memory(std::size_t peer) const { return memory_->part(static_cast<int>(peer)); }

  /// What the rank at `peer` knows of a plan: its messages to all ranks, then those it relays.
  std::int64_t* messages(std::size_t peer, std::uint64_t plan) {
    const std::int64_t words =
        comm().size() * width_ + std::ssize(relayed_[peer]) * Rails::relayed_words(nodes_, width_);
    return board(peer).messages(plan, words);
  }
  /// The counts message of any rank to the one at `peer` of this node.
  const std::int64_t* message(int source, std::size_t peer) {
    if (nodes_.node_of[index(source)] == nodes_.node()) {
      const std::size_t from = index(nodes_.place_of[index(source)]);
      return messages(from, num_plans_) + ranks_[peer] * width_;
    }
    const std::size_t relay = index(nodes_.place_of[index(nodes_.relay(source, nodes_.node()))]);
    const auto& sources = relayed_[relay];
    const auto i = std::find(sources.begin(), sources.end(), source) - sources.begin();
    return messages(relay, num_plans_) + comm().size() * width_ +
           i * Rails::relayed_words(nodes_, width_) + 1 + static_cast<std::int64_t>(peer) * width_;
  }

  /// Where a buffer lies in this rank's row memory.
  std::int64_t offset_of(const void* data) {
    if (data == nullptr) return -1;
    ARCUS_CHECK(memory_ != nullptr, "rows are exchanged before make_row_memory");
    const auto offset = static_cast<const char*>(data) - memory(place_);
    ARCUS_CHECK(offset >= 0 && offset < memory_->bytes(),
                "rows that are exchanged must lie in the dispatcher's row memory");
    return offset;
  }

  /// Where rows of `source` begin in the memory of the rank at `peer`, and their scalars.
  char* rows_at(const DispatchPlan& plan, std::size_t peer, int source) {
    return memory(peer) + board(peer).rows + first_row(plan, peer, source) * row_bytes_;
  }
  char* row_scalars_at(const DispatchPlan& plan, std::size_t peer, int source) {
    return memory(peer) + board(peer).row_scalars + first_row(plan, peer, source) * scalar_bytes_;
  }
  std::int64_t first_row(const DispatchPlan& plan, std::size_t peer, int source) const {
    return plan.node_offsets[peer * index(nodes_.num_ranks()) + index(source)];
  }

  /// Rows of this rank's tokens for the rank at `peer`, and their scalars, to their place there.
  void push(Stream& stream, const DispatchPlan& plan, ConstTensorView tokens,
            ConstTensorView slot_scalars, std::size_t peer) {
    const std::size_t rank = index(ranks_[peer]);
    const std::int64_t count = plan.send_counts[rank];
    const ConstTensorView slots(plan.slot_of_row.data() + plan.send_offsets[rank], DType::i32, 1,
                                count);
    gather_rows(stream, {.y = {rows_at(plan, peer, comm().rank()), options().dtype, count,
                               options().hidden_size},
                         .x = tokens,
                         .index = slots,
                         .indices_per_row = plan.slots_per_token});
    if (peer != place_) {
      comm().count_sent(count * (row_bytes_ + (slot_scalars.data == nullptr ? 0 : scalar_bytes_)));
    }
    if (slot_scalars.data == nullptr) return;
    gather_rows(stream,
                {.y = {row_scalars_at(plan, peer, comm().rank()), slot_scalars.dtype, count, 1},
                 .x = {slot_scalars.data, slot_scalars.dtype, slot_scalars.size(), 1},
                 .index = slots});
  }

  void place_relayed(Stream& stream, const DispatchPlan& plan) {
    for (std::size_t i = 0; i < rails_->sources().size(); ++i) {
      const int source = rails_->sources()[i];
      for (std::size_t peer = 0; peer < ranks_.size(); ++peer) {
        rails_->place_tokens(stream, plan, i, peer, rows_at(plan, peer, source),
                             row_scalars_at(plan, peer, source));
      }
    }
  }
  Event return_by_rail(Stream& stream, const DispatchPlan& plan, bool scalars) {
    return rails_->return_rows(
        stream, plan, [&](std::size_t peer) { return memory(peer) + board(peer).back; },
        [&](std::size_t peer) { return memory(peer) + board(peer).back_scalars; }, scalars);
  }

  /// Where every owner's results for this rank begin.
  void find_owners(const DispatchPlan& plan, bool scalars) {
    for (int owner = 0; owner < comm().size(); ++owner) {
      const std::size_t o = index(owner);
      if (plan.send_counts[o] == 0) continue;
      if (nodes_.node_of[o] != nodes_.node()) {
        owner_rows_[o] = rails_->returned_rows(plan, owner);
        owner_scalars_[o] = scalars ? rails_->returned_scalars(plan, owner) : nullptr;
        continue;
      }
      const std::size_t peer = index(nodes_.place_of[o]);
      const std::int64_t first = first_row(plan, peer, comm().rank());
      owner_rows_[o] = memory(peer) + board(peer).back + first * row_bytes_;
      owner_scalars_[o] = memory(peer) + board(peer).back_scalars + first * scalar_bytes_;
    }
  }

  void point_at_rows(const DispatchPlan& plan, bool scalars) {
    const auto ranks = index(comm().size());
    find_owners(plan, scalars);
    dispatch_accumulate(accumulate_dtype(options().dtype), [&]<class A>() {
      auto* slot_scalars = reinterpret_cast<A*>(slot_scalars_);
      for (std::size_t slot = 0; slot < plan.row_of_slot.size(); ++slot) {
        const std::int64_t row = plan.row_of_slot[slot];
        row_pointers_[slot] = nullptr;
        if (scalars) slot_scalars[slot] = A(0);
        if (row < 0) continue;
        // Send order is by owner.
        std::size_t owner = 0;
        while (owner + 1 < ranks && row >= plan.send_offsets[owner] + plan.send_counts[owner]) {
          ++owner;
        }
        const std::int64_t place = row - plan.send_offsets[owner];
        row_pointers_[slot] = owner_rows_[owner] + place * row_bytes_;
        if (scalars) slot_scalars[slot] = reinterpret_cast<const A*>(owner_scalars_[owner])[place];
      }
    });
    for (const int peer : ranks_) {
      if (peer == comm().rank()) continue;
      comm().count_sent(plan.recv_counts[index(peer)] *
                        (row_bytes_ + (scalars ? scalar_bytes_ : 0)));
    }
  }

  NodeMap nodes_;
  const std::vector<int>& ranks_;          ///< of this node
  std::size_t place_;                      ///< of this rank among them
  std::vector<std::vector<int>> relayed_;  ///< sources that each of them relays
  std::int64_t row_bytes_;
  std::int64_t scalar_bytes_;
  std::int64_t width_;  ///< words of a counts message
  std::unique_ptr<Communicator> node_;
  std::unique_ptr<SharedMemory> boards_;
  std::unique_ptr<SharedMemory> memory_;  ///< rows and their scalars
  std::optional<Rails> rails_;            ///< where there are several nodes
  std::vector<const void*> row_pointers_;
  Arena scalars_;
  char* slot_scalars_;
  std::vector<const char*> owner_rows_, owner_scalars_;  ///< [P]
  std::uint64_t num_plans_ = 0, num_dispatches_ = 0, num_combines_ = 0;
  Waiting counted_, ready_, pushed_, returned_, pulled_;
  Arrival arrival_;
  WayBack way_back_;
  Combined combined_;
};

}  // namespace

std::int64_t shared_dispatcher_bytes(const DispatcherOptions& options, int num_ranks,
                                     int ranks_per_node) {
  std::vector<std::int64_t> names(static_cast<std::size_t>(num_ranks));
  for (int rank = 0; rank < num_ranks; ++rank) {
    names[static_cast<std::size_t>(rank)] = rank / ranks_per_node;
  }
  return SharedDispatcher::buffer_bytes(number_nodes(0, names), options);
}

std::unique_ptr<TokenDispatcher> make_shared_dispatcher(Communicator& ep,
                                                        const DispatcherOptions& options) {
  auto node = ep.split_by_node();
  const NodeMap nodes = map_nodes(ep, *node);
  auto boards = node->share_memory(SharedDispatcher::board_bytes(nodes, options));
  // On all nodes or on none.
  std::int32_t everywhere = boards != nullptr ? 1 : 0;
  Stream stream(1);
  stream.wait(ep.all_reduce(stream, {{&everywhere, DType::i32, 1, 1}, ReduceOp::min}));
  if (everywhere == 0) return nullptr;
  return std::make_unique<SharedDispatcher>(ep, options, nodes, std::move(node), std::move(boards));
}

}  // namespace arcus
