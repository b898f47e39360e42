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

}  // namespace arcus
