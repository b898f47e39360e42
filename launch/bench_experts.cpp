#include "launch/bench_experts.hpp"

#include "src/base/rng.hpp"

namespace arcus {
namespace {

void fill(TensorView view, float scale) {
  const Rng rng(1, "bench", "fill");
  for (std::int64_t i = 0; i < view.rows; ++i) {
    for (std::int64_t j = 0; j < view.cols; ++j) {
      const auto element = static_cast<std::uint64_t>(i * view.cols + j);
      const float value = scale * (2 * rng.uniform(0, element) - 1);
      if (view.dtype == DType::f32) view.row<float>(i)[j] = value;
      if (view.dtype == DType::bf16) view.row<bf16>(i)[j] = bf16(value);
    }
  }
}

}  // namespace

BenchedExperts::BenchedExperts(Stream& stream, FfnShape shape, DType dtype, std::int64_t experts,
                               std::int64_t rows)
    : stream_(stream), shape_(shape), experts_(experts), rows_(rows), arena_("bench", bytes()) {
  for (std::int64_t e = 0; e < experts; ++e) {
    segments_.push_back({static_cast<std::int32_t>(e), 0, e * rows, e * padded_rows(rows), rows});
  }
  const std::int64_t h = shape.hidden_size;
  const std::int64_t f = shape.ff_size;
  const std::int64_t u = shape.gate_up_size();
  const std::int64_t r = experts * rows;
  const std::int64_t rp = experts * padded_rows(rows);
  const DType acc = accumulate_dtype(dtype);
  weights_ = arena_.allocate(dtype, experts * (u + f), h);
  x_ = arena_.allocate(dtype, r + kWgradRowPadding, h);
  for (TensorView* view : {&y_, &dout_, &dx_}) *view = arena_.allocate(dtype, r, h);
  dy_ = arena_.allocate(dtype, rp, h, ffn_row_stride(h));
  for (TensorView* view : {&gate_up_, &dgate_up_}) {
    *view = arena_.allocate(dtype, rp, u, ffn_row_stride(u));
  }
  act_ = arena_.allocate(dtype, rp, f, ffn_row_stride(f));
  row_weight_ = arena_.allocate(acc, 1, r);
  drow_weight_ = arena_.allocate(acc, 1, r);
  sums_ = arena_.allocate(DType::i64, experts * (u + f), h);
  if (shape.bias) {
    biases_ = arena_.allocate(acc, experts, u + h);
    bias_sums_ = arena_.allocate(DType::i64, experts, u + h);
    fill(biases_, 0.02F);
  }
  fill(weights_, 0.02F);
  fill(x_, 1);
  fill(dout_, 1e-3F);
  fill(row_weight_, 1);
  const auto shapes = ffn_gemm_shapes(shape, dtype, rows, true);
  build_primitives(stream, shapes);
}

void BenchedExperts::forward() {
  ffn_forward(stream_, {.y = y_,
                        .gate_up = gate_up_,
                        .act = act_,
                        .x = x_,
                        .weights = weights(),
                        .shape = shape_,
                        .segments = segments_});
}

void BenchedExperts::backward() {
  ffn_backward(stream_, {.dx = dx_,
                         .drow_weight = drow_weight_,
                         .dy = dy_,
                         .dgate_up = dgate_up_,
                         .dout = dout_,
                         .row_weight = row_weight_,
                         .y = y_,
                         .gate_up = gate_up_,
                         .weights = weights(),
                         .shape = shape_,
                         .segments = segments_});
}

void BenchedExperts::weight_gradient(DType sum_dtype) {
  const std::int64_t gate = shape_.gated() ? shape_.ff_size : 0;
  const auto sums = [&](const TensorView& memory) {
    return GradientSum{.sum = memory.data, .dtype = sum_dtype, .limit = 64, .flag = &flag_};
  };
  const auto part = [](const GradientSum& sum, std::int64_t at) {
    return sum.sum == nullptr ? sum : sum.at(at);
  };
  const GradientSum sum = sums(sums_);
  const GradientSum bias = sums(bias_sums_);
  ffn_wgrad(stream_, {.dgate = gate > 0 ? sum : GradientSum(),
                      .dup = sum.at(gate * shape_.hidden_size),
                      .ddown = sum.at(shape_.gate_up_size() * shape_.hidden_size),
                      .expert_stride = shape_.weight_elements(),
                      .dgate_bias = gate > 0 ? bias : GradientSum(),
                      .dup_bias = part(bias, gate),
                      .ddown_bias = part(bias, shape_.gate_up_size()),
                      .bias_stride = bias_sums_.cols,
                      .x = x_,
                      .act = act_,
                      .dy = dy_,
                      .dgate_up = dgate_up_,
                      .shape = shape_,
                      .segments = segments_});
}

double BenchedExperts::flops() const {
  return 2.0 * static_cast<double>(shape_.weight_elements() * experts_ * rows_);
}

FfnWeights BenchedExperts::weights() const {
  const std::int64_t h = shape_.hidden_size;
  const std::int64_t f = shape_.ff_size;
  const std::int64_t u = shape_.gate_up_size();
  FfnWeights weights{.gate_up = weights_.row_range(0, u),
                     .down = {weights_.row_range(u, h).data, weights_.dtype, h, f},
                     .expert_stride = shape_.weight_elements()};
  if (!shape_.bias) return weights;
  weights.gate_up_bias = biases_.row_range(0, 1).col_range(0, u);
  weights.down_bias = biases_.row_range(0, 1).col_range(u, h);
  weights.bias_stride = biases_.cols;
  return weights;
}

/// More than enough address space; untouched pages cost nothing.
std::int64_t BenchedExperts::bytes() const {
  const std::int64_t width = shape_.hidden_size + shape_.ff_size;
  return experts_ * (padded_rows(rows_) + kWgradRowPadding) * width * 64 +
         experts_ * (shape_.hidden_size * shape_.ff_size + width) * 64 + (std::int64_t{1} << 24);
}

}  // namespace arcus
