#pragma once

#include "kernels/dispatch.hpp"
#include "src/base/tensor.hpp"

namespace arcus {

/// out[i] = std * standard normal number first_element + i of Rng(key), in f32, then rounded once
/// to out's type. Numbers are addressed, so a tensor may be filled in any parts.
struct FillNormal {
  TensorView out;         ///< [1, n] compute type
  std::uint64_t key = 0;  ///< Rng::key
  std::int64_t first_element = 0;
  float std = 1;
};
ARCUS_DECLARE_OP(fill_normal, FillNormal)

}  // namespace arcus
