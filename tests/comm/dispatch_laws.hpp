#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <tuple>
#include <vector>

#include "comm/token_dispatcher.hpp"
#include "src/base/rng.hpp"

/// What every dispatcher must do, on any communicator. All ranks derive every rank's routing from
/// the seed, so each knows what it must receive. Payloads are small integers: equality is ==.
namespace arcus::laws {

enum class Skew { uniform, skewed, one_expert, some_empty };

/// One seeded situation: configuration and, per (round, rank), a micro-batch and its routing.
struct Situation {
  DispatcherOptions options;
  int num_ranks = 1;
  int num_rounds = 2;
  Skew skew = Skew::uniform;
  double drop = 0;
  bool some_idle = false;
  std::uint64_t key = 0;

  static Situation draw(int seed, int num_ranks) {
    const Rng rng(hash_of(seed));
    int call = 0;
    const auto pick = [&](std::int64_t n) {
      const auto u = static_cast<double>(rng.uniform(0, static_cast<std::uint64_t>(call++)));
      return static_cast<std::int64_t>(u * static_cast<double>(n));
    };
    Situation s;
    s.num_ranks = num_ranks;
    s.key = hash_of(seed);
    const std::int64_t experts[] = {8, 8, 5, 3, 16, 1};
    s.options.num_experts = experts[pick(6)];
    s.skew = static_cast<Skew>(pick(4));
    const std::int64_t most = std::min<std::int64_t>(s.options.num_experts, 4);
    s.options.slots_per_token = pick(5) == 0 ? s.options.num_experts : 1 + pick(most);
    if (s.skew == Skew::one_expert) s.options.slots_per_token = 1;
    const std::int64_t tokens[] = {1, 7, 33, 64};
    s.options.max_tokens = tokens[pick(4)];
    s.options.hidden_size = 4 + pick(9);
    const DType dtypes[] = {DType::f32, DType::f64, DType::bf16};
    s.options.dtype = dtypes[pick(3)];
    s.drop = pick(2) == 0 ? 0 : 0.4;
    if (pick(3) == 0) s.options.capacity = 1 + pick(s.options.max_tokens);
    s.some_idle = pick(2) == 0;
    if (s.options.capacity > 0 && pick(2) == 0) s.options.padded_capacity = s.options.capacity;
    return s;
  }
  /// Rows that experts first..end get of a round with spare ones.
  std::int64_t padded_rows_of(int round, std::int64_t num_experts) const {
    std::int64_t rows = 0;
    for (int rank = 0; rank < num_ranks; ++rank) {
      if (num_tokens(round, rank) > 0) rows += num_experts * options.padded_capacity;
    }
    return rows;
  }

  /// Global micro-batch of `rank`, or -1; ranks do not hold them in ascending order.
  std::int64_t micro_batch(int round, int rank) const {
    const Rng rng(key);
    const auto u = rng.uniform(1, static_cast<std::uint64_t>(round * 64 + rank));
    if (some_idle && u < 0.3F) return -1;
    return round * num_ranks + (rank * 2 + round) % (num_ranks | 1);
  }
  /// May be 0 with a micro-batch as well.
  std::int64_t num_tokens(int round, int rank) const {
    if (micro_batch(round, rank) < 0) return 0;
    const Rng rng(key);
    const auto u = rng.uniform(2, static_cast<std::uint64_t>(round * 64 + rank));
    if (u < 0.4F) return options.max_tokens;
    return static_cast<std::int64_t>(u * static_cast<float>(options.max_tokens));
  }
  /// [T, K]
  std::vector<std::int32_t> expert_of_slot(int round, int rank) const {
    const std::int64_t tokens = num_tokens(round, rank), slots = options.slots_per_token;
    const std::int64_t num_experts = options.num_experts;
    std::vector<std::int32_t> result;
    std::vector<std::int64_t> load(static_cast<std::size_t>(num_experts));
    const Rng rng(key + static_cast<std::uint64_t>(round * 64 + rank + 1));
    for (std::int64_t t = 0; t < tokens; ++t) {
      // The slots of a token go to different experts: the ones with the largest random scores.
      std::vector<std::pair<float, std::int32_t>> scores;
      for (std::int64_t e = 0; e < num_experts; ++e) {
        const auto u = rng.uniform(static_cast<std::uint64_t>(t), static_cast<std::uint64_t>(e));
        float score = u;
        if (skew == Skew::skewed) score += e < 2 ? 1.0F : 0.0F;
        if (skew == Skew::one_expert) score = e == num_experts - 1 ? 2.0F : u;
        if (skew == Skew::some_empty && e % 2 == 0) score -= 1.0F;
        scores.emplace_back(-score, static_cast<std::int32_t>(e));
      }
      std::sort(scores.begin(), scores.end());
      for (std::int64_t k = 0; k < slots; ++k) {
        const auto expert = scores[static_cast<std::size_t>(k)].second;
        const auto u =
            rng.uniform(static_cast<std::uint64_t>(1000 + t), static_cast<std::uint64_t>(k));
        auto& rows = load[static_cast<std::size_t>(expert)];
        const bool full = options.capacity > 0 && rows == options.capacity;
        const bool kept = !full && static_cast<double>(u) >= drop;
        result.push_back(kept ? expert : -1);
        rows += kept ? 1 : 0;
      }
    }
    return result;
  }

 private:
  static std::uint64_t hash_of(int seed) {
    return Rng(static_cast<std::uint64_t>(seed), "test", "dispatch").key();
  }
};

/// Small integers in -8..8, and what names a (token, choice).
inline int noise(std::int64_t a, std::int64_t b, std::int64_t c) {
  const Rng rng(17);
  return static_cast<int>(
             rng.words(static_cast<std::uint64_t>(a * 4096 + b), static_cast<std::uint64_t>(c))[0] %
             17) -
         8;
}

/// A matrix of exactly representable integers with `spare` rows of rubbish behind it; in `memory`,
/// or in its own.
template <class T>
class Rows {
 public:
  Rows(std::int64_t rows, std::int64_t cols, std::int64_t spare = 0, std::int64_t extra_cols = 0,
       Arena* memory = nullptr)
      : rows_(rows), cols_(cols), stride_(cols + extra_cols) {
    const auto size = static_cast<std::size_t>((rows + spare) * stride_);
    if (memory == nullptr) own_.resize(size);
    data_ =
        memory == nullptr
            ? own_.data()
            : static_cast<T*>(memory->allocate_bytes(static_cast<std::int64_t>(size * sizeof(T))));
    if (size > 0) std::memset(static_cast<void*>(data_), 0xff, size * sizeof(T));
  }
  Rows(const Rows&) = delete;
  Rows& operator=(const Rows&) = delete;
  TensorView view() { return {data_, dtype_of<T>(), rows_, cols_, stride_}; }
  void set(std::int64_t i, std::int64_t j, std::int64_t value) {
    data_[index(i, j)] = T(static_cast<float>(value));
  }
  std::int64_t get(std::int64_t i, std::int64_t j) const { return to_int(&data_[index(i, j)]); }
  static std::int64_t to_int(const T* x) {
    const auto value = static_cast<double>(*x);
    return value == value ? static_cast<std::int64_t>(value) : std::int64_t{-999999};
  }

 private:
  std::size_t index(std::int64_t i, std::int64_t j) const {
    return static_cast<std::size_t>(i * stride_ + j);
  }
  std::int64_t rows_, cols_, stride_;
  std::vector<T> own_;
  T* data_ = nullptr;
};

/// One received row: where it must lie and what it is.
struct ExpectedRow {
  std::int64_t expert, micro_batch, token, choice;
  auto operator<=>(const ExpectedRow&) const = default;
};

/// In the order of segments and rows inside them.
inline std::vector<ExpectedRow> expected_rows(const Situation& s, int round, std::int64_t begin,
                                              std::int64_t end) {
  std::vector<ExpectedRow> rows;
  for (int rank = 0; rank < s.num_ranks; ++rank) {
    const auto experts = s.expert_of_slot(round, rank);
    for (std::size_t i = 0; i < experts.size(); ++i) {
      if (experts[i] < begin || experts[i] >= end) continue;
      const auto slot = static_cast<std::int64_t>(i);
      rows.push_back({experts[i], s.micro_batch(round, rank), slot / s.options.slots_per_token,
                      slot % s.options.slots_per_token});
    }
  }
  std::sort(rows.begin(), rows.end());
  return rows;
}

/// Segments cover the received rows exactly, sorted, padded to multiples of 32.
inline void check_segments(const DispatchPlan& plan, const TokenDispatcher& dispatcher) {
  std::int64_t rows = 0, padded = 0, wrong = 0;
  std::vector<int> covered(static_cast<std::size_t>(plan.num_recv_rows));
  for (std::size_t i = 0; i < plan.segments.size(); ++i) {
    const Segment& segment = plan.segments[i];
    wrong += segment.rows <= 0 || segment.padded_begin != padded;
    if (i > 0) {
      const Segment& before = plan.segments[i - 1];
      wrong += std::pair(before.local_expert_idx, before.micro_batch) >=
               std::pair(segment.local_expert_idx, segment.micro_batch);
    }
    rows += segment.rows;
    padded += padded_rows(segment.rows);
    for (std::int64_t r = 0; r < segment.rows; ++r) {
      ++covered[static_cast<std::size_t>(segment.row_begin + r)];
    }
  }
  wrong += std::count_if(covered.begin(), covered.end(), [](int n) { return n != 1; });
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(rows, plan.num_recv_rows);
  EXPECT_EQ(padded, plan.num_padded_rows);
  EXPECT_LE(plan.num_recv_rows, dispatcher.max_recv_rows());
  EXPECT_LE(plan.num_padded_rows, dispatcher.max_padded_rows());
}

/// Sum over all ranks.
inline std::int64_t total(Communicator& comm, Stream& stream, std::int64_t value) {
  stream.wait(comm.all_reduce(stream, {TensorView(&value, DType::i64, 1, 1)}));
  return value;
}

/// dispatch and combine of one round of a situation, with scalars, against the laws.
template <class T>
void check_round(Communicator& comm, Stream& stream, TokenDispatcher& dispatcher,
                 DispatchPlan& plan, Arena& memory, const Situation& s, int round) {
  using A = Acc<T>;
  const ArenaScope scope(memory);
  const std::int64_t hidden = s.options.hidden_size, slots = s.options.slots_per_token;
  const std::int64_t tokens = s.num_tokens(round, comm.rank());
  const std::int64_t micro_batch = s.micro_batch(round, comm.rank());
  auto experts = s.expert_of_slot(round, comm.rank());
  const bool padded = s.options.padded_capacity > 0;
  dispatcher.make_plan(stream, {experts.data(), DType::i32, tokens, slots}, micro_batch, {round, 3},
                       plan, s.options.padded_capacity);
  check_segments(plan, dispatcher);

  // Token rows name micro-batch and token; scalars name the slot.
  Rows<T> a(tokens, hidden, 0, s.key % 3 == 0 ? 5 : 0);
  Rows<A> weight(tokens, slots);
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t h = 0; h < hidden; ++h) {
      a.set(t, h, h == 0 ? micro_batch : h == 1 ? t : noise(micro_batch, t, h));
    }
    for (std::int64_t k = 0; k < slots; ++k) {
      weight.set(t, k, (micro_batch * 64 + t) * 32 + k);
    }
  }
  Rows<T> x(plan.num_recv_rows, hidden, kWgradRowPadding + 1, 0, &memory);
  Rows<A> row_weight(1, plan.num_recv_rows, 1, 1, &memory);
  stream.wait(dispatcher.dispatch(stream, plan, a.view(), weight.view(), x.view(),
                                  {row_weight.view().data, dtype_of<A>(), 1, plan.num_recv_rows}));

  // Conservation: every kept (token, choice) once, in its segment, in (token, choice) order.
  const auto begin = dispatcher.experts().begin(comm.rank());
  const auto expected = expected_rows(s, round, begin, dispatcher.experts().begin(comm.rank() + 1));
  EXPECT_EQ(plan.num_recv_rows,
            padded ? s.padded_rows_of(round, dispatcher.experts().count(comm.rank()))
                   : static_cast<std::int64_t>(expected.size()));
  Rows<T> b(plan.num_recv_rows, hidden, kWgradRowPadding, 0, &memory);
  Rows<A> db(1, plan.num_recv_rows, 1, 1, &memory);
  std::int64_t wrong = 0, left = 0;
  std::size_t next = 0;
  for (const Segment& segment : plan.segments) {
    wrong += padded && segment.rows != s.options.padded_capacity;
    for (std::int64_t i = 0; i < segment.rows; ++i) {
      const std::int64_t row = segment.row_begin + i;
      const bool spare = padded && (next == expected.size() ||
                                    expected[next].expert != segment.local_expert_idx + begin ||
                                    expected[next].micro_batch != segment.micro_batch);
      if (spare) {
        // They arrive empty, and what goes back from them is not read.
        wrong += row_weight.get(0, row) != 0;
        for (std::int64_t h = 0; h < hidden; ++h) wrong += x.get(row, h) != 0;
        continue;
      }
      if (next == expected.size()) break;
      const ExpectedRow& e = expected[next++];
      wrong += segment.local_expert_idx + begin != e.expert || segment.micro_batch != e.micro_batch;
      wrong += x.get(row, 0) != e.micro_batch || x.get(row, 1) != e.token;
      wrong += row_weight.get(0, row) != (e.micro_batch * 64 + e.token) * 32 + e.choice;
      db.set(0, row, (e.micro_batch * 64 + e.token) * 32 + e.choice + 1);
      for (std::int64_t h = 0; h < hidden; ++h) {
        if (h > 1) wrong += x.get(row, h) != noise(e.micro_batch, e.token, h);
        // b names the token and choice it must return to.
        const std::int64_t value = h == 0   ? e.micro_batch
                                   : h == 1 ? e.token
                                   : h == 2 ? e.choice
                                            : noise(e.token + 50, e.choice, e.expert * 16 + h);
        b.set(row, h, value);
        left += x.get(row, h) * value;
      }
    }
  }
  EXPECT_EQ(next, expected.size());
  for (std::int64_t i = 0; i < kWgradRowPadding * hidden; ++i) {
    wrong += x.get(plan.num_recv_rows, i) != 0;
  }
  wrong += x.get(plan.num_recv_rows + kWgradRowPadding, 0) != -999999;  // and no row further
  EXPECT_EQ(wrong, 0) << "rows on arrival";

  SlotRows back;
  const Event event = dispatcher.combine(
      stream, plan, b.view(), {db.view().data, dtype_of<A>(), 1, plan.num_recv_rows}, back);
  stream.wait(event);
  EXPECT_TRUE(event.test());
  EXPECT_EQ(back.rows.size(), static_cast<std::size_t>(tokens * slots));
  std::int64_t right = 0;
  wrong = 0;
  for (std::int64_t slot = 0; slot < tokens * slots; ++slot) {
    const std::int64_t t = slot / slots, k = slot % slots;
    const auto* row = static_cast<const T*>(back.rows[static_cast<std::size_t>(slot)]);
    const bool kept = experts[static_cast<std::size_t>(slot)] >= 0;
    const auto scalar = Rows<A>::to_int(static_cast<const A*>(back.scalars.data) + slot);
    wrong += scalar != (kept ? (micro_batch * 64 + t) * 32 + k + 1 : 0);
    wrong += (row != nullptr) != kept;
    if (row == nullptr) continue;
    wrong += Rows<T>::to_int(row) != micro_batch || Rows<T>::to_int(row + 1) != t ||
             Rows<T>::to_int(row + 2) != k;
    for (std::int64_t h = 0; h < hidden; ++h) right += a.get(t, h) * Rows<T>::to_int(row + h);
  }
  dispatcher.finish_combine();
  EXPECT_EQ(wrong, 0) << "rows on return";
  EXPECT_EQ(total(comm, stream, left), total(comm, stream, right)) << "dispatch and combine^T";
}

/// Rows alone, on the same plan: the scalars are optional.
template <class T>
void check_without_scalars(Stream& stream, TokenDispatcher& dispatcher, const DispatchPlan& plan,
                           Arena& memory) {
  const ArenaScope scope(memory);
  const std::int64_t hidden = dispatcher.options().hidden_size;
  Rows<T> a(plan.num_tokens, hidden);
  Rows<T> x(plan.num_recv_rows, hidden, kWgradRowPadding, 0, &memory);
  for (std::int64_t t = 0; t < plan.num_tokens; ++t) {
    for (std::int64_t h = 0; h < hidden; ++h) a.set(t, h, t + h);
  }
  stream.wait(dispatcher.dispatch(stream, plan, a.view(), {}, x.view(), {}));
  SlotRows back;
  stream.wait(dispatcher.combine(stream, plan, x.view(), {}, back));
  std::int64_t wrong = back.scalars.data != nullptr;
  for (std::size_t slot = 0; slot < back.rows.size(); ++slot) {
    if (back.rows[slot] == nullptr) continue;
    const auto token = static_cast<std::int64_t>(slot) / plan.slots_per_token;
    wrong += std::memcmp(back.rows[slot], static_cast<const T*>(a.view().data) + token * hidden,
                         static_cast<std::size_t>(hidden) * sizeof(T)) != 0;
  }
  dispatcher.finish_combine();
  EXPECT_EQ(wrong, 0) << "there and back";
}

inline void check_situation(Communicator& comm, int seed, DispatchPath path) {
  const Situation s = Situation::draw(seed, comm.size());
  Stream stream(1 + seed % 2);
  const auto dispatcher = make_dispatcher(comm, s.options, path);
  Arena memory = dispatcher->make_row_memory(std::int64_t{1} << 23);
  Arena arena("plan", std::int64_t{1} << 20);
  DispatchPlan plan = dispatcher->make_plan_storage(arena);
  dispatch_compute(s.options.dtype, [&]<class T>() {
    for (int round = 0; round < s.num_rounds; ++round) {
      check_round<T>(comm, stream, *dispatcher, plan, memory, s, round);
      check_without_scalars<T>(stream, *dispatcher, plan, memory);
    }
  });
}

inline void check_situations(Communicator& comm, int num_seeds,
                             DispatchPath path = DispatchPath::flat) {
  for (int seed = 0; seed < num_seeds; ++seed) {
    SCOPED_TRACE(fmt::format("seed {} rank {}", seed, comm.rank()));
    check_situation(comm, seed, path);
  }
}

}  // namespace arcus::laws
