#include <algorithm>
#include <vector>

#include "comm/combining.hpp"
#include "comm/token_dispatcher.hpp"
#include "kernels/permute.hpp"

namespace arcus {
namespace {

std::int64_t row_bytes_of(const DispatcherOptions& options) {
  return options.hidden_size * static_cast<std::int64_t>(size_of(options.dtype));
}
std::int64_t scalar_bytes_of(const DispatcherOptions& options) {
  return static_cast<std::int64_t>(size_of(accumulate_dtype(options.dtype)));
}
/// Bytes of the rows, and of the scalars, that one round sends at most.
std::int64_t row_buffer_bytes(const DispatcherOptions& options) {
  return max_send_rows(options) * row_bytes_of(options);
}
std::int64_t scalar_buffer_bytes(const DispatcherOptions& options) {
  return max_send_rows(options) * scalar_bytes_of(options);
}

class FlatDispatcher final : public TokenDispatcher {
 public:
  FlatDispatcher(Communicator& ep, const DispatcherOptions& options)
      : TokenDispatcher(ep, options),
        row_bytes_(row_bytes_of(options)),
        scalar_bytes_(scalar_bytes_of(options)),
        send_("dispatch", row_buffer_bytes(options)),
        slots_("combine", row_buffer_bytes(options)),
        scalars_("scalars", 3 * (scalar_buffer_bytes(options) + 128)),
        send_rows_(static_cast<char*>(send_.allocate_bytes(row_buffer_bytes(options)))),
        slot_rows_(static_cast<char*>(slots_.allocate_bytes(row_buffer_bytes(options)))),
        row_pointers_(static_cast<std::size_t>(options.max_tokens * options.slots_per_token)),
        send_counts_(static_cast<std::size_t>(ep.size())),
        recv_counts_(send_counts_.size()),
        combined_(*this) {
    for (char** part : {&send_scalars_, &recv_scalars_, &slot_scalars_}) {
      *part = static_cast<char*>(scalars_.allocate_bytes(scalar_buffer_bytes(options)));
    }
  }

  std::int64_t buffer_bytes() const override { return flat_dispatcher_bytes(options()); }

  Event dispatch(Stream& stream, const DispatchPlan& plan, ConstTensorView tokens,
                 ConstTensorView slot_scalars, TensorView rows, TensorView row_scalars) override {
    const Span span(stream, "dispatch");
    const bool scalars = slot_scalars.data != nullptr || row_scalars.data != nullptr;
    check_dispatch(plan, tokens, slot_scalars, rows, row_scalars);
    pack(stream, plan, tokens, slot_scalars, rows, row_scalars);
    clear_padding(stream, plan, rows);
    AllToAllV args = {send_rows_,   send_counts_,      plan.send_offsets, rows.data,
                      recv_counts_, plan.recv_offsets, row_bytes_};
    if (scalars) add_scalars(args, send_scalars_, row_scalars.data);
    exclude_own(plan.send_counts, plan.recv_counts);
    return comm().all_to_all_v(stream, args);
  }

  Event combine(Stream& stream, const DispatchPlan& plan, ConstTensorView rows,
                ConstTensorView row_scalars, SlotRows& slot_rows) override {
    const Span span(stream, "combine");
    comm().meet(stream);
    const bool scalars = row_scalars.data != nullptr;
    check_combine(plan, rows, row_scalars);
    point_at_rows(plan, static_cast<const char*>(rows.data));
    slot_rows.rows = std::span(row_pointers_).first(plan.row_of_slot.size());
    slot_rows.scalars = {};
    AllToAllV args = {rows.data,    recv_counts_,      plan.recv_offsets, slot_rows_,
                      send_counts_, plan.send_offsets, row_bytes_};
    exclude_own(plan.send_counts, plan.recv_counts);
    if (!scalars) return comm().all_to_all_v(stream, args);
    add_scalars(args, row_scalars.data, recv_scalars_);
    slot_rows.scalars = {slot_scalars_, accumulate_dtype(options().dtype), plan.num_tokens,
                         plan.slots_per_token};
    combined_.own_scalars = static_cast<const char*>(row_scalars.data);
    combined_.begin(comm().all_to_all_v(stream, args), plan);
    return Event(&combined_);
  }

 private:
  /// A combine with scalars: once they are here they go from send order to slot order.
  class Combined final : public Combining {
   public:
    explicit Combined(FlatDispatcher& owner) : owner_(owner) {}
    const char* own_scalars = nullptr;

   private:
    void place(const DispatchPlan& plan) override { owner_.place_scalars(plan, own_scalars); }
    FlatDispatcher& owner_;
  };

  /// Own rows are copied straight to their place, so they take no part in the exchange.
  void exclude_own(std::span<const std::int64_t> send, std::span<const std::int64_t> recv) {
    std::copy(send.begin(), send.end(), send_counts_.begin());
    std::copy(recv.begin(), recv.end(), recv_counts_.begin());
    send_counts_[me()] = recv_counts_[me()] = 0;
  }
  void add_scalars(AllToAllV& args, const void* send, void* recv) const {
    args.send_scalars = send;
    args.recv_scalars = recv;
    args.scalar_bytes = scalar_bytes_;
  }
  std::size_t me() { return static_cast<std::size_t>(comm().rank()); }

  /// The distance from an own row's place in send order to its place among received rows.
  struct OwnRows {
    std::int64_t begin, end, shift;
    bool contain(std::int64_t row) const { return row >= begin && row < end; }
  };
  OwnRows own_rows(const DispatchPlan& plan) {
    const std::int64_t begin = plan.send_offsets[me()];
    return {begin, begin + plan.send_counts[me()], plan.recv_offsets[me()] - begin};
  }

  void pack(Stream& stream, const DispatchPlan& plan, ConstTensorView tokens,
            ConstTensorView slot_scalars, TensorView rows, TensorView row_scalars) {
    const OwnRows own = own_rows(plan);
    // Rows begin..end in send order, each `shift` rows further on in its target.
    const auto gather = [&](std::int64_t begin, std::int64_t end, void* to, void* scalars_to,
                            std::int64_t shift) {
      const std::int64_t count = end - begin;
      if (count == 0) return;
      const ConstTensorView slots(plan.slot_of_row.data() + begin, DType::i32, 1, count);
      gather_rows(stream, {.y = {static_cast<char*>(to) + (begin + shift) * row_bytes_,
                                 options().dtype, count, options().hidden_size},
                           .x = tokens,
                           .index = slots,
                           .indices_per_row = plan.slots_per_token});
      if (slot_scalars.data == nullptr) return;
      gather_rows(stream, {.y = {static_cast<char*>(scalars_to) + (begin + shift) * scalar_bytes_,
                                 slot_scalars.dtype, count, 1},
                           .x = {slot_scalars.data, slot_scalars.dtype, slot_scalars.size(), 1},
                           .index = slots});
    };
    gather(0, own.begin, send_rows_, send_scalars_, 0);
    gather(own.begin, own.end, rows.data, row_scalars.data, own.shift);
    gather(own.end, plan.num_send_rows, send_rows_, send_scalars_, 0);
  }

  void point_at_rows(const DispatchPlan& plan, const char* rows) {
    const OwnRows own = own_rows(plan);
    for (std::size_t slot = 0; slot < plan.row_of_slot.size(); ++slot) {
      const std::int64_t row = plan.row_of_slot[slot];
      const bool stayed = own.contain(row);
      const char* base = stayed ? rows : slot_rows_;
      const std::int64_t place = stayed ? row + own.shift : row;
      row_pointers_[slot] = row < 0 ? nullptr : base + place * row_bytes_;
    }
  }

  void place_scalars(const DispatchPlan& plan, const char* own_scalars) {
    dispatch_accumulate(accumulate_dtype(options().dtype), [&]<class A>() {
      const OwnRows own = own_rows(plan);
      const auto* theirs = reinterpret_cast<const A*>(recv_scalars_);
      const auto* ours = reinterpret_cast<const A*>(own_scalars);
      auto* out = reinterpret_cast<A*>(slot_scalars_);
      for (std::size_t slot = 0; slot < plan.row_of_slot.size(); ++slot) {
        const std::int64_t row = plan.row_of_slot[slot];
        out[slot] = row < 0 ? A(0) : own.contain(row) ? ours[row + own.shift] : theirs[row];
      }
    });
  }

  std::int64_t row_bytes_;
  std::int64_t scalar_bytes_;
  Arena send_;     ///< packed rows, in send order
  Arena slots_;    ///< rows that come back, in send order
  Arena scalars_;  ///< the same two for scalars, and those in slot order
  char* send_rows_;
  char* slot_rows_;
  char* send_scalars_ = nullptr;
  char* recv_scalars_ = nullptr;
  char* slot_scalars_ = nullptr;
  std::vector<const void*> row_pointers_;
  std::vector<std::int64_t> send_counts_, recv_counts_;  ///< the plan's without own rows
  Combined combined_;
};

}  // namespace

std::int64_t flat_dispatcher_bytes(const DispatcherOptions& options) {
  return 2 * row_buffer_bytes(options) + 3 * scalar_buffer_bytes(options) +
         options.max_tokens * options.slots_per_token * static_cast<std::int64_t>(sizeof(void*));
}

std::unique_ptr<TokenDispatcher> make_flat_dispatcher(Communicator& ep,
                                                      const DispatcherOptions& options) {
  return std::make_unique<FlatDispatcher>(ep, options);
}

}  // namespace arcus
