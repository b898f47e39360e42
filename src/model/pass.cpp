#include "src/model/pass.hpp"

#include <cstring>

namespace arcus {

TensorView allocate_padded(Arena& arena, DType dtype, std::int64_t rows, std::int64_t cols,
                           std::int64_t extra_rows) {
  const std::int64_t all = padded_rows(rows) + extra_rows;
  const TensorView view = arena.allocate(dtype, all, cols);
  if (view.data != nullptr && all > rows) {
    std::memset(view.row_range(rows, all - rows).data, 0,
                static_cast<std::size_t>((all - rows) * cols) * size_of(dtype));
  }
  return view.row_range(0, rows);
}

Routing Routing::first_tokens(std::int64_t tokens) const {
  Routing first = *this;
  for (TensorView* view : {&first.x_wide, &first.z, &first.s, &first.lse, &first.topk_idx,
                           &first.expert_of_slot, &first.weight, &first.noise_logits,
                           &first.z_clean, &first.inv_norm, &first.cosine, &first.predictor}) {
    if (view->data != nullptr) *view = view->row_range(0, tokens);
  }
  if (const TensorView wide = x_wide; wide.data != nullptr && tokens < wide.rows) {
    const std::int64_t count = padded_rows(tokens) - tokens;
    std::memset(wide.row_range(tokens, count).data, 0,
                static_cast<std::size_t>(count * wide.cols) * size_of(wide.dtype));
  }
  return first;
}

}  // namespace arcus
