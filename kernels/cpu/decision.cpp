#include <cmath>

#include "kernels/balance.hpp"
#include "kernels/cpu/math.hpp"

namespace arcus::cpu {
namespace {

bool is_chosen(const std::int32_t* chosen, std::int64_t slots, std::int64_t expert) {
  for (std::int64_t j = 0; j < slots; ++j) {
    if (chosen[j] == expert) return true;
  }
  return false;
}

/// -ln sigmoid(z) for a chosen expert, else -ln(1 - sigmoid(z)); stable for any z.
double cross_entropy_of(double z, bool chosen) {
  return std::max(z, 0.0) - (chosen ? z : 0.0) + std::log1p(std::exp(-std::abs(z)));
}

template <class A>
double loss_of_rows(const PredictorLoss& args) {
  const std::int64_t experts = args.logits.cols;
  const double scale = args.coeff / static_cast<double>(args.logits.size());
  double loss = 0;
  for (std::int64_t t = 0; t < args.logits.rows; ++t) {
    const A* z = args.logits.row<A>(t);
    const auto* chosen = args.topk_idx.row<std::int32_t>(t);
    for (std::int64_t e = 0; e < experts; ++e) {
      const bool target = is_chosen(chosen, args.topk_idx.cols, e);
      loss += cross_entropy_of(static_cast<double>(z[e]), target);
      if (args.dlogits.data == nullptr) continue;
      args.dlogits.row<A>(t)[e] =
          static_cast<A>(scale * (static_cast<double>(sigmoid(z[e])) - (target ? 1 : 0)));
    }
  }
  return args.logits.empty() ? 0 : loss / static_cast<double>(args.logits.size());
}

}  // namespace

void predictor_loss(Stream&, const PredictorLoss& args) {
  ARCUS_CHECK(args.topk_idx.rows == args.logits.rows,
              "predictor: logits of {} tokens, choices of {}", args.logits.rows,
              args.topk_idx.rows);
  dispatch_accumulate(args.logits.dtype, [&]<class A>() {
    const double loss = loss_of_rows<A>(args);
    if (args.loss != nullptr) *args.loss = loss;
  });
}

void column_mean(Stream&, const ColumnMean& args) {
  dispatch_accumulate(args.x.dtype, [&]<class A>() {
    double sum = 0;
    for (std::int64_t t = 0; t < args.x.rows; ++t) sum += static_cast<double>(args.x.row<A>(t)[0]);
    *args.mean = args.x.rows > 0 ? sum / static_cast<double>(args.x.rows) : 0;
  });
}

void decision_backward(Stream&, const DecisionBackward& args) {
  ARCUS_CHECK(args.dd_chosen.rows == args.index.size(), "gradients of {} tokens, {} chosen",
              args.dd_chosen.rows, args.index.size());
  const std::int64_t tokens = args.g.rows;
  if (tokens == 0) return;
  dispatch_accumulate(args.g.dtype, [&]<class A>() {
    const auto* index = args.index.as<std::int32_t>();
    const A each = static_cast<A>(args.dmean / static_cast<double>(tokens));
    const A shift = static_cast<A>(args.dshift / static_cast<double>(tokens));
    std::int64_t next = 0;
    for (std::int64_t t = 0; t < tokens; ++t) {
      const A g = args.g.row<A>(t)[0];
      A value = each * g * (1 - g) + shift;
      if (next < args.index.size() && index[next] == t) {
        value += args.dd_chosen.row<A>(next++)[0];
      }
      args.dd.row<A>(t)[0] = value;
    }
  });
}

}  // namespace arcus::cpu
