#include "kernels/ffn.hpp"

#include <algorithm>
#include <array>
#include <cstring>

#include "kernels/cpu/few_rows.hpp"
#include "kernels/cpu/gemm_tiles.hpp"
#include "kernels/cpu/low_rank.hpp"
#include "kernels/cpu/math.hpp"
#include "kernels/cpu/parallel.hpp"
#include "kernels/cpu/rows.hpp"

namespace arcus {

std::int64_t ffn_row_stride(std::int64_t cols) { return cols; }

std::vector<GemmShape> ffn_gemm_shapes(const FfnShape& shape, DType compute, std::int64_t max_rows,
                                       bool training) {
  const std::int64_t hidden = shape.hidden_size;
  const std::int64_t width = shape.ff_size;
  const GemmShape gate_up{.kind = GemmKind::forward,
                          .dtype = compute,
                          .result_dtype = compute,
                          .out = 2 * width,
                          .in = hidden,
                          .x_stride = hidden,
                          .y_stride = ffn_row_stride(2 * width),
                          .max_rows = max_rows};
  const GemmShape down{.kind = GemmKind::forward,
                       .dtype = compute,
                       .result_dtype = compute,
                       .out = hidden,
                       .in = width,
                       .x_stride = ffn_row_stride(width),
                       .y_stride = hidden,
                       .max_rows = max_rows};
  std::vector<GemmShape> shapes = {gate_up, down};
  if (!training) return shapes;
  GemmShape dact = down;
  dact.kind = GemmKind::dgrad;
  dact.result_dtype = accumulate_dtype(compute);
  dact.y_stride = ffn_row_stride(hidden);
  dact.x_stride = width;
  GemmShape dx = gate_up;
  dx.kind = GemmKind::dgrad;
  GemmShape dgate = gate_up;  // dup is its twin
  dgate.kind = GemmKind::ffn_wgrad;
  dgate.out = width;
  GemmShape ddown = down;
  ddown.kind = GemmKind::ffn_wgrad;
  for (const GemmShape& each : {dact, dx, dgate, ddown}) shapes.push_back(each);
  return shapes;
}

namespace cpu {
namespace {

/// Rows [begin, begin + rows) of a segment, the work of one thread.
struct RowTile {
  std::int32_t segment_idx = 0;
  std::int64_t begin = 0;
  std::int64_t rows = 0;
  bool last = false;  ///< the padding rows of the segment belong to it
};

/// The row tiles of all segments, largest first, in the stream's scratch.
std::span<const RowTile> make_row_tiles(Stream& stream, std::span<const Segment> segments,
                                        std::int64_t height) {
  std::int64_t count = 0;
  for (const Segment& segment : segments) count += (segment.rows + height - 1) / height;
  auto* tiles = static_cast<RowTile*>(
      stream.cpu().op_scratch(count * static_cast<std::int64_t>(sizeof(RowTile))));
  RowTile* next = tiles;
  for (std::size_t i = 0; i < segments.size(); ++i) {
    const std::int64_t end = segments[i].rows;
    for (std::int64_t begin = 0; begin < end; begin += height) {
      const std::int64_t rows = std::min(height, end - begin);
      *next++ = {static_cast<std::int32_t>(i), begin, rows, begin + rows == end};
    }
  }
  std::sort(tiles, next, [](const RowTile& a, const RowTile& b) {
    if (a.rows != b.rows) return a.rows > b.rows;
    return a.segment_idx != b.segment_idx ? a.segment_idx < b.segment_idx : a.begin < b.begin;
  });
  return {tiles, next};
}

/// Rows of a task: whole tiles of every product in it (fixed heights divide each other).
std::int64_t ffn_tile_height(DType compute, const FfnShape& shape) {
  const std::int64_t hidden = shape.hidden_size;
  const std::int64_t width = shape.ff_size;
  return std::max({row_tile_height(compute, 2 * width, hidden),
                   row_tile_height(compute, hidden, width), row_tile_height(compute, width, hidden),
                   row_tile_height(compute, hidden, 2 * width)});
}

void check_strides(const FfnWeights& weights, const FfnShape& shape) {
  ARCUS_CHECK(weights.gate_up.rows == 2 * shape.ff_size &&
                  weights.gate_up.cols == shape.hidden_size && weights.gate_up.contiguous() &&
                  weights.down.rows == shape.hidden_size && weights.down.cols == shape.ff_size &&
                  weights.down.contiguous(),
              "FFN of hidden size {} and width {}: gate_up [{}, {}], down [{}, {}]",
              shape.hidden_size, shape.ff_size, weights.gate_up.rows, weights.gate_up.cols,
              weights.down.rows, weights.down.cols);
}

template <class T>
const T* expert_weight(ConstTensorView weight, const FfnWeights& weights, const Segment& segment) {
  return weight.as<T>() + segment.local_expert_idx * weights.expert_stride;
}

/// act = silu(gate) * up.
template <class T>
void swiglu_row(T* __restrict act, const T* __restrict gate, const T* __restrict up,
                std::int64_t width) {
  using A = Acc<T>;
  for (std::int64_t i = 0; i < width; ++i) {
    const A g = static_cast<A>(gate[i]);
    act[i] = static_cast<T>(g * sigmoid(g) * static_cast<A>(up[i]));
  }
}

/// dup = dact * silu(gate); dgate = dact * up * silu'(gate), silu' = s (1 + gate (1 - s)).
template <class T>
void swiglu_backward_row(T* __restrict dgate, T* __restrict dup, const Acc<T>* __restrict dact,
                         const T* __restrict gate, const T* __restrict up, std::int64_t width) {
  using A = Acc<T>;
  for (std::int64_t i = 0; i < width; ++i) {
    const A g = static_cast<A>(gate[i]);
    const A s = sigmoid(g);
    dup[i] = static_cast<T>(dact[i] * (g * s));
    dgate[i] = static_cast<T>(dact[i] * static_cast<A>(up[i]) * (s * (A(1) + g * (A(1) - s))));
  }
}

/// <a, b> over a row: 16 interleaved sums (element i to sum i mod 16), then a tree.
template <class T>
Acc<T> dot_row(const T* a, const T* b, std::int64_t cols) {
  using A = Acc<T>;
  constexpr std::int64_t kSums = 16;
  std::array<A, kSums> sums{};
  std::int64_t i = 0;
  for (; i + kSums <= cols; i += kSums) {
    for (std::int64_t lane = 0; lane < kSums; ++lane) {
      sums[static_cast<std::size_t>(lane)] +=
          static_cast<A>(a[i + lane]) * static_cast<A>(b[i + lane]);
    }
  }
  for (std::size_t lane = 0; i < cols; ++i, ++lane) {
    sums[lane] += static_cast<A>(a[i]) * static_cast<A>(b[i]);
  }
  for (std::size_t half = kSums / 2; half > 0; half /= 2) {
    for (std::size_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

template <class T>
void scale_row(T* __restrict out, const T* __restrict in, Acc<T> scale, std::int64_t cols) {
  for (std::int64_t i = 0; i < cols; ++i) {
    out[i] = static_cast<T>(scale * static_cast<Acc<T>>(in[i]));
  }
}

/// Zeros rows [rows, padded_rows(rows)) of a segment's part of a local buffer.
void zero_padding(TensorView buffer, const Segment& segment) {
  const std::size_t bytes = static_cast<std::size_t>(buffer.cols) * size_of(buffer.dtype);
  for (std::int64_t row = segment.rows; row < padded_rows(segment.rows); ++row) {
    std::memset(buffer.row_range(segment.padded_begin + row, 1).data, 0, bytes);
  }
}

/// What an adapter adds to rows of y, which hold x W^T.
template <class T>
void add_low_rank(Stream& stream, int thread, const FfnLowRankPart& part, std::int64_t expert,
                  std::int64_t padded_row, std::int64_t rows, const T* x, std::int64_t x_stride,
                  T* y, std::int64_t y_stride) {
  if (part.weights.empty()) return;
  low_rank_forward_tile<T>(stream.cpu(), thread, {part.weights, expert}, rows, x, x_stride,
                           part.inner.row<T>(padded_row), y, y_stride);
}

/// What comes back through it, onto rows of dx, which hold dy W.
template <class T, class D>
void add_low_rank_backward(Stream& stream, int thread, const FfnLowRankPart& part,
                           std::int64_t expert, std::int64_t padded_row, std::int64_t rows,
                           const T* dy, std::int64_t dy_stride, D* dx, std::int64_t dx_stride) {
  if (part.weights.empty()) return;
  low_rank_backward_tile<T, D>(stream.cpu(), thread, {part.weights, expert}, rows, dy, dy_stride,
                               part.inner.row<T>(padded_row), dx, dx_stride);
}

template <class T>
void forward_tile(Stream& stream, int thread, const FfnForward& args, const RowTile& tile) {
  const Segment& segment = args.segments[static_cast<std::size_t>(tile.segment_idx)];
  const std::int64_t hidden = args.shape.hidden_size;
  const std::int64_t width = args.shape.ff_size;
  const std::int64_t row = segment.row_begin + tile.begin;
  const std::int64_t padded_row = segment.padded_begin + tile.begin;
  constexpr DType kType = dtype_of<T>();
  run_gemm_rows(stream.cpu(), thread,
                forward_key(kType, kType, 2 * width, hidden, args.x.stride, args.gate_up.stride,
                            false, false),
                tile.rows, args.x.row<T>(row),
                expert_weight<T>(args.weights.gate_up, args.weights, segment),
                args.gate_up.row<T>(padded_row));
  const auto add = [&](const FfnLowRankPart& part, const T* x, std::int64_t x_stride, T* y,
                       std::int64_t y_stride) {
    add_low_rank(stream, thread, part, segment.local_expert_idx, padded_row, tile.rows, x, x_stride,
                 y, y_stride);
  };
  T* gate_up = args.gate_up.row<T>(padded_row);
  add(args.low_rank.gate, args.x.row<T>(row), args.x.stride, gate_up, args.gate_up.stride);
  add(args.low_rank.up, args.x.row<T>(row), args.x.stride, gate_up + width, args.gate_up.stride);
  for (std::int64_t i = padded_row; i < padded_row + tile.rows; ++i) {
    const T* gate = args.gate_up.row<T>(i);
    swiglu_row(args.act.row<T>(i), gate, gate + width, width);
  }
  run_gemm_rows(
      stream.cpu(), thread,
      forward_key(kType, kType, hidden, width, args.act.stride, args.y.stride, false, false),
      tile.rows, args.act.row<T>(padded_row),
      expert_weight<T>(args.weights.down, args.weights, segment), args.y.row<T>(row));
  add(args.low_rank.down, args.act.row<T>(padded_row), args.act.stride, args.y.row<T>(row),
      args.y.stride);
}

/// dy = weight * dout and dweight = <dout, y> of one row.
template <class T>
void backward_row_weight(const FfnBackward& args, std::int64_t row, std::int64_t padded_row) {
  using A = Acc<T>;
  const std::int64_t hidden = args.shape.hidden_size;
  const T* dout = args.dout.row<T>(row);
  const A weight = args.row_weight.empty() ? A(1) : args.row_weight.as<A>()[row];
  scale_row(args.dy.row<T>(padded_row), dout, weight, hidden);
  if (!args.drow_weight.empty()) {
    args.drow_weight.as<A>()[row] = dot_row(dout, args.y.row<T>(row), hidden);
  }
}

template <class T>
void backward_tile(Stream& stream, int thread, const FfnBackward& args, const RowTile& tile) {
  using A = Acc<T>;
  const Segment& segment = args.segments[static_cast<std::size_t>(tile.segment_idx)];
  const std::int64_t hidden = args.shape.hidden_size;
  const std::int64_t width = args.shape.ff_size;
  const std::int64_t row = segment.row_begin + tile.begin;
  const std::int64_t padded_row = segment.padded_begin + tile.begin;
  constexpr DType kType = dtype_of<T>();
  for (std::int64_t i = 0; i < tile.rows; ++i) {
    backward_row_weight<T>(args, row + i, padded_row + i);
  }
  auto* dact = static_cast<A*>(
      stream.cpu().scratch(thread, tile.rows * width * static_cast<std::int64_t>(sizeof(A))));
  run_gemm_rows(stream.cpu(), thread,
                dgrad_key(kType, dtype_of<A>(), hidden, width, args.dy.stride, width, false),
                tile.rows, args.dy.row<T>(padded_row),
                expert_weight<T>(args.weights.down, args.weights, segment), dact);
  const auto add = [&](const FfnLowRankPart& part, const T* dy, std::int64_t dy_stride, auto* dx,
                       std::int64_t dx_stride) {
    add_low_rank_backward(stream, thread, part, segment.local_expert_idx, padded_row, tile.rows, dy,
                          dy_stride, dx, dx_stride);
  };
  add(args.low_rank.down, args.dy.row<T>(padded_row), args.dy.stride, dact, width);
  for (std::int64_t i = 0; i < tile.rows; ++i) {
    const T* gate = args.gate_up.row<T>(padded_row + i);
    T* dgate = args.dgate_up.row<T>(padded_row + i);
    swiglu_backward_row(dgate, dgate + width, dact + i * width, gate, gate + width, width);
  }
  run_gemm_rows(
      stream.cpu(), thread,
      dgrad_key(kType, kType, 2 * width, hidden, args.dgate_up.stride, args.dx.stride, false),
      tile.rows, args.dgate_up.row<T>(padded_row),
      expert_weight<T>(args.weights.gate_up, args.weights, segment), args.dx.row<T>(row));
  const T* dgate_up = args.dgate_up.row<T>(padded_row);
  add(args.low_rank.gate, dgate_up, args.dgate_up.stride, args.dx.row<T>(row), args.dx.stride);
  add(args.low_rank.up, dgate_up + width, args.dgate_up.stride, args.dx.row<T>(row),
      args.dx.stride);
  if (!tile.last) return;
  zero_padding(args.dy, segment);
  zero_padding(args.dgate_up, segment);
}

/// fn(segment, first column, columns) for every block of `width` columns of every segment.
template <class Fn>
void for_each_block(Stream& stream, std::span<const Segment> segments, std::int64_t width,
                    Fn&& fn) {
  const std::int64_t blocks = (width + kFewRowsCols - 1) / kFewRowsCols;
  parallel_tasks(stream, std::ssize(segments) * blocks, [&](std::int64_t task, int) {
    const std::int64_t begin = task % blocks * kFewRowsCols;
    fn(segments[static_cast<std::size_t>(task / blocks)], begin,
       std::min(kFewRowsCols, width - begin));
  });
}

/// The inner rows of a projection's adapter, for all segments; x by padded rows or not.
template <class T>
void few_rows_inner(Stream& stream, const FfnForward& args, const FfnLowRankPart& part,
                    ConstTensorView x, bool x_is_padded) {
  if (part.weights.empty()) return;
  parallel_tasks(stream, std::ssize(args.segments), [&](std::int64_t task, int) {
    const Segment& segment = args.segments[static_cast<std::size_t>(task)];
    low_rank_few_rows_inner<T>({part.weights, segment.local_expert_idx}, segment.rows,
                               x.row<T>(x_is_padded ? segment.padded_begin : segment.row_begin),
                               x.stride, part.inner.row<T>(segment.padded_begin));
  });
}

/// y, [rows, cols], gains an adapter's part of `rows` rows of a segment from `row` on.
template <class T>
void few_rows_add(const FfnLowRankPart& part, const Segment& segment, std::int64_t row,
                  std::int64_t rows, std::int64_t begin, std::int64_t cols, Acc<T>* y) {
  if (part.weights.empty()) return;
  low_rank_few_rows_add<T>({part.weights, segment.local_expert_idx}, rows,
                           part.inner.row<T>(segment.padded_begin + row), begin, cols, y,
                           kFewRowsCols);
}

/// act, columns [begin, begin + cols), of all rows of a segment.
template <class T>
void few_rows_act(const FfnForward& args, const Segment& segment, std::int64_t begin,
                  std::int64_t cols) {
  using A = Acc<T>;
  const std::int64_t hidden = args.shape.hidden_size;
  const T* gate_up = expert_weight<T>(args.weights.gate_up, args.weights, segment);
  FewRowsSums<A> gate;
  FewRowsSums<A> up;
  for (std::int64_t row = 0; row < segment.rows; row += kFewRowsGroup) {
    const std::int64_t rows = std::min(kFewRowsGroup, segment.rows - row);
    const T* x = args.x.row<T>(segment.row_begin + row);
    few_rows_product<T>(gate.data(), kFewRowsCols, x, args.x.stride, rows, gate_up + begin * hidden,
                        hidden, cols, hidden);
    few_rows_product<T>(up.data(), kFewRowsCols, x, args.x.stride, rows,
                        gate_up + (args.shape.ff_size + begin) * hidden, hidden, cols, hidden);
    few_rows_add<T>(args.low_rank.gate, segment, row, rows, begin, cols, gate.data());
    few_rows_add<T>(args.low_rank.up, segment, row, rows, begin, cols, up.data());
    for (std::int64_t r = 0; r < rows; ++r) {
      T* act = args.act.row<T>(segment.padded_begin + row + r) + begin;
      const A* g = gate.data() + r * kFewRowsCols;
      const A* u = up.data() + r * kFewRowsCols;
      for (std::int64_t c = 0; c < cols; ++c) store(act[c], g[c] * sigmoid(g[c]) * u[c]);
    }
  }
}

/// y, columns [begin, begin + cols), of all rows of a segment.
template <class T>
void few_rows_down(const FfnForward& args, const Segment& segment, std::int64_t begin,
                   std::int64_t cols) {
  using A = Acc<T>;
  const std::int64_t width = args.shape.ff_size;
  const T* down = expert_weight<T>(args.weights.down, args.weights, segment) + begin * width;
  FewRowsSums<A> sums;
  for (std::int64_t row = 0; row < segment.rows; row += kFewRowsGroup) {
    const std::int64_t rows = std::min(kFewRowsGroup, segment.rows - row);
    few_rows_product<T>(sums.data(), kFewRowsCols, args.act.row<T>(segment.padded_begin + row),
                        args.act.stride, rows, down, width, cols, width);
    few_rows_add<T>(args.low_rank.down, segment, row, rows, begin, cols, sums.data());
    for (std::int64_t r = 0; r < rows; ++r) {
      T* y = args.y.row<T>(segment.row_begin + row + r) + begin;
      for (std::int64_t c = 0; c < cols; ++c)
        store(y[c], sums[static_cast<std::size_t>(r * kFewRowsCols + c)]);
    }
  }
}

template <class T>
void forward_few_rows(Stream& stream, const FfnForward& args) {
  few_rows_inner<T>(stream, args, args.low_rank.gate, args.x, false);
  few_rows_inner<T>(stream, args, args.low_rank.up, args.x, false);
  for_each_block(stream, args.segments, args.shape.ff_size,
                 [&](const Segment& segment, std::int64_t begin, std::int64_t cols) {
                   few_rows_act<T>(args, segment, begin, cols);
                 });
  few_rows_inner<T>(stream, args, args.low_rank.down, args.act, true);
  for_each_block(stream, args.segments, args.shape.hidden_size,
                 [&](const Segment& segment, std::int64_t begin, std::int64_t cols) {
                   few_rows_down<T>(args, segment, begin, cols);
                 });
}

}  // namespace

void ffn_forward(Stream& stream, const FfnForward& args) {
  check_strides(args.weights, args.shape);
  if (args.few_rows) {
    return dispatch_compute(args.x.dtype, [&]<class T>() { forward_few_rows<T>(stream, args); });
  }
  dispatch_compute(args.x.dtype, [&]<class T>() {
    const auto tiles =
        make_row_tiles(stream, args.segments, ffn_tile_height(args.x.dtype, args.shape));
    parallel_tasks(stream, std::ssize(tiles), [&](std::int64_t task, int thread) {
      forward_tile<T>(stream, thread, args, tiles[static_cast<std::size_t>(task)]);
    });
  });
}

void ffn_backward(Stream& stream, const FfnBackward& args) {
  check_strides(args.weights, args.shape);
  ARCUS_CHECK(args.drow_weight.empty() || args.y.cols == args.shape.hidden_size,
              "gradients of row weights need y, [R, {}]", args.shape.hidden_size);
  dispatch_compute(args.dout.dtype, [&]<class T>() {
    const auto tiles =
        make_row_tiles(stream, args.segments, ffn_tile_height(args.dout.dtype, args.shape));
    parallel_tasks(stream, std::ssize(tiles), [&](std::int64_t task, int thread) {
      backward_tile<T>(stream, thread, args, tiles[static_cast<std::size_t>(task)]);
    });
  });
}

namespace {

enum class Projection : std::int32_t { gate, up, down };

/// One dW tile of one expert: all of its segments, one after the other.
struct WgradTask {
  std::int64_t work = 0;  ///< rows * tile rows * columns
  std::int32_t first_segment = 0, end_segment = 0;
  Projection projection = Projection::gate;
  std::int64_t begin = 0;
  std::int64_t tile_rows = 0;
};

std::int64_t out_of(Projection projection, const FfnShape& shape) {
  return projection == Projection::down ? shape.hidden_size : shape.ff_size;
}
std::int64_t in_of(Projection projection, const FfnShape& shape) {
  return projection == Projection::down ? shape.ff_size : shape.hidden_size;
}

/// Calls fn(first, end) for every run of segments of one expert.
template <class Fn>
void for_each_expert(std::span<const Segment> segments, Fn&& fn) {
  for (std::size_t first = 0; first < segments.size();) {
    std::size_t end = first;
    while (end < segments.size() &&
           segments[end].local_expert_idx == segments[first].local_expert_idx) {
      ++end;
    }
    fn(static_cast<std::int32_t>(first), static_cast<std::int32_t>(end));
    first = end;
  }
}

const GradientSum& sum_of(const FfnWgrad& args, Projection projection) {
  return projection == Projection::gate ? args.dgate
         : projection == Projection::up ? args.dup
                                        : args.ddown;
}

/// A projection without a sum (frozen) gets no tasks.
void append_tasks(const FfnWgrad& args, std::int32_t first, std::int32_t end, WgradTask*& next) {
  std::int64_t rows = 0;
  for (std::int32_t i = first; i < end; ++i)
    rows += args.segments[static_cast<std::size_t>(i)].rows;
  for (const Projection projection : {Projection::gate, Projection::up, Projection::down}) {
    if (sum_of(args, projection).sum == nullptr) continue;
    const std::int64_t out = out_of(projection, args.shape);
    const std::int64_t in = in_of(projection, args.shape);
    const std::int64_t height = wgrad_tile_rows(in);
    for (std::int64_t begin = 0; begin < out && rows > 0; begin += height) {
      const std::int64_t tile_rows = std::min(height, out - begin);
      *next++ = {rows * tile_rows * in, first, end, projection, begin, tile_rows};
    }
  }
}

/// The tasks of all experts, largest first, in the stream's scratch.
std::span<const WgradTask> make_wgrad_tasks(Stream& stream, const FfnWgrad& args) {
  std::int64_t most = 0;
  for (const Projection projection : {Projection::gate, Projection::up, Projection::down}) {
    most += out_of(projection, args.shape) / wgrad_tile_rows(in_of(projection, args.shape)) + 1;
  }
  auto* tasks = static_cast<WgradTask*>(stream.cpu().op_scratch(
      std::ssize(args.segments) * most * static_cast<std::int64_t>(sizeof(WgradTask))));
  WgradTask* next = tasks;
  for_each_expert(args.segments, [&](std::int32_t first, std::int32_t end) {
    append_tasks(args, first, end, next);
  });
  std::sort(tasks, next, [](const WgradTask& a, const WgradTask& b) {
    if (a.work != b.work) return a.work > b.work;
    if (a.first_segment != b.first_segment) return a.first_segment < b.first_segment;
    return a.projection != b.projection ? a.projection < b.projection : a.begin < b.begin;
  });
  return {tasks, next};
}

GradientSum expert_sum(const FfnWgrad& args, Projection projection, std::int64_t expert) {
  GradientSum sum = sum_of(args, projection).at(expert * args.expert_stride);
  sum.tensor_idx += expert * args.tensor_idx_stride;
  if (sum.stale != nullptr) sum.stale += expert * args.tensor_idx_stride;
  return sum;
}

/// How the first leaf of a task is written; `alone`: no other follows.
LeafWrite first_write(const GradientSum& sum, bool alone) {
  if (sum.stale == nullptr || *sum.stale == 0) return LeafWrite::add;
  return alone ? LeafWrite::stream : LeafWrite::store;
}

template <class T>
void run_wgrad_task(Stream& stream, int thread, const FfnWgrad& args, const WgradTask& task) {
  const std::int64_t width = args.shape.ff_size;
  bool first = true;
  for (std::int32_t i = task.first_segment; i < task.end_segment; ++i) {
    const Segment& segment = args.segments[static_cast<std::size_t>(i)];
    if (segment.rows == 0) continue;
    WgradTile tile{.dweight = expert_sum(args, task.projection, segment.local_expert_idx),
                   .begin = task.begin,
                   .tile_rows = task.tile_rows,
                   .in = in_of(task.projection, args.shape),
                   .rows = segment.rows,
                   .compute = dtype_of<T>(),
                   .micro_batch = segment.micro_batch};
    if (first) tile.write = first_write(tile.dweight, task.end_segment - task.first_segment == 1);
    first = false;
    if (task.projection == Projection::down) {
      tile.dy = args.dy.row<T>(segment.padded_begin);
      tile.dy_stride = args.dy.stride;
      tile.x = args.act.row<T>(segment.padded_begin);
      tile.x_stride = args.act.stride;
    } else {
      const std::int64_t column = task.projection == Projection::up ? width : 0;
      tile.dy = args.dgate_up.row<T>(segment.padded_begin) + column;
      tile.dy_stride = args.dgate_up.stride;
      tile.x = args.x.row<T>(segment.row_begin);
      tile.x_stride = args.x.stride;
    }
    run_wgrad_tile(stream.cpu(), thread, tile);
  }
}

/// What got a leaf holds this step's sum from now on.
void mark_written(const FfnWgrad& args) {
  for (const Segment& segment : args.segments) {
    if (segment.rows == 0) continue;
    for (const Projection projection : {Projection::gate, Projection::up, Projection::down}) {
      if (sum_of(args, projection).stale == nullptr) continue;
      *expert_sum(args, projection, segment.local_expert_idx).stale = 0;
    }
  }
}

}  // namespace

void ffn_wgrad(Stream& stream, const FfnWgrad& args) {
  for (const Segment& segment : args.segments) zero_padding(args.act, segment);
  dispatch_compute(args.x.dtype, [&]<class T>() {
    const auto tasks = make_wgrad_tasks(stream, args);
    parallel_tasks(stream, std::ssize(tasks), [&](std::int64_t task, int thread) {
      run_wgrad_task<T>(stream, thread, args, tasks[static_cast<std::size_t>(task)]);
    });
  });
  mark_written(args);
}

}  // namespace cpu
}  // namespace arcus
