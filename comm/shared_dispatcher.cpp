#include <sched.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "comm/combining.hpp"
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

/// What a rank shows the others beside its rows. All zero at first.
struct Board {
  Flag counts;    ///< plans whose counts stand in messages
  Flag ready;     ///< dispatches whose rows may be written
  Flag pushed;    ///< dispatches whose rows this rank has written everywhere
  Flag returned;  ///< combines whose rows may be read
  Flag pulled;    ///< combines whose rows this rank has read everywhere
  /// Byte offsets in the row memory, of the dispatch and of the combine under way; -1 = none.
  std::int64_t rows, row_scalars, back, back_scalars;

  /// Two sets of messages to all ranks stand behind it: one may be read while the next is written.
  std::int64_t* messages(std::uint64_t plan, std::int64_t words) {
    return reinterpret_cast<std::int64_t*>(this + 1) + static_cast<std::int64_t>(plan % 2) * words;
  }
};

/// Ranks of one node: a sender writes each row once, straight to its place among the receiver's
/// rows; on the way back the sum over choices reads rows where the experts left them. Ranks meet at
/// flags in shared memory: counts known, rows may be written, rows written, results may be read,
/// results read.
class SharedDispatcher final : public TokenDispatcher {
 public:
  SharedDispatcher(Communicator& ep, const DispatcherOptions& options,
                   std::unique_ptr<SharedMemory> boards)
      : TokenDispatcher(ep, options),
        row_bytes_(options.hidden_size * static_cast<std::int64_t>(size_of(options.dtype))),
        scalar_bytes_(static_cast<std::int64_t>(size_of(accumulate_dtype(options.dtype)))),
        boards_(std::move(boards)),
        row_pointers_(static_cast<std::size_t>(options.max_tokens * options.slots_per_token)),
        scalars_("slot scalars", std::ssize(row_pointers_) * scalar_bytes_),
        slot_scalars_(
            static_cast<char*>(scalars_.allocate_bytes(std::ssize(row_pointers_) * scalar_bytes_))),
        counted_(*this, &Board::counts),
        ready_(*this, &Board::ready),
        arrived_(*this, &Board::pushed),
        returned_(*this, &Board::returned),
        pulled_(*this, &Board::pulled),
        combined_(*this) {}

  /// Words of the messages of one plan.
  static std::int64_t message_words(const Communicator& ep, const DispatcherOptions& options) {
    return ep.size() * message_width(options, ep.size());
  }
  static std::int64_t board_bytes(const Communicator& ep, const DispatcherOptions& options) {
    return static_cast<std::int64_t>(sizeof(Board)) + 2 * 8 * message_words(ep, options);
  }

  Arena make_row_memory(std::int64_t bytes) override {
    ARCUS_CHECK(memory_ == nullptr, "a dispatcher's row memory is made once");
    memory_ = comm().share_memory(std::max<std::int64_t>(bytes, 4096));
    ARCUS_REQUIRE(memory_ != nullptr, ExitCode::comm,
                  "ranks of one node cannot share {} bytes of memory; set parallel.dispatch to "
                  "\"flat\"",
                  bytes);
    return {"received rows", memory_->part(comm().rank()), memory_->bytes()};
  }
  std::int64_t buffer_bytes() const override { return shared_dispatcher_bytes(options()); }

  Event dispatch(Stream& stream, const DispatchPlan& plan, ConstTensorView tokens,
                 ConstTensorView slot_scalars, TensorView rows, TensorView row_scalars) override {
    const Span span(stream, "dispatch");
    const bool scalars = slot_scalars.data != nullptr || row_scalars.data != nullptr;
    check_dispatch(plan, tokens, slot_scalars, rows, row_scalars);
    // Rows that others may still be reading from the last combine may lie where these will.
    stream.wait(pulled_.until(num_combines_));
    Board& mine = board(comm().rank());
    mine.rows = offset_of(rows.data);
    mine.row_scalars = scalars ? offset_of(row_scalars.data) : -1;
    raise(mine.ready, ++num_dispatches_);
    clear_padding(stream, plan, rows);
    // The own rows first: others may not be ready yet.
    for (int i = 0; i < comm().size(); ++i) {
      const int peer = (comm().rank() + i) % comm().size();
      if (plan.send_counts[index(peer)] == 0) continue;
      if (i > 0) stream.wait(ready_.until(num_dispatches_, peer));
      push(stream, plan, tokens, slot_scalars, peer);
    }
    raise(mine.pushed, num_dispatches_);
    return arrived_.until(num_dispatches_);
  }

  Event combine(Stream& stream, const DispatchPlan& plan, ConstTensorView rows,
                ConstTensorView row_scalars, SlotRows& slot_rows) override {
    const Span span(stream, "combine");
    comm().meet(stream);
    const bool scalars = row_scalars.data != nullptr;
    check_combine(plan, rows, row_scalars);
    // Nobody looks for the rows of the combine before any more.
    stream.wait(pulled_.until(num_combines_));
    Board& mine = board(comm().rank());
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
    combined_.begin(returned_.until(num_combines_), plan);
    return Event(&combined_);
  }

  void finish_combine() override { raise(board(comm().rank()).pulled, num_combines_); }

 protected:
  void exchange_messages(Stream& stream, std::span<const std::int64_t> sent,
                         std::span<std::int64_t> received, DispatchPlan& plan) override {
    const std::int64_t words = std::ssize(sent);
    const std::int64_t width = words / comm().size();
    Board& mine = board(comm().rank());
    std::copy(sent.begin(), sent.end(), mine.messages(++num_plans_, words));
    raise(mine.counts, num_plans_);
    stream.wait(counted_.until(num_plans_));
    std::ranges::fill(plan.push_offsets, 0);
    for (int peer = 0; peer < comm().size(); ++peer) {
      const std::int64_t* theirs = board(peer).messages(num_plans_, words);
      std::copy_n(theirs + comm().rank() * width, width, received.begin() + peer * width);
      // What ranks before this one send to `to` lies before this rank's rows there.
      for (int to = 0; to < comm().size() && peer < comm().rank(); ++to) {
        plan.push_offsets[index(to)] += rows_of_message(theirs + to * width);
      }
    }
  }

 private:
  /// Waits until a flag of one rank, or of all, has come to a count.
  class Waiting final : public Pending {
   public:
    Waiting(SharedDispatcher& owner, Flag Board::*flag) : owner_(owner), flag_(flag) {}
    Event until(std::uint64_t count, int only = -1) {
      count_ = count;
      only_ = only;
      return Event(this);
    }
    bool test() override {
      if (only_ >= 0) return reached(only_);
      for (int rank = 0; rank < owner_.comm().size(); ++rank) {
        if (!reached(rank)) return false;
      }
      return true;
    }
    void wait() override {
      for (int turn = 1; !test(); ++turn) {
        for (int spin = 0; spin < kSpins; ++spin) {
          pause_briefly();
          if (test()) return;
        }
        sched_yield();
        if (turn % kTurnsBetweenChecks == 0) owner_.comm().check_peers();
      }
    }

   private:
    bool reached(int rank) {
      return (owner_.board(rank).*flag_).count.load(std::memory_order_acquire) >= count_;
    }
    SharedDispatcher& owner_;
    Flag Board::*flag_;
    std::uint64_t count_ = 0;
    int only_ = -1;
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

  static std::size_t index(int rank) { return static_cast<std::size_t>(rank); }
  static void raise(Flag& flag, std::uint64_t count) {
    flag.count.store(count, std::memory_order_release);
  }
  Board& board(int rank) { return *reinterpret_cast<Board*>(boards_->part(rank)); }

  /// Where a buffer lies in this rank's row memory.
  std::int64_t offset_of(const void* data) {
    if (data == nullptr) return -1;
    ARCUS_CHECK(memory_ != nullptr, "rows are exchanged before make_row_memory");
    const auto offset = static_cast<const char*>(data) - memory_->part(comm().rank());
    ARCUS_CHECK(offset >= 0 && offset < memory_->bytes(),
                "rows that are exchanged must lie in the dispatcher's row memory");
    return offset;
  }

  /// Rows of this rank's tokens for `peer`, and their scalars, to their place there.
  void push(Stream& stream, const DispatchPlan& plan, ConstTensorView tokens,
            ConstTensorView slot_scalars, int peer) {
    const std::int64_t count = plan.send_counts[index(peer)];
    const std::int64_t first = plan.push_offsets[index(peer)];
    const Board& theirs = board(peer);
    const ConstTensorView slots(plan.slot_of_row.data() + plan.send_offsets[index(peer)],
                                DType::i32, 1, count);
    char* base = memory_->part(peer);
    gather_rows(stream, {.y = {base + theirs.rows + first * row_bytes_, options().dtype, count,
                               options().hidden_size},
                         .x = tokens,
                         .index = slots,
                         .indices_per_row = plan.slots_per_token});
    if (peer != comm().rank()) {
      comm().count_sent(count * (row_bytes_ + (slot_scalars.data == nullptr ? 0 : scalar_bytes_)));
    }
    if (slot_scalars.data == nullptr) return;
    gather_rows(stream, {.y = {base + theirs.row_scalars + first * scalar_bytes_,
                               slot_scalars.dtype, count, 1},
                         .x = {slot_scalars.data, slot_scalars.dtype, slot_scalars.size(), 1},
                         .index = slots});
  }

  void point_at_rows(const DispatchPlan& plan, bool scalars) {
    const auto ranks = index(comm().size());
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
        const Board& theirs = board(static_cast<int>(owner));
        const char* base = memory_->part(static_cast<int>(owner));
        const std::int64_t place = plan.push_offsets[owner] + row - plan.send_offsets[owner];
        row_pointers_[slot] = base + theirs.back + place * row_bytes_;
        if (scalars) {
          slot_scalars[slot] = reinterpret_cast<const A*>(base + theirs.back_scalars)[place];
        }
      }
    });
    for (int peer = 0; peer < comm().size(); ++peer) {
      if (peer == comm().rank()) continue;
      comm().count_sent(plan.recv_counts[index(peer)] *
                        (row_bytes_ + (scalars ? scalar_bytes_ : 0)));
    }
  }

  std::int64_t row_bytes_;
  std::int64_t scalar_bytes_;
  std::unique_ptr<SharedMemory> boards_;
  std::unique_ptr<SharedMemory> memory_;  ///< rows and their scalars
  std::vector<const void*> row_pointers_;
  Arena scalars_;
  char* slot_scalars_;
  std::uint64_t num_plans_ = 0, num_dispatches_ = 0, num_combines_ = 0;
  Waiting counted_, ready_, arrived_, returned_, pulled_;
  Combined combined_;
};

}  // namespace

std::int64_t shared_dispatcher_bytes(const DispatcherOptions& options) {
  const auto scalar = static_cast<std::int64_t>(size_of(accumulate_dtype(options.dtype)));
  return options.max_tokens * options.slots_per_token *
         (scalar + static_cast<std::int64_t>(sizeof(void*)));
}

std::unique_ptr<TokenDispatcher> make_shared_dispatcher(Communicator& ep,
                                                        const DispatcherOptions& options) {
  auto boards = ep.share_memory(SharedDispatcher::board_bytes(ep, options));
  if (boards == nullptr) return nullptr;
  return std::make_unique<SharedDispatcher>(ep, options, std::move(boards));
}

}  // namespace arcus
