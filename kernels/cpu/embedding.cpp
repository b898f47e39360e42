#include "kernels/embedding.hpp"

#include <algorithm>
#include <array>
#include <span>

#include "kernels/cpu/leaf.hpp"
#include "kernels/cpu/parallel.hpp"
#include "kernels/cpu/rows.hpp"

namespace arcus::cpu {
namespace {

constexpr std::int64_t kRowGrain = 16;
constexpr std::int64_t kVocabGrain = 32;
constexpr std::int64_t kColumnChunk = 512;  ///< columns whose sums stand on the stack

std::int32_t checked(std::int32_t id, std::int64_t vocab_size) {
  ARCUS_CHECK(id >= 0 && id < vocab_size, "token id {} of a vocabulary of {}", id, vocab_size);
  return id;
}

template <class T>
void add_position(T* out, const EmbeddingForward& args, std::int32_t position) {
  using A = Acc<T>;
  ARCUS_CHECK(position >= 0 && position < args.position_table.rows, "position {} of {}", position,
              args.position_table.rows);
  const T* row = args.position_table.row<T>(position);
#pragma omp simd
  for (std::int64_t i = 0; i < args.out.cols; ++i) {
    store(out[i], static_cast<A>(out[i]) + static_cast<A>(row[i]));
  }
}

/// Tokens sorted by id, equal ids in token order: those of `id` are
/// token[offset[id]..offset[id+1]).
struct TokensById {
  std::span<std::int32_t> offset;
  std::span<std::int32_t> token;
};

TokensById sort_by_id(const std::int32_t* ids, std::int64_t num_tokens, std::int64_t vocab_size,
                      std::span<std::int32_t> scratch) {
  ARCUS_CHECK(static_cast<std::int64_t>(scratch.size()) >= vocab_size + 1 + num_tokens,
              "embedding_backward: scratch of {} for a vocabulary of {} and {} tokens",
              scratch.size(), vocab_size, num_tokens);
  const auto vocab = static_cast<std::size_t>(vocab_size);
  const TokensById sorted{scratch.first(vocab + 1),
                          scratch.subspan(vocab + 1, static_cast<std::size_t>(num_tokens))};
  std::int32_t* offset = sorted.offset.data();
  std::fill(sorted.offset.begin(), sorted.offset.end(), 0);
  for (std::int64_t t = 0; t < num_tokens; ++t) ++offset[checked(ids[t], vocab_size)];
  for (std::int64_t id = 1; id <= vocab_size; ++id) offset[id] += offset[id - 1];
  // Each end walks down to its begin while the tokens are placed, the last one first.
  for (std::int64_t t = num_tokens - 1; t >= 0; --t) {
    sorted.token[static_cast<std::size_t>(--offset[ids[t]])] = static_cast<std::int32_t>(t);
  }
  return sorted;
}

/// One vocabulary row's leaf, added to its sum.
template <class T, class A = Acc<T>>
void add_row_leaf(const EmbeddingBackward& args, std::int64_t id,
                  std::span<const std::int32_t> tokens) {
  const std::int64_t cols = args.dout.cols;
  for (std::int64_t first = 0; first < cols; first += kColumnChunk) {
    const std::int64_t count = std::min(kColumnChunk, cols - first);
    std::array<A, kColumnChunk> leaf;
    std::fill_n(leaf.begin(), count, A(0));
    for (const std::int32_t t : tokens) {
      const T* dout = args.dout.row<T>(t) + first;
#pragma omp simd
      for (std::int64_t i = 0; i < count; ++i) leaf[i] += static_cast<A>(dout[i]);
    }
    add_leaf_rows(args.dtable.at(id * cols + first), cols, leaf.data(), count, 1, count,
                  args.micro_batch);
  }
}

}  // namespace

void embedding_forward(Stream& stream, const EmbeddingForward& args) {
  ARCUS_CHECK(args.out.cols == args.table.cols && args.out.dtype == args.table.dtype,
              "embedding: rows of {} {} from a table of {} {}", args.out.cols,
              name_of(args.out.dtype), args.table.cols, name_of(args.table.dtype));
  const bool positions = !args.position_table.empty();
  ARCUS_CHECK(!positions || (args.position_table.cols == args.out.cols &&
                             args.position_table.dtype == args.out.dtype &&
                             args.position.cols == args.out.rows),
              "embedding: {} rows of {} {} and {} positions of {} {}", args.out.rows, args.out.cols,
              name_of(args.out.dtype), args.position.cols, args.position_table.cols,
              name_of(args.position_table.dtype));
  const auto* ids = args.ids.as<std::int32_t>();
  const auto* position = positions ? args.position.as<std::int32_t>() : nullptr;
  dispatch_compute(args.out.dtype, [&]<class T>() {
    parallel_rows(stream, args.out.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) {
        const T* row = args.table.row<T>(checked(ids[t], args.table.rows));
        std::copy(row, row + args.out.cols, args.out.row<T>(t));
        if (positions) add_position(args.out.row<T>(t), args, position[t]);
      }
    });
  });
}

void embedding_backward(Stream& stream, const EmbeddingBackward& args) {
  if (args.dout.rows == 0) return;
  const TokensById sorted = sort_by_id(args.ids.as<std::int32_t>(), args.dout.rows, args.vocab_size,
                                       args.scratch.span<std::int32_t>());
  dispatch_compute(args.dout.dtype, [&]<class T>() {
    parallel_rows(stream, args.vocab_size, kVocabGrain,
                  [&](std::int64_t begin, std::int64_t end, int) {
                    for (std::int64_t id = begin; id < end; ++id) {
                      const auto at = static_cast<std::size_t>(id);
                      const auto first = static_cast<std::size_t>(sorted.offset[at]);
                      const auto last = static_cast<std::size_t>(sorted.offset[at + 1]);
                      if (first == last) continue;
                      add_row_leaf<T>(args, id, sorted.token.subspan(first, last - first));
                    }
                  });
  });
}

}  // namespace arcus::cpu
