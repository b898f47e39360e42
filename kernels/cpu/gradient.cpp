#include "kernels/gradient.hpp"

#ifdef __AVX512DQ__
#include <immintrin.h>
#endif

#include <array>
#include <bit>
#include <cmath>
#include <cstring>

#include "kernels/cpu/leaf.hpp"
#include "kernels/cpu/parallel.hpp"
#include "kernels/gemm.hpp"

namespace arcus {

void raise_bad_leaf(BadLeafFlag& flag, std::int64_t key) {
  std::int64_t lowest = flag.load(std::memory_order_relaxed);
  while (key < lowest && !flag.compare_exchange_weak(lowest, key)) {
  }
}

float leaf_limit(std::int64_t most_leaves) {
  ARCUS_CHECK(most_leaves >= 1, "a tensor with {} leaves in a step", most_leaves);
  const double limit = std::ldexp(1.0, 62 - kLeafScaleBits) / static_cast<double>(most_leaves);
  // Rounded down, so that most_leaves leaves at the limit still fit.
  const auto rounded = static_cast<float>(limit);
  return rounded > limit ? std::nextafter(rounded, 0.0F) : rounded;
}

namespace cpu {
namespace {

constexpr float kLeafScale = 0x1p50F;
constexpr std::uint32_t kAbsBits = 0x7fffffffU;
static_assert(kLeafScaleBits == 50);

/// Elements from which it pays to share work out.
constexpr std::int64_t kGrain = std::int64_t{1} << 14;

/// int64_rne(scaled) as cvtps_epi64 gives it: out of range and NaN become INT64_MIN.
std::int64_t to_int64(float scaled) {
  if (!(std::abs(scaled) < 0x1p63F)) return std::numeric_limits<std::int64_t>::min();
  return static_cast<std::int64_t>(std::nearbyint(scaled));
}

std::int64_t wrapping_add(std::int64_t a, std::int64_t b) {
  return static_cast<std::int64_t>(static_cast<std::uint64_t>(a) + static_cast<std::uint64_t>(b));
}

}  // namespace

bool add_quantized_portable(std::int64_t* sum, const float* leaf, std::int64_t count, float limit,
                            LeafWrite write) {
  std::uint32_t largest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    // Magnitudes order like their bits; a NaN's exceed those of infinity.
    largest = std::max(largest, std::bit_cast<std::uint32_t>(leaf[i]) & kAbsBits);
    sum[i] = wrapping_add(write == LeafWrite::add ? sum[i] : 0, to_int64(leaf[i] * kLeafScale));
  }
  return largest <= std::bit_cast<std::uint32_t>(limit);
}

#ifdef __AVX512DQ__
namespace {

constexpr std::int64_t kLanes = 8;

/// The largest |leaf| (as bits, by lane) of whole vectors.
template <LeafWrite kWrite>
__m256i quantize_lanes(std::int64_t* sum, const float* leaf, std::int64_t count) {
  const __m256 scale = _mm256_set1_ps(kLeafScale);
  const __m256i abs_mask = _mm256_set1_epi32(static_cast<int>(kAbsBits));
  __m256i largest = _mm256_setzero_si256();
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const __m256 value = _mm256_loadu_ps(leaf + i);
    largest = _mm256_max_epu32(largest, _mm256_and_si256(_mm256_castps_si256(value), abs_mask));
    const __m512i quantized = _mm512_cvtps_epi64(_mm256_mul_ps(value, scale));
    if constexpr (kWrite == LeafWrite::add) {
      _mm512_storeu_si512(sum + i, _mm512_add_epi64(_mm512_loadu_si512(sum + i), quantized));
    } else if constexpr (kWrite == LeafWrite::store) {
      _mm512_storeu_si512(sum + i, quantized);
    } else {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(sum + i), quantized);
    }
  }
  return largest;
}

bool on_cache_line(const void* address) {
  return reinterpret_cast<std::uintptr_t>(address) % sizeof(__m512i) == 0;
}

}  // namespace

bool add_quantized(std::int64_t* sum, const float* leaf, std::int64_t count, float limit,
                   LeafWrite write) {
  const std::int64_t whole = count / kLanes * kLanes;
  __m256i largest;
  if (write == LeafWrite::add) {
    largest = quantize_lanes<LeafWrite::add>(sum, leaf, whole);
  } else if (write == LeafWrite::stream && on_cache_line(sum)) {
    largest = quantize_lanes<LeafWrite::stream>(sum, leaf, whole);
  } else {
    largest = quantize_lanes<LeafWrite::store>(sum, leaf, whole);
  }
  alignas(32) std::array<std::uint32_t, kLanes> lanes;
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes.data()), largest);
  const std::uint32_t limit_bits = std::bit_cast<std::uint32_t>(limit);
  bool good = add_quantized_portable(sum + whole, leaf + whole, count - whole, limit, write);
  for (const std::uint32_t lane : lanes) good = good && lane <= limit_bits;
  return good;
}
#else
bool add_quantized(std::int64_t* sum, const float* leaf, std::int64_t count, float limit,
                   LeafWrite write) {
  return add_quantized_portable(sum, leaf, count, limit, write);
}
#endif

namespace {

/// Streamed stores are visible to other threads only after this.
void finish_streamed_stores() {
#ifdef __AVX512DQ__
  _mm_sfence();
#endif
}

}  // namespace

template <class A>
void add_leaf_rows(const GradientSum& target, std::int64_t target_stride, const A* leaf,
                   std::int64_t leaf_stride, std::int64_t rows, std::int64_t cols,
                   std::int64_t micro_batch, LeafWrite write) {
  bool good = true;
  for (std::int64_t row = 0; row < rows; ++row) {
    const A* from = leaf + row * leaf_stride;
    if constexpr (std::is_same_v<A, float>) {
      if (target.dtype == DType::i64) {
        auto* to = static_cast<std::int64_t*>(target.sum) + row * target_stride;
        good &= add_quantized(to, from, cols, target.limit, write);
        continue;
      }
    }
    ARCUS_CHECK(target.dtype == dtype_of<A>(), "a leaf of {} for a sum of {}",
                name_of(dtype_of<A>()), name_of(target.dtype));
    A* to = static_cast<A*>(target.sum) + row * target_stride;
    for (std::int64_t i = 0; i < cols; ++i) {
      to[i] = (write == LeafWrite::add ? to[i] : A(0)) + from[i];
    }
  }
  if (write == LeafWrite::stream) finish_streamed_stores();
  if (!good && target.flag != nullptr) {
    raise_bad_leaf(*target.flag, bad_leaf_key(target.tensor_idx, micro_batch));
  }
}
template void add_leaf_rows(const GradientSum&, std::int64_t, const float*, std::int64_t,
                            std::int64_t, std::int64_t, std::int64_t, LeafWrite);
template void add_leaf_rows(const GradientSum&, std::int64_t, const double*, std::int64_t,
                            std::int64_t, std::int64_t, std::int64_t, LeafWrite);

void add_leaf(Stream& stream, const AddLeaf& args) {
  dispatch_accumulate(args.leaf.dtype, [&]<class A>() {
    const std::int64_t rows_per_task =
        std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(1, args.leaf.cols));
    parallel_rows(stream, args.leaf.rows, rows_per_task,
                  [&](std::int64_t begin, std::int64_t end, int) {
                    add_leaf_rows(args.target.at(begin * args.target_stride), args.target_stride,
                                  args.leaf.row<A>(begin), args.leaf.stride, end - begin,
                                  args.leaf.cols, args.micro_batch);
                  });
  });
}

namespace {

/// One element of a gradient from its sum: one rounding (int64 to float), then an exact product;
/// never through double.
float gradient_of(std::int64_t sum) { return static_cast<float>(sum) * (1.0F / kLeafScale); }
float gradient_of(float sum) { return sum; }
double gradient_of(double sum) { return sum; }

/// Calls fn.template operator()<S>() with the C++ type of a sum.
template <class Fn>
void dispatch_sum(DType dtype, Fn&& fn) {
  if (dtype == DType::i64) return fn.template operator()<std::int64_t>();
  dispatch_accumulate(dtype, fn);
}

template <class S>
double sum_of_squares(const S* sum, std::int64_t count) {
  constexpr std::int64_t kSums = 8;
  std::array<double, kSums> sums{};
  std::int64_t i = 0;
  for (; i + kSums <= count; i += kSums) {
    for (std::int64_t lane = 0; lane < kSums; ++lane) {
      const auto value = static_cast<double>(gradient_of(sum[i + lane]));
      sums[static_cast<std::size_t>(lane)] += value * value;
    }
  }
  for (std::size_t lane = 0; i < count; ++i, ++lane) {
    const auto value = static_cast<double>(gradient_of(sum[i]));
    sums[lane] += value * value;
  }
  double total = 0;
  for (const double part : sums) total += part;
  return total;
}

}  // namespace

void gradient_squares(Stream& stream, const GradientSquares& args) {
  const auto num_blocks = static_cast<std::int64_t>(args.blocks.size());
  ARCUS_CHECK(args.sums_of_squares.size() == num_blocks, "{} sums of squares of {} blocks",
              args.sums_of_squares.size(), num_blocks);
  dispatch_sum(args.sum.dtype, [&]<class S>() {
    const S* sum = args.sum.as<S>();
    auto* result = args.sums_of_squares.as<double>();
    parallel_tasks(stream, num_blocks, [&](std::int64_t task, int) {
      const ElementRange& block = args.blocks[static_cast<std::size_t>(task)];
      result[task] = sum_of_squares(sum + block.begin, block.count);
    });
  });
}

namespace {

/// One update in the type of the master weights; every product and sum is rounded where it stands.
template <class A>
struct AdamWStep {
  explicit AdamWStep(const AdamW& args)
      : clip(static_cast<A>(args.clip_factor)),
        lr(static_cast<A>(args.lr)),
        beta1(static_cast<A>(args.beta1)),
        beta2(static_cast<A>(args.beta2)),
        rest1(static_cast<A>(1 - args.beta1)),
        rest2(static_cast<A>(1 - args.beta2)),
        eps(static_cast<A>(args.eps)),
        decay(static_cast<A>(args.weight_decay)),
        correction1(static_cast<A>(args.bias_correction1)),
        correction2(static_cast<A>(args.bias_correction2)) {}

  A operator()(A p, A& m, A& v, A gradient) const {
    const A g = gradient * clip;
    m = beta1 * m + rest1 * g;
    v = beta2 * v + rest2 * (g * g);
    const A update = (m / correction1) / (std::sqrt(v / correction2) + eps);
    return p - lr * (update + decay * p);
  }

  A clip, lr, beta1, beta2, rest1, rest2, eps, decay, correction1, correction2;
};

template <class A, class S, bool kWithCopy>
void adamw_range(const AdamWStep<A> step, A* __restrict master, A* __restrict m, A* __restrict v,
                 const S* __restrict sum, bf16* __restrict compute, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const A p = step(master[i], m[i], v[i], gradient_of(sum[i]));
    master[i] = p;
    if constexpr (kWithCopy) compute[i] = bf16(static_cast<float>(p));
  }
}

template <class A, class S>
void adamw_of_sums(Stream& stream, const AdamW& args) {
  const AdamWStep<A> step(args);
  A* master = args.master.as<A>();
  A* m = args.m.as<A>();
  A* v = args.v.as<A>();
  const S* sum = args.sum.as<S>();
  bf16* compute = args.compute.empty() ? nullptr : args.compute.as<bf16>();
  parallel_rows(stream, args.master.size(), kGrain, [&](std::int64_t begin, std::int64_t end, int) {
    const std::int64_t count = end - begin;
    if (compute == nullptr) {
      adamw_range<A, S, false>(step, master + begin, m + begin, v + begin, sum + begin, nullptr,
                               count);
    } else {
      adamw_range<A, S, true>(step, master + begin, m + begin, v + begin, sum + begin,
                              compute + begin, count);
    }
  });
}

}  // namespace

void adamw(Stream& stream, const AdamW& args) {
  ARCUS_CHECK(args.sum.size() == args.master.size(), "sum of {} elements, master weights of {}",
              args.sum.size(), args.master.size());
  const DType type = args.master.dtype;
  ARCUS_CHECK(args.sum.dtype == type || (args.sum.dtype == DType::i64 && type == DType::f32),
              "a sum of {} is no gradient of {} weights", name_of(args.sum.dtype), name_of(type));
  if (args.sum.dtype == DType::i64) return adamw_of_sums<float, std::int64_t>(stream, args);
  dispatch_accumulate(type, [&]<class A>() { adamw_of_sums<A, A>(stream, args); });
}

}  // namespace cpu
}  // namespace arcus
