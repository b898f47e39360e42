#pragma once

#include <cstdint>
#include <vector>

#include "kernels/arena.hpp"
#include "kernels/ffn.hpp"

namespace arcus {

/// The experts of one MoE layer with evenly loaded segments of made-up numbers.
class BenchedExperts {
 public:
  BenchedExperts(Stream& stream, FfnShape shape, DType dtype, std::int64_t experts,
                 std::int64_t rows);

  void forward();
  /// Of what forward left.
  void backward();
  /// Of what forward and backward left.
  void weight_gradient(DType sum_dtype);
  /// Of one of the three passes.
  double flops() const;

 private:
  FfnWeights weights() const;
  std::int64_t bytes() const;

  Stream& stream_;
  FfnShape shape_;
  std::int64_t experts_;
  std::int64_t rows_;
  Arena arena_;
  std::vector<Segment> segments_;
  BadLeafFlag flag_{kNoBadLeaf};
  TensorView weights_, x_, y_, dout_, dx_, dy_, gate_up_, dgate_up_, act_, row_weight_,
      drow_weight_, sums_, biases_, bias_sums_;
};

}  // namespace arcus
