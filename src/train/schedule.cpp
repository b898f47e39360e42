#include "src/train/schedule.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "src/base/error.hpp"

namespace arcus {

double learning_rate(const TrainConfig& c, std::int64_t step) {
  if (step < c.warmup_steps) {
    return c.lr * static_cast<double>(step + 1) / static_cast<double>(c.warmup_steps);
  }
  const double low = c.lr * c.min_lr_ratio;
  const double last = static_cast<double>(std::max<std::int64_t>(1, c.steps - 1));
  if (c.schedule == "cosine") {
    const double begin = static_cast<double>(c.warmup_steps);
    const double progress =
        std::clamp((static_cast<double>(step) - begin) / std::max(1.0, last - begin), 0.0, 1.0);
    return low + (c.lr - low) * 0.5 * (1 + std::cos(std::numbers::pi * progress));
  }
  if (c.schedule == "wsd") {
    const double begin = static_cast<double>(c.steps) * (1 - c.decay_fraction);
    const double progress =
        std::clamp((static_cast<double>(step) - begin) / std::max(1.0, last - begin), 0.0, 1.0);
    return c.lr + (low - c.lr) * progress;
  }
  return c.lr;
}

void validate(const TrainConfig& c) {
  const auto positive = [](const char* name, std::int64_t value) {
    ARCUS_REQUIRE(value > 0, ExitCode::usage, "train.{} is {}; it must be at least 1", name, value);
  };
  positive("steps", c.steps);
  positive("seq_len", c.seq_len);
  positive("micro_batch_seqs", c.micro_batch_seqs);
  positive("global_batch_seqs", c.global_batch_seqs);
  ARCUS_REQUIRE(c.global_batch_seqs % c.micro_batch_seqs == 0, ExitCode::usage,
                "train.global_batch_seqs ({}) must be a multiple of train.micro_batch_seqs ({}); "
                "set global_batch_seqs to {}",
                c.global_batch_seqs, c.micro_batch_seqs,
                (c.global_batch_seqs / c.micro_batch_seqs + 1) * c.micro_batch_seqs);
  ARCUS_REQUIRE(
      c.schedule == "cosine" || c.schedule == "wsd" || c.schedule == "constant", ExitCode::usage,
      "train.schedule is \"{}\"; it must be \"cosine\", \"wsd\" or \"constant\"", c.schedule);
  ARCUS_REQUIRE(c.dtype == "f32" || c.dtype == "bf16", ExitCode::usage,
                "train.dtype is \"{}\"; it must be \"f32\" or \"bf16\"", c.dtype);
  ARCUS_REQUIRE(c.warmup_steps >= 0 && c.warmup_steps <= c.steps, ExitCode::usage,
                "train.warmup_steps ({}) must be between 0 and train.steps ({})", c.warmup_steps,
                c.steps);
  // Below this, gradients smaller than the quantum of the order-independent sums would matter.
  constexpr double kLeastEps = 0x1p-30;
  ARCUS_REQUIRE(c.eps >= kLeastEps, ExitCode::usage,
                "train.eps is {}; with gradients summed in units of 2^-50 it must be at least {}",
                c.eps, kLeastEps);
  ARCUS_REQUIRE(c.lr > 0 && c.min_lr_ratio >= 0 && c.min_lr_ratio <= 1, ExitCode::usage,
                "train.lr ({}) must be positive and train.min_lr_ratio ({}) in [0, 1]", c.lr,
                c.min_lr_ratio);
  ARCUS_REQUIRE(c.beta1 >= 0 && c.beta1 < 1 && c.beta2 >= 0 && c.beta2 < 1, ExitCode::usage,
                "train.beta1 ({}) and train.beta2 ({}) must be in [0, 1)", c.beta1, c.beta2);
  ARCUS_REQUIRE(c.weight_decay >= 0 && c.grad_clip >= 0, ExitCode::usage,
                "train.weight_decay ({}) and train.grad_clip ({}) must not be negative",
                c.weight_decay, c.grad_clip);
  ARCUS_REQUIRE(c.decay_fraction > 0 && c.decay_fraction <= 1, ExitCode::usage,
                "train.decay_fraction is {}; it must be in (0, 1]", c.decay_fraction);
}

}  // namespace arcus
