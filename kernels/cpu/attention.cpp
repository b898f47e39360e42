#include "kernels/attention.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels/cpu/gemm_cache.hpp"
#include "kernels/cpu/math.hpp"
#include "kernels/cpu/parallel.hpp"
#include "kernels/cpu/rows.hpp"
#include "kernels/cpu/transpose.hpp"

namespace arcus::cpu {
namespace {

constexpr std::int64_t kBlockPositions = 64;  ///< part of the definition of the bits

/// Queries of positions begin..end of one (sequence, KV head): rows (s - begin) * G + g, against
/// keys 0..end.
struct Block {
  std::int64_t begin, end;
  std::int64_t rows;
  std::int64_t keys() const { return end; }
};
Block block_at(const AttentionShape& shape, std::int64_t begin) {
  const std::int64_t end = std::min(shape.seq_len, begin + kBlockPositions);
  return {begin, end, (end - begin) * shape.group()};
}
std::int64_t most_rows(const AttentionShape& shape) {
  return std::min(kBlockPositions, shape.seq_len) * shape.group();
}
/// The products of one block. All operands are dense and none of the first ones is transposed: for
/// others oneDNN falls back to a kernel that allocates.
class Products {
 public:
  Products(const AttentionShape& shape, DType compute)
      : compute_(compute), sum_(accumulate_dtype(compute)), dim_(shape.head_dim) {}

  /// q k^T, dout v^T
  GemmKey against_keys(const Block& b) const {
    GemmKey key = base(sum_);
    key.transpose_b = true;
    key.m = b.rows;
    key.n = key.ldc = b.keys();
    key.k = key.lda = key.ldb = dim_;
    return key;
  }
  /// P v
  GemmKey values(const Block& b) const { return over_keys(b, sum_); }
  /// dq = dS k
  GemmKey dq(const Block& b) const { return over_keys(b, compute_); }
  /// dv += P^T dout, dk += dS^T q, given the transposes of P and dS
  GemmKey dkey(const Block& b) const {
    GemmKey key = base(sum_);
    key.accumulate = true;
    key.m = b.keys();
    key.n = key.ldb = key.ldc = dim_;
    key.k = key.lda = b.rows;
    return key;
  }

 private:
  GemmKey base(DType result) const { return {.ab_dtype = compute_, .c_dtype = result}; }
  GemmKey over_keys(const Block& b, DType result) const {
    GemmKey key = base(result);
    key.m = b.rows;
    key.n = key.ldb = key.ldc = dim_;
    key.k = key.lda = b.keys();
    return key;
  }

  DType compute_, sum_;
  std::int64_t dim_;
};

/// Cuts arrays from one piece of scratch memory; with no memory it only adds up their sizes.
class Cutter {
 public:
  explicit Cutter(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(std::int64_t count) {
    char* at = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += (count * static_cast<std::int64_t>(sizeof(T)) + 127) / 128 * 128;
    return reinterpret_cast<T*>(at);
  }
  std::int64_t used() const { return used_; }

 private:
  char* memory_;
  std::int64_t used_ = 0;
};

/// What one thread needs for a block. `probs` holds P, then dS, as operands of products; it is
/// `scores` itself where these have the compute type.
template <class T, class A = Acc<T>>
struct ForwardScratch {
  ForwardScratch(const AttentionShape& shape, Cutter& cutter) {
    const std::int64_t rows = most_rows(shape);
    scores = cutter.take<A>(rows * shape.seq_len);
    if constexpr (std::is_same_v<T, A>) {
      probs = scores;
    } else {
      probs = cutter.take<T>(rows * shape.seq_len);
    }
    v = cutter.take<T>(shape.seq_len * shape.head_dim);
    out = cutter.take<A>(rows * shape.head_dim);
    inv_sum = cutter.take<A>(rows);
  }
  A* scores;
  T* probs;
  T* v;
  A* out;
  A* inv_sum;
};
template <class T, class A = Acc<T>>
struct BackwardScratch : ForwardScratch<T> {
  BackwardScratch(const AttentionShape& shape, Cutter& cutter) : ForwardScratch<T>(shape, cutter) {
    dprobs = cutter.take<A>(most_rows(shape) * shape.seq_len);
    transposed = cutter.take<T>(most_rows(shape) * shape.seq_len);
    dout = cutter.take<T>(most_rows(shape) * shape.head_dim);
    delta = cutter.take<A>(most_rows(shape));
    dk = cutter.take<A>(shape.seq_len * shape.head_dim);
    dv = cutter.take<A>(shape.seq_len * shape.head_dim);
  }
  A* dprobs;
  T* transposed;
  T* dout;
  A* delta;
  A* dk;
  A* dv;
};

template <class Scratch>
std::int64_t bytes_of(const AttentionShape& shape) {
  Cutter cutter(nullptr);
  Scratch scratch(shape, cutter);
  return cutter.used();
}
template <class Scratch>
Scratch scratch_of(Stream& stream, int thread, const AttentionShape& shape) {
  Cutter cutter(stream.cpu().scratch(thread, bytes_of<Scratch>(shape)));
  return Scratch(shape, cutter);
}

/// One (sequence, KV head): where its rows stand.
struct Problem {
  Problem(const AttentionShape& shape, std::int64_t number)
      : index(number), seq(number / shape.num_kv_heads), kv_head(number % shape.num_kv_heads) {}
  std::int64_t query_row(const AttentionShape& s) const { return index * s.seq_len * s.group(); }
  std::int64_t key_row(const AttentionShape& s) const { return index * s.seq_len; }
  std::int64_t token(const AttentionShape& s) const { return seq * s.seq_len; }
  /// First column of the query heads, and of the KV head, in rows of whole tokens.
  std::int64_t query_col(const AttentionShape& s) const { return kv_head * s.group() * s.head_dim; }
  std::int64_t key_col(const AttentionShape& s) const { return kv_head * s.head_dim; }

  std::int64_t index, seq, kv_head;
};

/// The keys that a query sees: begin..end.
struct Visible {
  std::int64_t begin, end;
  std::int64_t count() const { return end - begin; }
};
Visible visible_keys(const ConstTensorView& first_key, std::int64_t first_token, std::int64_t s) {
  const std::int64_t begin = first_key.as<std::int32_t>()[first_token + s];
  ARCUS_CHECK(begin >= 0 && begin <= s, "attention: position {} sees keys from {} on", s, begin);
  return {begin, s + 1};
}

/// probs = the visible part of `row` rounded to the operands' type, zeros elsewhere.
template <class T, class A = Acc<T>>
void store_probs(T* probs, const A* row, const Visible& visible, std::int64_t keys) {
  std::fill(probs, probs + visible.begin, T{});
  if constexpr (!std::is_same_v<T, A>) {
#pragma omp simd
    for (std::int64_t i = visible.begin; i < visible.end; ++i) store(probs[i], row[i]);
  }
  std::fill(probs + visible.end, probs + keys, T{});
}

template <class A>
A score_scale(const AttentionShape& shape) {
  return A(1) / std::sqrt(static_cast<A>(shape.head_dim));
}

/// fn(r, visible keys) for each row of the block.
template <class Args, class Fn>
void for_each_row(const Args& args, const Problem& problem, const Block& block, Fn&& fn) {
  for (std::int64_t r = 0; r < block.rows; ++r) {
    const std::int64_t s = block.begin + r / args.shape.group();
    fn(r, visible_keys(args.first_key, problem.token(args.shape), s));
  }
}

/// P of the block, as operands: fn(row of scores, visible keys, r, row of lse) makes a row's scores
/// its probabilities, forward by a softmax and backward again from the log-sum-exp.
template <class T, class Args, class Fn>
void probs_block(const Args& args, const Problem& problem, const Block& block,
                 const ForwardScratch<T>& scratch, Fn&& fn) {
  const std::int64_t stride = block.keys();
  const std::int64_t first_row = problem.query_row(args.shape) + block.begin * args.shape.group();
  for_each_row(args, problem, block, [&](std::int64_t r, const Visible& visible) {
    Acc<T>* row = scratch.scores + r * stride;
    fn(row, visible, r, args.lse.template row<Acc<T>>(first_row + r));
    store_probs<T>(scratch.probs + r * stride, row, visible, block.keys());
  });
}

/// Where row r of a block stands in rows of whole tokens.
struct Place {
  Place(const AttentionShape& shape, const Problem& problem, const Block& block, std::int64_t r)
      : token(problem.token(shape) + block.begin + r / shape.group()),
        col(problem.query_col(shape) + r % shape.group() * shape.head_dim) {}
  std::int64_t token, col;
};

/// The problem's values side by side.
template <class T, class Args>
void gather_v(const Args& args, const Problem& problem, T* v) {
  const std::int64_t dim = args.shape.head_dim;
  for (std::int64_t s = 0; s < args.shape.seq_len; ++s) {
    const T* row =
        args.v.template row<T>(problem.token(args.shape) + s) + problem.key_col(args.shape);
    std::copy(row, row + dim, v + s * dim);
  }
}

// ---- forward ---------------------------------------------------------------------------------

/// row = exp(scale * row - maximum) over the visible keys; returns its sum, gives the log-sum-exp.
template <class A>
A softmax_row(A* row, const Visible& visible, A scale, A* lse) {
  A* x = row + visible.begin;
  const A max = scale * max_terms<A>(visible.count(), -std::numeric_limits<A>::infinity(),
                                     [=](std::int64_t i) { return x[i]; });
  const A sum = sum_terms<A>(visible.count(), [=](std::int64_t i) {
    const A p = exp(x[i] * scale - max);
    x[i] = p;
    return p;
  });
  *lse = max + std::log(sum);
  return sum;
}

template <class T, class A = Acc<T>>
void softmax_block(const AttentionForward& args, const Problem& problem, const Block& block,
                   const ForwardScratch<T>& scratch) {
  const A scale = score_scale<A>(args.shape);
  probs_block<T>(args, problem, block, scratch,
                 [&](A* row, const Visible& visible, std::int64_t r, A* lse) {
                   scratch.inv_sum[r] = A(1) / softmax_row(row, visible, scale, lse);
                 });
}

/// Rows of the block's result, divided by the sums, to the tokens they belong to.
template <class T, class A = Acc<T>>
void store_out(const AttentionForward& args, const Problem& problem, const Block& block,
               const ForwardScratch<T>& scratch) {
  const std::int64_t dim = args.shape.head_dim;
  for (std::int64_t r = 0; r < block.rows; ++r) {
    const Place place(args.shape, problem, block, r);
    T* out = args.out.row<T>(place.token) + place.col;
    const A* sum = scratch.out + r * dim;
    const A inv_sum = scratch.inv_sum[r];
#pragma omp simd
    for (std::int64_t i = 0; i < dim; ++i) store(out[i], sum[i] * inv_sum);
  }
}

template <class T>
void forward_problem(Stream& stream, int thread, const AttentionForward& args,
                     const Problem& problem) {
  const AttentionShape& shape = args.shape;
  const Products products(shape, dtype_of<T>());
  const auto scratch = scratch_of<ForwardScratch<T>>(stream, thread, shape);
  const T* q = args.q.row<T>(problem.query_row(shape));
  const T* k = args.k.row<T>(problem.key_row(shape));
  gather_v<T>(args, problem, scratch.v);
  for (std::int64_t begin = 0; begin < shape.seq_len; begin += kBlockPositions) {
    const Block block = block_at(shape, begin);
    const T* q_block = q + begin * shape.group() * shape.head_dim;
    run_gemm(stream.cpu(), thread, products.against_keys(block), q_block, k, scratch.scores);
    softmax_block<T>(args, problem, block, scratch);
    run_gemm(stream.cpu(), thread, products.values(block), scratch.probs, scratch.v, scratch.out);
    store_out<T>(args, problem, block, scratch);
  }
}

// ---- backward --------------------------------------------------------------------------------

/// dout of the block's rows side by side, and delta = <dout, out>.
template <class T, class A = Acc<T>>
void gather_dout(const AttentionBackward& args, const Problem& problem, const Block& block,
                 const BackwardScratch<T>& scratch) {
  const std::int64_t dim = args.shape.head_dim;
  for (std::int64_t r = 0; r < block.rows; ++r) {
    const Place place(args.shape, problem, block, r);
    const T* dout = args.dout.row<T>(place.token) + place.col;
    std::copy(dout, dout + dim, scratch.dout + r * dim);
    scratch.delta[r] = dot<A>(dout, args.out.row<T>(place.token) + place.col, dim);
  }
}

/// P again, from the scores and the log-sum-exp.
template <class T, class A = Acc<T>>
void recompute_probs(const AttentionBackward& args, const Problem& problem, const Block& block,
                     const BackwardScratch<T>& scratch) {
  const A scale = score_scale<A>(args.shape);
  probs_block<T>(args, problem, block, scratch,
                 [&](A* row, const Visible& visible, std::int64_t /*r*/, const A* lse_row) {
                   const A lse = *lse_row;
#pragma omp simd
                   for (std::int64_t i = visible.begin; i < visible.end; ++i) {
                     row[i] = exp(row[i] * scale - lse);
                   }
                 });
}

/// dS = P (dP - delta) scale, over P in `probs`; what is not visible is zero there already.
template <class T, class A = Acc<T>>
void dscores_block(const AttentionBackward& args, const Problem& problem, const Block& block,
                   const BackwardScratch<T>& scratch) {
  const std::int64_t stride = block.keys();
  const A scale = score_scale<A>(args.shape);
  for_each_row(args, problem, block, [&](std::int64_t r, const Visible& visible) {
    const A* p = scratch.scores + r * stride;
    const A* dp = scratch.dprobs + r * stride;
    T* ds = scratch.probs + r * stride;
    const A delta = scratch.delta[r];
#pragma omp simd
    for (std::int64_t i = visible.begin; i < visible.end; ++i) {
      store(ds[i], p[i] * (dp[i] - delta) * scale);
    }
  });
}

template <class T, class A = Acc<T>>
void round_row(T* out, const A* sum, std::int64_t count) {
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) store(out[i], sum[i]);
}

/// to [keys, rows] = transpose of the block's probs [rows, keys].
template <class T>
void transpose_probs(T* to, const T* probs, const Block& block) {
  using U = std::conditional_t<sizeof(T) == 2, std::uint16_t,
                               std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>>;
  transpose_padded(reinterpret_cast<U*>(to), block.rows, reinterpret_cast<const U*>(probs),
                   block.keys(), block.rows, block.keys());
}

template <class T>
void backward_problem(Stream& stream, int thread, const AttentionBackward& args,
                      const Problem& problem) {
  using A = Acc<T>;
  const AttentionShape& shape = args.shape;
  const std::int64_t dim = shape.head_dim;
  const Products products(shape, dtype_of<T>());
  const auto scratch = scratch_of<BackwardScratch<T>>(stream, thread, shape);
  std::fill_n(scratch.dk, shape.seq_len * dim, A(0));
  std::fill_n(scratch.dv, shape.seq_len * dim, A(0));
  const std::int64_t first_query = problem.query_row(shape);
  const T* k = args.k.row<T>(problem.key_row(shape));
  gather_v<T>(args, problem, scratch.v);
  for (std::int64_t begin = 0; begin < shape.seq_len; begin += kBlockPositions) {
    const Block block = block_at(shape, begin);
    const T* q = args.q.row<T>(first_query + begin * shape.group());
    T* dq = args.dq.row<T>(first_query + begin * shape.group());
    // sum += probs^T b
    const auto add_transposed = [&](const T* b, A* sum) {
      transpose_probs(scratch.transposed, scratch.probs, block);
      run_gemm(stream.cpu(), thread, products.dkey(block), scratch.transposed, b, sum);
    };
    gather_dout<T>(args, problem, block, scratch);
    run_gemm(stream.cpu(), thread, products.against_keys(block), q, k, scratch.scores);
    recompute_probs<T>(args, problem, block, scratch);
    add_transposed(scratch.dout, scratch.dv);
    run_gemm(stream.cpu(), thread, products.against_keys(block), scratch.dout, scratch.v,
             scratch.dprobs);
    dscores_block<T>(args, problem, block, scratch);
    add_transposed(q, scratch.dk);
    run_gemm(stream.cpu(), thread, products.dq(block), scratch.probs, k, dq);
  }
  for (std::int64_t s = 0; s < shape.seq_len; ++s) {
    round_row(args.dk.row<T>(problem.key_row(shape) + s), scratch.dk + s * dim, dim);
    round_row(args.dv.row<T>(problem.token(shape) + s) + problem.key_col(shape),
              scratch.dv + s * dim, dim);
  }
}

void check_layout(const AttentionShape& shape, const ConstTensorView& q, const ConstTensorView& k) {
  ARCUS_CHECK(shape.num_kv_heads > 0 && shape.num_heads % shape.num_kv_heads == 0,
              "attention: {} query heads do not divide over {} KV heads", shape.num_heads,
              shape.num_kv_heads);
  ARCUS_CHECK(q.contiguous() && k.contiguous() && q.cols == shape.head_dim,
              "attention: q and k must be contiguous rows of one head");
}

template <class T>
std::int64_t scratch_bytes(const AttentionShape& shape, bool training) {
  // The angles of rope come from the same memory.
  const auto angles = shape.head_dim * static_cast<std::int64_t>(sizeof(Acc<T>));
  return std::max(
      angles, training ? bytes_of<BackwardScratch<T>>(shape) : bytes_of<ForwardScratch<T>>(shape));
}

// ---- decoding --------------------------------------------------------------------------------

template <class T, class A = Acc<T>>
void decode_head(const AttentionDecode& args, std::int64_t seq, std::int64_t head, A* scores,
                 A* sum) {
  const std::int64_t dim = args.shape.head_dim;
  const std::int64_t length = args.length.as<std::int32_t>()[seq];
  ARCUS_CHECK(length >= 1 && length <= args.max_len, "a KV cache of {} holds {} keys", args.max_len,
              length);
  const std::int64_t col = head / args.shape.group() * dim;
  const std::int64_t first = seq * args.max_len;
  const T* q = args.q.row<T>(seq) + head * dim;
  for (std::int64_t j = 0; j < length; ++j) {
    scores[j] = dot<A>(q, args.k_cache.row<T>(first + j) + col, dim);
  }
  A lse;
  const A scale = score_scale<A>(args.shape);
  const A inv_sum = A(1) / softmax_row(scores, {0, length}, scale, &lse);
  std::fill_n(sum, dim, A(0));
  for (std::int64_t j = 0; j < length; ++j) {
    const T* v = args.v_cache.row<T>(first + j) + col;
    const A p = scores[j];
#pragma omp simd
    for (std::int64_t i = 0; i < dim; ++i) sum[i] = std::fma(p, static_cast<A>(v[i]), sum[i]);
  }
  T* out = args.out.row<T>(seq) + head * dim;
#pragma omp simd
  for (std::int64_t i = 0; i < dim; ++i) store(out[i], sum[i] * inv_sum);
}

}  // namespace

void attention_forward(Stream& stream, const AttentionForward& args) {
  check_layout(args.shape, args.q, args.k);
  const std::int64_t problems =
      args.shape.seq_len > 0 ? args.shape.num_seqs * args.shape.num_kv_heads : 0;
  dispatch_compute(args.q.dtype, [&]<class T>() {
    parallel_tasks(stream, problems, [&](std::int64_t index, int thread) {
      forward_problem<T>(stream, thread, args, Problem(args.shape, index));
    });
  });
}

void attention_backward(Stream& stream, const AttentionBackward& args) {
  check_layout(args.shape, args.q, args.k);
  ARCUS_CHECK(args.dq.contiguous(), "attention: dq must be contiguous");
  const std::int64_t problems =
      args.shape.seq_len > 0 ? args.shape.num_seqs * args.shape.num_kv_heads : 0;
  dispatch_compute(args.q.dtype, [&]<class T>() {
    parallel_tasks(stream, problems, [&](std::int64_t index, int thread) {
      backward_problem<T>(stream, thread, args, Problem(args.shape, index));
    });
  });
}

void attention_decode(Stream& stream, const AttentionDecode& args) {
  const std::int64_t heads = args.shape.num_heads;
  const std::int64_t dim = args.shape.head_dim;
  dispatch_compute(args.q.dtype, [&]<class T>() {
    using A = Acc<T>;
    const auto bytes = (args.max_len + dim) * static_cast<std::int64_t>(sizeof(A));
    parallel_tasks(stream, args.q.rows * heads, [&](std::int64_t task, int thread) {
      auto* scores = static_cast<A*>(stream.cpu().scratch(thread, bytes));
      decode_head<T>(args, task / heads, task % heads, scores, scores + args.max_len);
    });
  });
}

}  // namespace arcus::cpu

namespace arcus {

PrimitiveReport build_attention_primitives(Stream& stream, const AttentionShape& shape,
                                           DType compute, bool training) {
  const auto start = std::chrono::steady_clock::now();
  cpu::Context& context = stream.cpu();
  const std::int64_t primitives = context.gemm().num_primitives();
  const std::int64_t gemm_bytes = context.gemm().scratch_bytes();
  const cpu::Products products(shape, compute);
  for (std::int64_t begin = 0; begin < shape.seq_len; begin += cpu::kBlockPositions) {
    const cpu::Block block = cpu::block_at(shape, begin);
    cpu::build_gemm(context, products.against_keys(block));
    cpu::build_gemm(context, products.values(block));
    if (!training) continue;
    cpu::build_gemm(context, products.dkey(block));
    cpu::build_gemm(context, products.dq(block));
  }
  const std::int64_t bytes =
      dispatch_compute(compute, [&]<class T>() { return cpu::scratch_bytes<T>(shape, training); });
  context.reserve_scratch(bytes);
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  return {.primitives = context.gemm().num_primitives() - primitives,
          .bytes = context.gemm().scratch_bytes() - gemm_bytes + bytes * context.num_threads(),
          .seconds = elapsed.count()};
}

}  // namespace arcus
