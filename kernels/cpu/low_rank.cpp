#include "kernels/cpu/low_rank.hpp"

#include <algorithm>
#include <cstring>

#include "kernels/cpu/gemm_tiles.hpp"
#include "kernels/cpu/parallel.hpp"
#include "kernels/cpu/rows.hpp"

namespace arcus {

std::vector<GemmShape> low_rank_gemm_shapes(const LowRankShape& s, bool training) {
  const auto shape = [&](GemmKind kind, std::int64_t out, std::int64_t in, std::int64_t x_stride,
                         std::int64_t y_stride, bool accumulate = false) {
    return GemmShape{.kind = kind,
                     .dtype = s.compute,
                     .result_dtype = s.compute,
                     .out = out,
                     .in = in,
                     .x_stride = x_stride,
                     .y_stride = y_stride,
                     .min_rows = s.min_rows,
                     .max_rows = s.max_rows,
                     .accumulate = accumulate};
  };
  const std::int64_t r = s.rank;
  std::vector<GemmShape> shapes = {shape(GemmKind::forward, r, s.in, s.x_stride, r),
                                   shape(GemmKind::forward, s.out, r, r, s.y_stride, true)};
  if (!training) return shapes;
  shapes.push_back(shape(GemmKind::dgrad, s.out, r, r, s.y_stride));
  shapes.push_back(shape(GemmKind::dgrad, r, s.in, s.x_stride, r, true));
  shapes.back().result_dtype = s.dx_type;
  shapes.push_back(shape(GemmKind::ffn_wgrad, r, s.in, s.x_stride, r));
  shapes.push_back(shape(GemmKind::ffn_wgrad, s.out, r, r, s.y_stride));
  return shapes;
}

namespace cpu {
namespace {

template <class T>
void scale_in_place(T* values, std::int64_t count, Acc<T> scale) {
  if (scale == Acc<T>(1)) return;
  for (std::int64_t i = 0; i < count; ++i) {
    store(values[i], scale * static_cast<Acc<T>>(values[i]));
  }
}

}  // namespace

template <class T>
void low_rank_forward_tile(Context& context, int thread, const LowRankOfExpert<T>& w,
                           std::int64_t rows, const T* x, std::int64_t x_stride, T* u, T* y,
                           std::int64_t y_stride) {
  constexpr DType kType = dtype_of<T>();
  run_gemm_rows(context, thread,
                forward_key(kType, kType, w.rank, w.in, x_stride, w.rank, false, false), rows, x,
                w.a, u);
  scale_in_place(u, rows * w.rank, w.scale);
  run_gemm_rows(context, thread,
                forward_key(kType, kType, w.out, w.rank, w.rank, y_stride, false, true), rows, u,
                w.b, y);
}

template <class T, class D>
void low_rank_backward_tile(Context& context, int thread, const LowRankOfExpert<T>& w,
                            std::int64_t rows, const T* dy, std::int64_t dy_stride, T* v, D* dx,
                            std::int64_t dx_stride) {
  constexpr DType kType = dtype_of<T>();
  run_gemm_rows(context, thread, dgrad_key(kType, kType, w.out, w.rank, dy_stride, w.rank, false),
                rows, dy, w.b, v);
  scale_in_place(v, rows * w.rank, w.scale);
  run_gemm_rows(context, thread,
                dgrad_key(kType, dtype_of<D>(), w.rank, w.in, w.rank, dx_stride, true), rows, v,
                w.a, dx);
}

template <class T>
void low_rank_few_rows_inner(const LowRankOfExpert<T>& w, std::int64_t rows, const T* x,
                             std::int64_t x_stride, T* u) {
  for (std::int64_t begin = 0; begin < w.rank; begin += kFewRowsCols) {
    const std::int64_t cols = std::min(kFewRowsCols, w.rank - begin);
    for_few_rows(x, x_stride, rows, w.a + begin * w.in, cols, w.in,
                 [&](std::int64_t row, const Acc<T>* sums) {
                   T* to = u + row * w.rank + begin;
                   for (std::int64_t c = 0; c < cols; ++c) store(to[c], w.scale * sums[c]);
                 });
  }
}

template <class T>
void low_rank_few_rows_add(const LowRankOfExpert<T>& w, std::int64_t rows, const T* u,
                           std::int64_t begin, std::int64_t cols, Acc<T>* y,
                           std::int64_t y_stride) {
  for_few_rows(u, w.rank, rows, w.b + begin * w.rank, cols, w.rank,
               [&](std::int64_t row, const Acc<T>* sums) {
                 Acc<T>* to = y + row * y_stride;
                 for (std::int64_t c = 0; c < cols; ++c) to[c] += sums[c];
               });
}

#define ARCUS_INSTANTIATE(T)                                                                     \
  template void low_rank_forward_tile<T>(Context&, int, const LowRankOfExpert<T>&, std::int64_t, \
                                         const T*, std::int64_t, T*, T*, std::int64_t);          \
  template void low_rank_backward_tile<T, T>(Context&, int, const LowRankOfExpert<T>&,           \
                                             std::int64_t, const T*, std::int64_t, T*, T*,       \
                                             std::int64_t);                                      \
  template void low_rank_few_rows_inner<T>(const LowRankOfExpert<T>&, std::int64_t, const T*,    \
                                           std::int64_t, T*);                                    \
  template void low_rank_few_rows_add<T>(const LowRankOfExpert<T>&, std::int64_t, const T*,      \
                                         std::int64_t, std::int64_t, Acc<T>*, std::int64_t);
ARCUS_INSTANTIATE(float)
ARCUS_INSTANTIATE(bf16)
ARCUS_INSTANTIATE(double)
#undef ARCUS_INSTANTIATE
template void low_rank_backward_tile<bf16, float>(Context&, int, const LowRankOfExpert<bf16>&,
                                                  std::int64_t, const bf16*, std::int64_t, bf16*,
                                                  float*, std::int64_t);

namespace {

void check_shapes(const LowRankWeights& weights, ConstTensorView y, ConstTensorView inner,
                  ConstTensorView x) {
  const std::int64_t rank = weights.a.rows;
  ARCUS_CHECK(weights.b.cols == rank && inner.cols == rank && inner.contiguous() &&
                  x.cols == weights.a.cols && y.cols == weights.b.rows && x.rows == y.rows &&
                  inner.rows == y.rows,
              "adapter: y [{}, {}], inner rows [{}, {}], x [{}, {}], A [{}, {}], B [{}, {}]",
              y.rows, y.cols, inner.rows, inner.cols, x.rows, x.cols, weights.a.rows,
              weights.a.cols, weights.b.rows, weights.b.cols);
}

/// fn(begin, rows, thread) for row tiles of a micro-batch, whole ones of both products.
template <class Fn>
void for_row_tiles(Stream& stream, DType compute, const LowRankWeights& weights, std::int64_t rows,
                   Fn&& fn) {
  const std::int64_t rank = weights.a.rows;
  const auto tile_rows = [&](std::int64_t n, std::int64_t k) {
    return linear_tile_rows({.ab_dtype = compute, .n = n, .k = k}, rows);
  };
  const std::int64_t height =
      std::max({tile_rows(rank, weights.a.cols), tile_rows(weights.a.cols, rank),
                tile_rows(weights.b.rows, rank), tile_rows(rank, weights.b.rows)});
  parallel_tasks(stream, (rows + height - 1) / height, [&](std::int64_t tile, int thread) {
    fn(tile * height, std::min(height, rows - tile * height), thread);
  });
}

template <class T>
void forward_few_rows(Stream& stream, const LowRankForward& args) {
  const LowRankOfExpert<T> weights(args.weights, 0);
  const std::int64_t rows = args.y.rows;
  low_rank_few_rows_inner(weights, rows, args.x.as<T>(), args.x.stride, args.u.as<T>());
  parallel_tasks(
      stream, (weights.out + kFewRowsCols - 1) / kFewRowsCols, [&](std::int64_t task, int) {
        const std::int64_t begin = task * kFewRowsCols;
        const std::int64_t cols = std::min(kFewRowsCols, weights.out - begin);
        for_few_rows(args.u.as<T>(), weights.rank, rows, weights.b + begin * weights.rank, cols,
                     weights.rank, [&](std::int64_t row, const Acc<T>* sums) {
                       T* y = args.y.row<T>(row) + begin;
                       for (std::int64_t c = 0; c < cols; ++c) {
                         store(y[c], static_cast<Acc<T>>(y[c]) + sums[c]);
                       }
                     });
      });
}

}  // namespace

void low_rank_forward(Stream& stream, const LowRankForward& args) {
  check_shapes(args.weights, args.y, args.u, args.x);
  if (args.y.empty()) return;
  dispatch_compute(args.x.dtype, [&]<class T>() {
    if (args.few_rows) return forward_few_rows<T>(stream, args);
    const LowRankOfExpert<T> weights(args.weights, 0);
    for_row_tiles(stream, args.x.dtype, args.weights, args.y.rows,
                  [&](std::int64_t begin, std::int64_t rows, int thread) {
                    low_rank_forward_tile<T>(
                        stream.cpu(), thread, weights, rows, args.x.row<T>(begin), args.x.stride,
                        args.u.row<T>(begin), args.y.row<T>(begin), args.y.stride);
                  });
  });
}

void low_rank_backward(Stream& stream, const LowRankBackward& args) {
  check_shapes(args.weights, args.dy, args.v, args.dx);
  if (args.dx.empty()) return;
  dispatch_compute(args.dy.dtype, [&]<class T>() {
    const LowRankOfExpert<T> weights(args.weights, 0);
    for_row_tiles(stream, args.dy.dtype, args.weights, args.dy.rows,
                  [&](std::int64_t begin, std::int64_t rows, int thread) {
                    low_rank_backward_tile<T, T>(
                        stream.cpu(), thread, weights, rows, args.dy.row<T>(begin), args.dy.stride,
                        args.v.row<T>(begin), args.dx.row<T>(begin), args.dx.stride);
                  });
  });
}

namespace {

/// One dW tile of A or B of one expert: all of its segments, one after the other.
struct WgradTask {
  bool of_a = false;
  std::int32_t first_segment = 0, end_segment = 0;
  std::int64_t begin = 0;
  std::int64_t tile_rows = 0;
};

const GradientSum& sum_of(const LowRankWgrad& args, bool of_a) { return of_a ? args.da : args.db; }
std::int64_t out_of(const LowRankWgrad& args, bool of_a) {
  return of_a ? args.v.cols : args.dy.cols;
}
std::int64_t in_of(const LowRankWgrad& args, bool of_a) { return of_a ? args.x.cols : args.u.cols; }

/// The tasks of all experts, in the stream's scratch.
std::span<const WgradTask> make_tasks(Stream& stream, const LowRankWgrad& args) {
  std::int64_t most = 0;
  for (const bool of_a : {true, false}) {
    most += out_of(args, of_a) / wgrad_tile_rows(in_of(args, of_a)) + 1;
  }
  auto* tasks = static_cast<WgradTask*>(stream.cpu().op_scratch(
      std::ssize(args.segments) * most * static_cast<std::int64_t>(sizeof(WgradTask))));
  WgradTask* next = tasks;
  for (std::size_t first = 0, end = 0; first < args.segments.size(); first = end) {
    const std::int32_t expert = args.segments[first].local_expert_idx;
    while (end < args.segments.size() && args.segments[end].local_expert_idx == expert) ++end;
    for (const bool of_a : {true, false}) {
      if (sum_of(args, of_a).sum == nullptr) continue;
      const std::int64_t out = out_of(args, of_a);
      const std::int64_t height = wgrad_tile_rows(in_of(args, of_a));
      for (std::int64_t begin = 0; begin < out; begin += height) {
        *next++ = {of_a, static_cast<std::int32_t>(first), static_cast<std::int32_t>(end), begin,
                   std::min(height, out - begin)};
      }
    }
  }
  return {tasks, next};
}

template <class T>
void run_task(Stream& stream, int thread, const LowRankWgrad& args, const WgradTask& task) {
  for (std::int32_t i = task.first_segment; i < task.end_segment; ++i) {
    const Segment& segment = args.segments[static_cast<std::size_t>(i)];
    if (segment.rows == 0) continue;
    const std::int64_t expert = segment.local_expert_idx;
    WgradTile tile{.dweight = sum_of(args, task.of_a).at(expert * args.expert_stride),
                   .begin = task.begin,
                   .tile_rows = task.tile_rows,
                   .in = in_of(args, task.of_a),
                   .rows = segment.rows,
                   .compute = dtype_of<T>(),
                   .micro_batch = segment.micro_batch};
    tile.dweight.tensor_idx += expert * args.tensor_idx_stride;
    const ConstTensorView dy = task.of_a ? args.v : args.dy;
    const ConstTensorView x = task.of_a ? args.x : args.u;
    const bool x_is_padded = !task.of_a || args.x_is_padded;
    tile.dy = dy.row<T>(segment.padded_begin);
    tile.dy_stride = dy.stride;
    tile.x = x.row<T>(x_is_padded ? segment.padded_begin : segment.row_begin);
    tile.x_stride = x.stride;
    run_wgrad_tile(stream.cpu(), thread, tile);
  }
}

}  // namespace

void low_rank_wgrad(Stream& stream, const LowRankWgrad& args) {
  ARCUS_CHECK(args.u.cols == args.v.cols && args.u.contiguous() && args.v.contiguous() &&
                  args.da.stale == nullptr && args.db.stale == nullptr,
              "adapter gradients: u [{}, {}], v [{}, {}]", args.u.rows, args.u.cols, args.v.rows,
              args.v.cols);
  for (const Segment& segment : args.segments) {
    const std::int64_t padding = padded_rows(segment.rows) - segment.rows;
    if (padding == 0) continue;
    std::memset(args.u.row_range(segment.padded_begin + segment.rows, padding).data, 0,
                static_cast<std::size_t>(padding * args.u.cols) * size_of(args.u.dtype));
  }
  dispatch_compute(args.dy.dtype, [&]<class T>() {
    const auto tasks = make_tasks(stream, args);
    parallel_tasks(stream, std::ssize(tasks), [&](std::int64_t task, int thread) {
      run_task<T>(stream, thread, args, tasks[static_cast<std::size_t>(task)]);
    });
  });
}

}  // namespace cpu
}  // namespace arcus
