#include "kernels/ffn.hpp"

#include <algorithm>
#include <array>

#include "kernels/cpu/activation.hpp"
#include "kernels/cpu/few_rows.hpp"
#include "kernels/cpu/gemm_tiles.hpp"
#include "kernels/cpu/low_rank.hpp"
#include "kernels/cpu/parallel.hpp"
#include "kernels/cpu/rows.hpp"
#include "kernels/cpu/segments.hpp"

namespace arcus {

std::int64_t ffn_row_stride(std::int64_t cols) { return cols; }

std::vector<GemmShape> ffn_gemm_shapes(const FfnShape& shape, DType compute, std::int64_t max_rows,
                                       bool training) {
  const std::int64_t hidden = shape.hidden_size;
  const std::int64_t width = shape.ff_size;
  GemmShape gate_up{.kind = GemmKind::forward,
                    .dtype = compute,
                    .result_dtype = compute,
                    .out = shape.gate_up_size(),
                    .in = hidden,
                    .x_stride = hidden,
                    .y_stride = ffn_row_stride(shape.gate_up_size()),
                    .max_rows = max_rows,
                    .bias = shape.bias};
  GemmShape down{.kind = GemmKind::forward,
                 .dtype = compute,
                 .result_dtype = compute,
                 .out = hidden,
                 .in = width,
                 .x_stride = ffn_row_stride(width),
                 .y_stride = hidden,
                 .max_rows = max_rows,
                 .bias = shape.bias};
  std::vector<GemmShape> shapes = {gate_up, down};
  if (!training) return shapes;
  gate_up.bias = down.bias = false;
  GemmShape dact = down;
  dact.kind = GemmKind::dgrad;
  dact.result_dtype = accumulate_dtype(compute);
  dact.y_stride = ffn_row_stride(hidden);
  dact.x_stride = width;
  GemmShape dx = gate_up;
  dx.kind = GemmKind::dgrad;
  GemmShape dgate = gate_up;  // dup is its twin, or all there is
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
  const std::int64_t first = shape.gate_up_size();
  return std::max({row_tile_height(compute, first, hidden), row_tile_height(compute, hidden, width),
                   row_tile_height(compute, width, hidden),
                   row_tile_height(compute, hidden, first)});
}

void check_weights(const FfnWeights& weights, const FfnShape& shape) {
  ARCUS_CHECK(weights.gate_up.rows == shape.gate_up_size() &&
                  weights.gate_up.cols == shape.hidden_size && weights.gate_up.contiguous() &&
                  weights.down.rows == shape.hidden_size && weights.down.cols == shape.ff_size &&
                  weights.down.contiguous(),
              "FFN of hidden size {} and width {}: gate_up [{}, {}], down [{}, {}]",
              shape.hidden_size, shape.ff_size, weights.gate_up.rows, weights.gate_up.cols,
              weights.down.rows, weights.down.cols);
  ARCUS_CHECK(weights.gate_up_bias.cols == (shape.bias ? shape.gate_up_size() : 0) &&
                  weights.down_bias.cols == (shape.bias ? shape.hidden_size : 0),
              "FFN {} biases, of {} and {} elements", shape.bias ? "with" : "without",
              weights.gate_up_bias.cols, weights.down_bias.cols);
}

template <class T>
const T* expert_weight(ConstTensorView weight, const FfnWeights& weights, const Segment& segment) {
  return weight.as<T>() + segment.local_expert_idx * weights.expert_stride;
}
/// Null without biases.
template <class A>
const A* expert_bias(ConstTensorView bias, const FfnWeights& weights, const Segment& segment) {
  return bias.empty() ? nullptr : bias.as<A>() + segment.local_expert_idx * weights.bias_stride;
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
  using A = Acc<T>;
  const Segment& segment = args.segments[static_cast<std::size_t>(tile.segment_idx)];
  const FfnShape& shape = args.shape;
  const std::int64_t row = segment.row_begin + tile.begin;
  const std::int64_t padded_row = segment.padded_begin + tile.begin;
  constexpr DType kType = dtype_of<T>();
  T* gate_up = args.gate_up.row<T>(padded_row);
  run_gemm_rows(stream.cpu(), thread,
                forward_key(kType, kType, shape.gate_up_size(), shape.hidden_size, args.x.stride,
                            args.gate_up.stride, shape.bias, false),
                tile.rows, args.x.row<T>(row),
                expert_weight<T>(args.weights.gate_up, args.weights, segment), gate_up,
                expert_bias<A>(args.weights.gate_up_bias, args.weights, segment));
  const auto add = [&](const FfnLowRankPart& part, const T* x, std::int64_t x_stride, T* y,
                       std::int64_t y_stride) {
    add_low_rank(stream, thread, part, segment.local_expert_idx, padded_row, tile.rows, x, x_stride,
                 y, y_stride);
  };
  add(args.low_rank.gate, args.x.row<T>(row), args.x.stride, gate_up, args.gate_up.stride);
  add(args.low_rank.up, args.x.row<T>(row), args.x.stride, gate_up + shape.up_begin(),
      args.gate_up.stride);
  for (std::int64_t i = padded_row; i < padded_row + tile.rows; ++i) {
    activation_row(shape.activation, args.act.row<T>(i), args.gate_up.row<T>(i), shape.ff_size);
  }
  run_gemm_rows(stream.cpu(), thread,
                forward_key(kType, kType, shape.hidden_size, shape.ff_size, args.act.stride,
                            args.y.stride, shape.bias, false),
                tile.rows, args.act.row<T>(padded_row),
                expert_weight<T>(args.weights.down, args.weights, segment), args.y.row<T>(row),
                expert_bias<A>(args.weights.down_bias, args.weights, segment));
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
    activation_backward_row(args.shape.activation, args.dgate_up.row<T>(padded_row + i),
                            dact + i * width, args.gate_up.row<T>(padded_row + i), width);
  }
  const T* dgate_up = args.dgate_up.row<T>(padded_row);
  run_gemm_rows(stream.cpu(), thread,
                dgrad_key(kType, kType, args.shape.gate_up_size(), hidden, args.dgate_up.stride,
                          args.dx.stride, false),
                tile.rows, dgate_up, expert_weight<T>(args.weights.gate_up, args.weights, segment),
                args.dx.row<T>(row));
  add(args.low_rank.gate, dgate_up, args.dgate_up.stride, args.dx.row<T>(row), args.dx.stride);
  add(args.low_rank.up, dgate_up + args.shape.up_begin(), args.dgate_up.stride, args.dx.row<T>(row),
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

/// sums [rows, cols] += bias [cols], where there is one.
template <class A>
void few_rows_bias(FewRowsSums<A>& sums, std::int64_t rows, std::int64_t cols, const A* bias) {
  for (std::int64_t r = 0; bias != nullptr && r < rows; ++r) {
    A* row = sums.data() + r * kFewRowsCols;
    for (std::int64_t c = 0; c < cols; ++c) row[c] += bias[c];
  }
}

/// sums [rows, cols] = the products of rows of a segment from `row` on by rows [begin, begin +
/// cols) of a projection that starts at row `first` of the first weight, with bias and adapter.
template <class T, class A = Acc<T>>
void few_rows_gate_up(const FfnForward& args, const Segment& segment, const FfnLowRankPart& adapter,
                      std::int64_t first, std::int64_t row, std::int64_t rows, std::int64_t begin,
                      std::int64_t cols, FewRowsSums<A>& sums) {
  const std::int64_t hidden = args.shape.hidden_size;
  const T* weight = expert_weight<T>(args.weights.gate_up, args.weights, segment);
  const A* bias = expert_bias<A>(args.weights.gate_up_bias, args.weights, segment);
  few_rows_product<T>(sums.data(), kFewRowsCols, args.x.row<T>(segment.row_begin + row),
                      args.x.stride, rows, weight + (first + begin) * hidden, hidden, cols, hidden);
  few_rows_bias(sums, rows, cols, bias == nullptr ? nullptr : bias + first + begin);
  few_rows_add<T>(adapter, segment, row, rows, begin, cols, sums.data());
}

template <class F, class T, class A = Acc<T>>
void store_pointwise(T* act, const A* up, std::int64_t cols) {
  for (std::int64_t c = 0; c < cols; ++c) store(act[c], F::value(up[c]));
}

/// act, columns [begin, begin + cols), of all rows of a segment.
template <class T>
void few_rows_act(const FfnForward& args, const Segment& segment, std::int64_t begin,
                  std::int64_t cols) {
  using A = Acc<T>;
  FewRowsSums<A> gate;
  FewRowsSums<A> up;
  for (std::int64_t row = 0; row < segment.rows; row += kFewRowsGroup) {
    const std::int64_t rows = std::min(kFewRowsGroup, segment.rows - row);
    if (args.shape.gated()) {
      few_rows_gate_up<T>(args, segment, args.low_rank.gate, 0, row, rows, begin, cols, gate);
    }
    few_rows_gate_up<T>(args, segment, args.low_rank.up, args.shape.up_begin(), row, rows, begin,
                        cols, up);
    for (std::int64_t r = 0; r < rows; ++r) {
      T* act = args.act.row<T>(segment.padded_begin + row + r) + begin;
      const A* g = gate.data() + r * kFewRowsCols;
      const A* u = up.data() + r * kFewRowsCols;
      switch (args.shape.activation) {
        case Activation::swiglu:
          for (std::int64_t c = 0; c < cols; ++c) store(act[c], g[c] * sigmoid(g[c]) * u[c]);
          break;
        case Activation::gelu_new:
          store_pointwise<GeluTanh>(act, u, cols);
          break;
        case Activation::gelu:
          store_pointwise<Gelu>(act, u, cols);
      }
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
  const A* bias = expert_bias<A>(args.weights.down_bias, args.weights, segment);
  FewRowsSums<A> sums;
  for (std::int64_t row = 0; row < segment.rows; row += kFewRowsGroup) {
    const std::int64_t rows = std::min(kFewRowsGroup, segment.rows - row);
    few_rows_product<T>(sums.data(), kFewRowsCols, args.act.row<T>(segment.padded_begin + row),
                        args.act.stride, rows, down, width, cols, width);
    few_rows_bias(sums, rows, cols, bias == nullptr ? nullptr : bias + begin);
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
  check_weights(args.weights, args.shape);
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
  check_weights(args.weights, args.shape);
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

}  // namespace cpu
}  // namespace arcus
