#include <algorithm>

#include "kernels/cpu/column_leaf.hpp"
#include "kernels/cpu/gemm_tiles.hpp"
#include "kernels/cpu/parallel.hpp"
#include "kernels/cpu/segments.hpp"
#include "kernels/ffn.hpp"

namespace arcus::cpu {
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

/// First column of the gradients of gate or up in dgate_up.
std::int64_t column_of(Projection projection, const FfnShape& shape) {
  return projection == Projection::up ? shape.up_begin() : 0;
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

const GradientSum& bias_sum_of(const FfnWgrad& args, Projection projection) {
  return projection == Projection::gate ? args.dgate_bias
         : projection == Projection::up ? args.dup_bias
                                        : args.ddown_bias;
}

/// A projection without a sum (frozen, or not there) gets no tasks.
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
      const std::int64_t column = column_of(task.projection, args.shape);
      tile.dy = args.dgate_up.row<T>(segment.padded_begin) + column;
      tile.dy_stride = args.dgate_up.stride;
      tile.x = args.x.row<T>(segment.row_begin);
      tile.x_stride = args.x.stride;
    }
    run_wgrad_tile(stream.cpu(), thread, tile);
  }
}

/// The leaves of the biases of one projection: a task is a chunk of one expert's columns, its
/// segments in order.
template <class T>
void add_bias_leaves(Stream& stream, const FfnWgrad& args) {
  if (args.segments.empty()) return;
  const std::int64_t experts = args.segments.back().local_expert_idx + 1;
  for (const Projection projection : {Projection::gate, Projection::up, Projection::down}) {
    const GradientSum& sum = bias_sum_of(args, projection);
    if (sum.sum == nullptr) continue;
    const bool down = projection == Projection::down;
    const std::int64_t out = out_of(projection, args.shape);
    const ConstTensorView dy =
        (down ? args.dy : args.dgate_up).col_range(column_of(projection, args.shape), out);
    const std::int64_t chunks = (out + kColumnChunk - 1) / kColumnChunk;
    parallel_tasks(stream, experts * chunks, [&](std::int64_t task, int) {
      const std::int64_t expert = task / chunks;
      const std::int64_t begin = task % chunks * kColumnChunk;
      GradientSum target = sum.at(expert * args.bias_stride);
      target.tensor_idx += expert * args.tensor_idx_stride;
      for (const Segment& segment : args.segments) {
        if (segment.local_expert_idx != expert || segment.rows == 0) continue;
        add_column_leaf<T>(target, dy.row_range(segment.padded_begin, segment.rows), begin,
                           std::min(kColumnChunk, out - begin), segment.micro_batch);
      }
    });
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
  dispatch_compute(args.x.dtype, [&]<class T>() { add_bias_leaves<T>(stream, args); });
}

}  // namespace arcus::cpu
