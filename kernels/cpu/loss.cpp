#include "kernels/loss.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/math.hpp"
#include "kernels/cpu/parallel.hpp"
#include "kernels/cpu/rows.hpp"

namespace arcus::cpu {
namespace {

constexpr std::int64_t kRowGrain = 4;

template <class T, class A>
void gradient_row(T* dlogits, const A* logits, std::int64_t vocab, std::int32_t target, A max,
                  A inv_sum, A scale) {
  const A at_target = (exp(logits[target] - max) * inv_sum - A(1)) * scale;
#pragma omp simd
  for (std::int64_t i = 0; i < vocab; ++i) {
    store(dlogits[i], exp(logits[i] - max) * inv_sum * scale);
  }
  store(dlogits[target], at_target);
}

/// One row: its loss, and its gradient where `dlogits` is given.
template <class T, class A>
A cross_entropy_row(T* dlogits, const A* logits, std::int64_t vocab, std::int32_t target, A scale) {
  if (target < 0) {
    if (dlogits != nullptr) std::fill_n(dlogits, vocab, T{});
    return A(0);
  }
  ARCUS_CHECK(target < vocab, "target {} of a vocabulary of {}", target, vocab);
  const A max = max_terms<A>(vocab, -std::numeric_limits<A>::infinity(),
                             [=](std::int64_t i) { return logits[i]; });
  const A sum = sum_terms<A>(vocab, [=](std::int64_t i) { return exp(logits[i] - max); });
  const A loss = (max - logits[target]) + std::log(sum);
  if (dlogits != nullptr) {
    gradient_row(dlogits, logits, vocab, target, max, A(1) / sum, scale);
  }
  return loss;
}

}  // namespace

void cross_entropy(Stream& stream, const CrossEntropy& args) {
  const bool gradient = !args.dlogits.empty();
  const DType dtype = gradient ? args.dlogits.dtype : args.logits.dtype;
  dispatch_compute(dtype, [&]<class T>() {
    using A = Acc<T>;
    const auto* targets = args.targets.as<std::int32_t>();
    parallel_rows(stream, args.logits.rows, kRowGrain,
                  [&](std::int64_t begin, std::int64_t end, int) {
                    for (std::int64_t t = begin; t < end; ++t) {
                      args.token_loss.as<A>()[t] = cross_entropy_row<T, A>(
                          gradient ? args.dlogits.row<T>(t) : nullptr, args.logits.row<A>(t),
                          args.logits.cols, targets[t], static_cast<A>(args.scale));
                    }
                  });
  });
}

}  // namespace arcus::cpu
