#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <numeric>
#include <vector>

#include "comm/communicator.hpp"
#include "src/base/rng.hpp"

/// What every communicator must do, whatever carries the bytes. Payloads are small integers that
/// encode (rank, index), so that results are compared with ==.
namespace arcus::laws {

using Counts = std::vector<std::int64_t>;

inline std::int64_t code(int from, int to, std::int64_t index) {
  return (static_cast<std::int64_t>(from) * 64 + to) * 1000003 + index;
}

inline Counts prefix_sum(const Counts& counts, std::int64_t gap = 0) {
  Counts offsets(counts.size());
  std::int64_t sum = 0;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    offsets[i] = sum;
    sum += counts[i] + gap;
  }
  return offsets;
}

/// Rows from rank to rank, seeded, with zeros and skew; `scale` 0: nothing at all.
inline std::int64_t rows_between(int seed, int from, int to, std::int64_t scale) {
  if (scale == 0) return 0;
  const Rng rng(static_cast<std::uint64_t>(seed));
  const auto u = rng.uniform(static_cast<std::uint64_t>(from), static_cast<std::uint64_t>(to));
  if (u < 0.3F) return 0;
  return static_cast<std::int64_t>(u * u * static_cast<float>(scale));
}

/// One all_to_all_v of rows of `width` i64 with an i32 beside each; gaps between the parts.
inline void exchange(Communicator& comm, int seed, std::int64_t scale, std::int64_t width) {
  Stream stream(1);
  const int me = comm.rank();
  const auto size = static_cast<std::size_t>(comm.size());
  Counts send_counts(size), recv_counts(size);
  for (int r = 0; r < comm.size(); ++r) {
    send_counts[static_cast<std::size_t>(r)] = rows_between(seed, me, r, scale);
    recv_counts[static_cast<std::size_t>(r)] = rows_between(seed, r, me, scale);
  }
  const Counts send_offsets = prefix_sum(send_counts, 1), recv_offsets = prefix_sum(recv_counts, 2);
  const auto end = [](const Counts& counts, const Counts& offsets) {
    return static_cast<std::size_t>(counts.back() + offsets.back());
  };
  const auto w = static_cast<std::size_t>(width);
  std::vector<std::int64_t> send(end(send_counts, send_offsets) * w, -1);
  std::vector<std::int64_t> recv((end(recv_counts, recv_offsets) + 2) * w, -7);
  std::vector<std::int32_t> send_side(send.size() / w, -1), recv_side(recv.size() / w, -7);
  for (std::size_t r = 0; r < size; ++r) {
    for (std::int64_t i = 0; i < send_counts[r]; ++i) {
      const auto row = static_cast<std::size_t>(send_offsets[r] + i);
      for (std::size_t j = 0; j < w; ++j) {
        send[row * w + j] = code(me, static_cast<int>(r), i * width + static_cast<int>(j));
      }
      send_side[row] = static_cast<std::int32_t>(me * 100000 + i);
    }
  }
  stream.wait(
      comm.all_to_all_v(stream, {send.data(), send_counts, send_offsets, recv.data(), recv_counts,
                                 recv_offsets, width * 8, send_side.data(), recv_side.data(), 4}));
  std::int64_t wrong = 0;
  std::vector<bool> written(recv.size(), false);
  for (std::size_t r = 0; r < size; ++r) {
    for (std::int64_t i = 0; i < recv_counts[r]; ++i) {
      const auto row = static_cast<std::size_t>(recv_offsets[r] + i);
      for (std::size_t j = 0; j < w; ++j) {
        const auto expected = code(static_cast<int>(r), me, i * width + static_cast<int>(j));
        wrong += recv[row * w + j] != expected;
        written[row * w + j] = true;
      }
      wrong += recv_side[row] != static_cast<std::int32_t>(static_cast<int>(r) * 100000 + i);
    }
  }
  for (std::size_t i = 0; i < recv.size(); ++i) wrong += !written[i] && recv[i] != -7;
  EXPECT_EQ(wrong, 0) << "seed " << seed << " scale " << scale << " width " << width;
}

template <class T>
void reduce_all(Communicator& comm, std::int64_t n) {
  Stream stream(1);
  for (const ReduceOp op : {ReduceOp::sum, ReduceOp::max, ReduceOp::min}) {
    std::vector<T> buffer(static_cast<std::size_t>(n));
    for (std::size_t i = 0; i < buffer.size(); ++i) {
      buffer[i] = static_cast<T>((static_cast<std::size_t>(comm.rank()) + 1) * (1 + i % 7));
    }
    stream.wait(comm.all_reduce(stream, {TensorView(buffer.data(), dtype_of<T>(), 1, n), op}));
    const auto ranks = static_cast<std::size_t>(comm.size());
    const std::size_t factor = op == ReduceOp::sum   ? ranks * (ranks + 1) / 2
                               : op == ReduceOp::max ? ranks
                                                     : 1;
    std::int64_t wrong = 0;
    for (std::size_t i = 0; i < buffer.size(); ++i) {
      wrong += buffer[i] != static_cast<T>(factor * (1 + i % 7));
    }
    EXPECT_EQ(wrong, 0) << name_of(dtype_of<T>()) << " x " << n;
  }
}

/// Parts of uneven sizes, some empty.
inline Counts parts(int size, std::int64_t scale, int seed) {
  Counts counts(static_cast<std::size_t>(size));
  for (int r = 0; r < size; ++r) {
    counts[static_cast<std::size_t>(r)] = rows_between(seed, r, 63, scale);
  }
  return counts;
}

template <class T>
void gather_all(Communicator& comm, std::int64_t scale, int seed) {
  Stream stream(1);
  const Counts counts = parts(comm.size(), scale, seed), offsets = prefix_sum(counts, 3);
  std::vector<T> buffer(static_cast<std::size_t>(offsets.back() + counts.back() + 3), T(9));
  const auto me = static_cast<std::size_t>(comm.rank());
  for (std::int64_t i = 0; i < counts[me]; ++i) {
    buffer[static_cast<std::size_t>(offsets[me] + i)] = static_cast<T>(comm.rank() * 30 + i % 29);
  }
  stream.wait(comm.all_gather_v(stream, {TensorView(buffer.data(), dtype_of<T>(), 1,
                                                    static_cast<std::int64_t>(buffer.size())),
                                         counts, offsets}));
  std::int64_t wrong = 0;
  for (std::size_t r = 0; r < counts.size(); ++r) {
    for (std::int64_t i = 0; i < counts[r]; ++i) {
      wrong += buffer[static_cast<std::size_t>(offsets[r] + i)] !=
               static_cast<T>(static_cast<std::int64_t>(r) * 30 + i % 29);
    }
    for (std::int64_t i = 0; i < 3; ++i) {
      wrong += buffer[static_cast<std::size_t>(offsets[r] + counts[r] + i)] != T(9);
    }
  }
  EXPECT_EQ(wrong, 0) << name_of(dtype_of<T>()) << " scale " << scale;
}

template <class T>
void reduce_parts(Communicator& comm, std::int64_t scale, int seed) {
  Stream stream(1);
  const Counts counts = parts(comm.size(), scale, seed), offsets = prefix_sum(counts, 2);
  const std::int64_t n = offsets.back() + counts.back();
  std::vector<T> buffer(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < buffer.size(); ++i) {
    buffer[i] = static_cast<T>(static_cast<std::int64_t>(i % 1001) * (comm.rank() + 1) - 500);
  }
  stream.wait(comm.reduce_scatter_v(
      stream, {TensorView(buffer.data(), dtype_of<T>(), 1, n), counts, offsets}));
  const std::int64_t ranks = comm.size(), weight = ranks * (ranks + 1) / 2;
  const auto me = static_cast<std::size_t>(comm.rank());
  std::int64_t wrong = 0;
  for (std::int64_t i = offsets[me]; i < offsets[me] + counts[me]; ++i) {
    wrong += buffer[static_cast<std::size_t>(i)] != static_cast<T>(i % 1001 * weight - 500 * ranks);
  }
  EXPECT_EQ(wrong, 0) << name_of(dtype_of<T>()) << " scale " << scale;
}

inline void broadcast_all(Communicator& comm, std::int64_t n) {
  Stream stream(1);
  for (int root = 0; root < comm.size(); ++root) {
    std::vector<std::int32_t> buffer(static_cast<std::size_t>(n), -1);
    if (comm.rank() == root) std::iota(buffer.begin(), buffer.end(), root * 10);
    stream.wait(comm.broadcast(stream, {TensorView(buffer.data(), DType::i32, 1, n), root}));
    std::int64_t wrong = 0;
    for (std::size_t i = 0; i < buffer.size(); ++i) {
      wrong += buffer[i] != root * 10 + static_cast<std::int32_t>(i);
    }
    EXPECT_EQ(wrong, 0) << "root " << root << ", " << n << " elements";
  }
}

/// Odd and even ranks, the even ones in reverse order; each part then works as a communicator.
inline void split_and_use(Communicator& comm) {
  Stream stream(1);
  const int color = comm.rank() % 2, key = color == 0 ? -comm.rank() : comm.rank();
  const auto part = comm.split(color, key);
  const int members = (comm.size() + 1 - color) / 2;
  EXPECT_EQ(part->size(), members);
  const int position = comm.rank() / 2;
  EXPECT_EQ(part->rank(), color == 0 ? members - 1 - position : position);
  exchange(*part, 5, 20, 3);
  reduce_all<std::int64_t>(*part, 10);
  const auto single = part->split(part->rank(), 0);
  EXPECT_EQ(single->size(), 1);
  reduce_all<std::int64_t>(*single, 3);
}

inline void texts(Communicator& comm) {
  Stream stream(1);
  const std::string mine(static_cast<std::size_t>(comm.rank()) * 3,
                         static_cast<char>('a' + comm.rank()));
  const auto all = gather_texts(comm, stream, mine);
  EXPECT_EQ(all.size(), static_cast<std::size_t>(comm.size()));
  for (std::size_t r = 0; r < all.size(); ++r) {
    EXPECT_EQ(all[r], std::string(r * 3, static_cast<char>('a' + r)));
  }
  const int root = comm.size() - 1;
  EXPECT_EQ(broadcast_text(comm, stream, comm.rank() == root ? "from the last" : "", root),
            "from the last");
}

inline void errors_agreed(Communicator& comm) {
  Stream stream(1);
  EXPECT_NO_THROW(agree_on_errors(comm, stream, [] {}));
  const int failing = comm.size() / 2;
  try {
    agree_on_errors(comm, stream, [&] {
      ARCUS_REQUIRE(comm.rank() < failing, ExitCode::data, "bad file {}", comm.rank());
    });
    ADD_FAILURE() << "no error on rank " << comm.rank();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ExitCode::data);
    EXPECT_EQ(std::string(error.what()),
              comm.size() == 1 ? "bad file 0" : fmt::format("rank {0}: bad file {0}", failing));
    // A defect is to be looked for where it was found, not where the ranks agreed on it.
    EXPECT_NE(error.file().find("collective_laws.hpp"), std::string::npos) << error.file();
    EXPECT_GT(error.line(), 0);
  }
}

/// `call` must be refused with a message that contains `text`.
template <class Call>
void expect_error(const std::string& text, Call&& call) {
  try {
    call();
    ADD_FAILURE() << "no error; expected: " << text;
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
  }
}

/// Arguments that every rank gets wrong in the same way: refused before any byte moves.
inline void refusals(Communicator& comm) {
  Stream stream(1);
  const auto size = static_cast<std::size_t>(comm.size());
  std::vector<double> numbers(size + 1);
  const auto n = static_cast<std::int64_t>(numbers.size());
  const TensorView floats(numbers.data(), DType::f64, 1, n);
  const TensorView halves(numbers.data(), DType::bf16, 1, n);
  const TensorView ints(numbers.data(), DType::i64, 1, n);
  const Counts ones(size, 1), indices = prefix_sum(ones), few(size + 1, 1);
  Counts negative = ones, far = indices, same(size, 0);
  negative.back() = -1;
  far.back() = n;
  expect_error("reproducible", [&] { comm.all_reduce(stream, {floats}); });
  expect_error("reproducible", [&] { comm.all_reduce(stream, {floats, ReduceOp::max}); });
  expect_error("reproducible", [&] { comm.reduce_scatter_v(stream, {floats, ones, indices}); });
  expect_error("bf16", [&] { comm.all_reduce(stream, {halves}); });
  expect_error("ranks", [&] { comm.all_gather_v(stream, {ints, few, indices}); });
  expect_error("-1", [&] { comm.all_gather_v(stream, {ints, negative, indices}); });
  expect_error("behind the buffer", [&] { comm.all_gather_v(stream, {ints, ones, far}); });
  expect_error("padded",
               [&] { comm.all_reduce(stream, {TensorView(numbers.data(), DType::i64, 2, 1, 2)}); });
  expect_error("null", [&] { comm.broadcast(stream, {TensorView(nullptr, DType::i64, 1, 2)}); });
  expect_error("root", [&] { comm.broadcast(stream, {ints, comm.size()}); });
  std::vector<std::int64_t> send(size), recv(size);
  const auto exchange_of = [&](const Counts& counts, const Counts& offsets, std::int64_t* to) {
    comm.all_to_all_v(stream, {send.data(), counts, indices, to, counts, offsets, 8});
  };
  expect_error("overlap", [&] { exchange_of(ones, indices, send.data()); });
  expect_error("null", [&] { exchange_of(ones, indices, nullptr); });
  expect_error("-1", [&] { exchange_of(negative, indices, recv.data()); });
  if (size > 1) expect_error("overlap", [&] { exchange_of(ones, same, recv.data()); });
  expect_error("rows of 0", [&] {
    comm.all_to_all_v(stream, {send.data(), ones, indices, recv.data(), ones, indices, 0});
  });
  Counts self = ones;
  self[static_cast<std::size_t>(comm.rank())] = 0;
  expect_error("sends itself", [&] {
    comm.all_to_all_v(stream, {send.data(), self, indices, recv.data(), ones, indices, 8});
  });
}

/// In checked mode ranks that make different calls get an error on all of them, not a hang.
inline void mismatches(Communicator& comm) {
  if (comm.size() < 2) return;
  Stream stream(1);
  const bool odd = comm.rank() == 1;
  std::vector<std::int64_t> numbers(8 + static_cast<std::size_t>(comm.size()));
  const auto view = [&](std::int64_t n) { return TensorView(numbers.data(), DType::i64, 1, n); };
  expect_error("rank 1: barrier", [&] {
    if (odd) {
      comm.barrier(stream);
    } else {
      comm.all_reduce(stream, {view(4)});
    }
  });
  expect_error("rank 1: all_reduce(5 i64, sum)",
               [&] { comm.all_reduce(stream, {view(odd ? 5 : 4)}); });
  expect_error("rank 1: all_reduce(4 i64, max)", [&] {
    comm.all_reduce(stream, {view(4), odd ? ReduceOp::max : ReduceOp::sum});
  });
  expect_error("rank 1: broadcast(4 i64, root 1)", [&] {
    comm.broadcast(stream, {view(4), odd ? 1 : 0});
  });
  Counts counts(static_cast<std::size_t>(comm.size()), 1);
  const Counts offsets = prefix_sum(counts, 1);
  counts[0] = odd ? 0 : 1;
  expect_error("all_gather_v", [&] {
    comm.all_gather_v(stream, {view(2 * comm.size()), counts, offsets});
  });
  expect_error(odd ? "negative" : "rank 1 passed wrong arguments",
               [&] { comm.split(odd ? -1 : 0, 0); });
  // Rank 1 sends rank 0 one row; rank 0 expects two.
  std::vector<std::int64_t> send(numbers.size()), recv(numbers.size());
  Counts send_counts(counts.size(), 0), recv_counts(counts.size(), 0);
  if (odd) send_counts[0] = 1;
  if (comm.rank() == 0) recv_counts[1] = 2;
  expect_error(comm.rank() == 0 ? "rank 1 sends 1 rows to rank 0, which expects 2"
                                : "rank 0 expects other counts",
               [&] {
                 comm.all_to_all_v(stream, {send.data(), send_counts, offsets, recv.data(),
                                            recv_counts, prefix_sum(recv_counts), 8});
               });
  exchange(comm, 1, 10, 2);  // and the communicator still works
}

inline void bytes_counted(Communicator& comm) {
  Stream stream(1);
  const std::int64_t ranks = comm.size();
  const Counts ones(static_cast<std::size_t>(ranks), 1), indices = prefix_sum(ones);
  std::vector<std::int64_t> a(ones.size()), b(ones.size());
  std::int64_t before = comm.sent_bytes();
  stream.wait(comm.all_to_all_v(stream, {a.data(), ones, indices, b.data(), ones, indices, 8}));
  EXPECT_EQ(comm.sent_bytes() - before, 8 * (ranks - 1));
  before = comm.sent_bytes();
  stream.wait(
      comm.all_gather_v(stream, {TensorView(a.data(), DType::i64, 1, ranks), ones, indices}));
  EXPECT_EQ(comm.sent_bytes() - before, 8 * (ranks - 1));
}

/// Everything above that an unchecked or checked reproducible communicator must do.
inline void conform(Communicator& comm) {
  for (int seed = 0; seed < 10; ++seed) {
    exchange(comm, seed, 40, 1 + seed % 3);
    gather_all<std::uint8_t>(comm, 40, seed);
    gather_all<float>(comm, 40, seed);
    reduce_parts<std::int64_t>(comm, 60, seed);
    reduce_parts<std::int32_t>(comm, 60, seed);
  }
  exchange(comm, 0, 0, 4);
  exchange(comm, 3, 20000, 16);
  gather_all<std::int64_t>(comm, 0, 0);
  gather_all<std::int64_t>(comm, 200000, 2);
  reduce_parts<std::int64_t>(comm, 0, 0);
  reduce_parts<std::int64_t>(comm, 300000, 3);
  for (const std::int64_t n : {0, 1, 5, 1000, 100001}) {
    reduce_all<std::int64_t>(comm, n);
    reduce_all<std::int32_t>(comm, n);
    reduce_all<std::uint64_t>(comm, n);
    broadcast_all(comm, n);
  }
  reduce_all<std::uint8_t>(comm, 17);
  reduce_all<std::uint16_t>(comm, 17);
  reduce_all<std::uint32_t>(comm, 17);
  split_and_use(comm);
  texts(comm);
  errors_agreed(comm);
  bytes_counted(comm);
  Stream stream(1);
  comm.barrier(stream);
}

/// Floating-point sums, allowed where the run is not reproducible. Small integers: any order.
inline void conform_floats(Communicator& comm) {
  reduce_all<float>(comm, 1000);
  reduce_all<double>(comm, 1000);
  reduce_parts<float>(comm, 60, 1);
  reduce_parts<double>(comm, 60, 1);
}

}  // namespace arcus::laws
