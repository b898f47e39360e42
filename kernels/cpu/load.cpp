#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>

#include "kernels/balance.hpp"
#include "kernels/cpu/math.hpp"
#include "kernels/cpu/parallel.hpp"
#include "kernels/cpu/top.hpp"
#include "kernels/cpu/variation.hpp"
#include "src/base/rng.hpp"

/// The load loss: the expected number of tokens that an expert gets over the draws of its noise.
namespace arcus::cpu {
namespace {

constexpr std::int64_t kRowGrain = 16;
constexpr std::int64_t kChunkRows = 512;  ///< rows whose thresholds stand on the stack

/// What an expert's noisy logit has to exceed: the K-th largest among the others, which is the
/// token's next one for those that are among the K largest themselves.
template <class A>
struct Threshold {
  Rank<A> last, next;
  const Rank<A>& of(A z_noisy, std::int64_t expert) const {
    return last.covers(z_noisy, expert) ? next : last;
  }
};

template <class A>
Threshold<A> threshold_of(const A* z_noisy, std::int64_t num_experts, std::int64_t topk) {
  Threshold<A> r{};
  select_largest(
      num_experts, topk + 1, [=](std::int64_t e) { return z_noisy[e]; },
      [](std::int64_t) { return true; },
      [&](std::int64_t rank, std::int64_t e) {
        if (rank + 1 >= topk) (rank < topk ? r.last : r.next) = Rank<A>{ordered(z_noisy[e]), e};
      });
  return r;
}

/// (z - h) / (amount sigma).
template <class A>
double distance(A z_clean, A threshold, double width) {
  return (static_cast<double>(z_clean) - static_cast<double>(threshold)) / width;
}

template <class A>
void sum_load(Stream& stream, double* load, const LoadLoss& args) {
  const std::int64_t num_experts = args.z_noisy.cols;
  std::fill_n(load, num_experts, 0.0);
  std::array<Threshold<A>, kChunkRows> threshold;
  for (std::int64_t first = 0; first < args.z_noisy.rows; first += kChunkRows) {
    const std::int64_t rows = std::min(kChunkRows, args.z_noisy.rows - first);
    parallel_rows(stream, rows, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) {
        threshold[t] = threshold_of(args.z_noisy.row<A>(first + t), num_experts, args.topk);
      }
    });
    // An expert's sum runs over tokens in order, whichever thread has the expert.
    parallel_rows(stream, num_experts, 1, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = 0; t < rows; ++t) {
        const A* clean = args.z_clean.row<A>(first + t);
        const A* noisy = args.z_noisy.row<A>(first + t);
        const A* n = args.n.row<A>(first + t);
        for (std::int64_t e = begin; e < end; ++e) {
          const double width = args.amount * softplus(static_cast<double>(n[e]));
          const double y = distance(clean[e], threshold[t].of(noisy[e], e).value, width);
          load[e] += std::erfc(-y / std::numbers::sqrt2) / 2;
        }
      }
    });
  }
}

template <class A>
void backward_row(const LoadLossBackward& args, const Rng& rng, std::int64_t t) {
  const std::int64_t num_experts = args.z_noisy.cols;
  const A* clean = args.z_clean.row<A>(t);
  const A* noisy = args.z_noisy.row<A>(t);
  const A* n = args.n.row<A>(t);
  A* dz = args.dz.row<A>(t);
  A* dn = args.dn.row<A>(t);
  const auto* derivative = args.derivative.as<double>();
  const Threshold<A> threshold = threshold_of(noisy, num_experts, args.topk);
  const double density = std::numbers::inv_sqrtpi / std::numbers::sqrt2;  // of the normal at 0
  double from_last = 0;  // what flows into the threshold, by the expert that it belongs to
  double from_next = 0;
  for (std::int64_t e = 0; e < num_experts; ++e) {
    const auto ne = static_cast<double>(n[e]);
    const double width = args.amount * softplus(ne);
    const Rank<A>& h = threshold.of(noisy[e], e);
    const double y = distance(clean[e], h.value, width);
    const double p = args.coeff * derivative[e] * density * std::exp(-y * y / 2) / width;
    dz[e] += static_cast<A>(p);
    dn[e] -= static_cast<A>(p * args.amount * y * sigmoid(ne));
    (h.i == threshold.last.i ? from_last : from_next) += p;
  }
  const auto through_threshold = [&](std::int64_t m, double p) {
    const double eps =
        rng.normal(static_cast<std::uint64_t>(args.draws.step),
                   static_cast<std::uint64_t>((args.draws.first_token + t) * num_experts + m));
    dz[m] -= static_cast<A>(p);
    dn[m] -= static_cast<A>(p * args.amount * eps * sigmoid(static_cast<double>(n[m])));
  };
  through_threshold(threshold.last.i, from_last);
  through_threshold(threshold.next.i, from_next);
}

void check_load(std::int64_t topk, std::int64_t num_experts, double amount) {
  ARCUS_CHECK(topk >= 1 && topk < num_experts && amount > 0,
              "load_loss: top {} of {} experts, noise of {}", topk, num_experts, amount);
}

}  // namespace

void load_loss(Stream& stream, const LoadLoss& args) {
  check_load(args.topk, args.z_noisy.cols, args.amount);
  auto* load = args.derivative.as<double>();
  dispatch_accumulate(args.z_noisy.dtype, [&]<class A>() { sum_load<A>(stream, load, args); });
  *args.cv2 = take_variation(load, args.z_noisy.cols);
}

void load_loss_backward(Stream& stream, const LoadLossBackward& args) {
  check_load(args.topk, args.z_noisy.cols, args.amount);
  const Rng rng(args.draws.key);
  dispatch_accumulate(args.z_noisy.dtype, [&]<class A>() {
    parallel_rows(stream, args.z_noisy.rows, kRowGrain,
                  [&](std::int64_t begin, std::int64_t end, int) {
                    for (std::int64_t t = begin; t < end; ++t) backward_row<A>(args, rng, t);
                  });
  });
}

}  // namespace arcus::cpu
