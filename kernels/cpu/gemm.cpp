#include "kernels/gemm.hpp"

#include <algorithm>
#include <array>
#include <chrono>

#include "kernels/cpu/column_leaf.hpp"
#include "kernels/cpu/context.hpp"
#include "kernels/cpu/few_rows.hpp"
#include "kernels/cpu/gemm_tiles.hpp"
#include "kernels/cpu/leaf.hpp"
#include "kernels/cpu/parallel.hpp"
#include "kernels/cpu/rows.hpp"
#include "kernels/cpu/transpose.hpp"

namespace arcus {

PrimitiveReport build_primitives(Stream& stream, std::span<const GemmShape> shapes) {
  return cpu::build_gemm_shapes(stream, shapes);
}
void let_row_bits_differ(Stream& stream) { stream.cpu().let_row_bits_differ(); }
std::int64_t late_primitives(Stream& stream) { return stream.cpu().gemm().late_primitives(); }

namespace cpu {
namespace {

constexpr std::int64_t kTallestTile = 256;

}  // namespace

/// Micro-batches of up to 512 rows are cut finer, so that a few threads find work; a rule of the
/// problem's own shape.
std::int64_t linear_tile_rows(const GemmKey& key, std::int64_t rows) {
  const std::int64_t height = row_tile_height(key.ab_dtype, key.n, key.k);
  return rows <= 2 * kTallestTile ? std::min(height, kTallestTile / 2) : height;
}

namespace {

std::int64_t bytes_of(DType dtype, std::int64_t elements) {
  return elements * static_cast<std::int64_t>(size_of(dtype));
}
const void* row_of(ConstTensorView view, std::int64_t row) { return view.row_range(row, 1).data; }
void* row_of(TensorView view, std::int64_t row) { return view.row_range(row, 1).data; }

void run_row_tiles(Stream& stream, const GemmKey& key, ConstTensorView a, const void* b,
                   TensorView c, const void* bias) {
  if (c.empty()) return;
  const std::int64_t height = linear_tile_rows(key, c.rows);
  parallel_tasks(stream, (c.rows + height - 1) / height, [&](std::int64_t tile, int thread) {
    const std::int64_t begin = tile * height;
    run_gemm_rows(stream.cpu(), thread, key, std::min(height, c.rows - begin), row_of(a, begin), b,
                  row_of(c, begin), bias);
  });
}

/// The K-major operand of a weight gradient: columns of dy as rows, zero up to `padded` columns.
void transpose_operand(DType dtype, void* to, std::int64_t padded, const void* from,
                       std::int64_t stride, std::int64_t rows, std::int64_t cols) {
  const auto run = [&]<class U>() {
    transpose_padded(static_cast<U*>(to), padded, static_cast<const U*>(from), stride, rows, cols);
  };
  switch (size_of(dtype)) {
    case 2:
      return run.template operator()<std::uint16_t>();
    case 4:
      return run.template operator()<std::uint32_t>();
    default:
      return run.template operator()<std::uint64_t>();
  }
}

GemmKey wgrad_key(DType compute, std::int64_t tile_rows, std::int64_t in, std::int64_t rows,
                  std::int64_t x_stride, bool accumulate) {
  const std::int64_t k = padded_rows(rows);
  return {.ab_dtype = compute,
          .c_dtype = accumulate_dtype(compute),
          .accumulate = accumulate,
          .m = tile_rows,
          .n = in,
          .k = k,
          .lda = k,
          .ldb = x_stride,
          .ldc = in};
}

std::int64_t round_to_line(std::int64_t bytes) { return (bytes + 127) / 128 * 128; }

}  // namespace

GemmKey forward_key(DType compute, DType result, std::int64_t out, std::int64_t in,
                    std::int64_t x_stride, std::int64_t y_stride, bool bias, bool accumulate) {
  return {.ab_dtype = compute,
          .c_dtype = result,
          .transpose_b = true,
          .accumulate = accumulate,
          .bias = bias,
          .n = out,
          .k = in,
          .lda = x_stride,
          .ldb = in,
          .ldc = y_stride};
}

GemmKey dgrad_key(DType compute, DType result, std::int64_t out, std::int64_t in,
                  std::int64_t dy_stride, std::int64_t dx_stride, bool accumulate) {
  return {.ab_dtype = compute,
          .c_dtype = result,
          .accumulate = accumulate,
          .n = in,
          .k = out,
          .lda = dy_stride,
          .ldb = in,
          .ldc = dx_stride};
}

namespace {

template <class T, class Y>
void linear_few_rows_block(const Linear& args, std::int64_t begin, std::int64_t cols) {
  using A = Acc<T>;
  for_few_rows(args.x.as<T>(), args.x.stride, args.x.rows, args.weight.row<T>(begin), cols,
               args.weight.cols, [&](std::int64_t row, const A* sums) {
                 Y* y = args.y.row<Y>(row) + begin;
                 for (std::int64_t c = 0; c < cols; ++c) {
                   store(y[c], sums[c] + (args.bias.empty() ? A(0) : args.bias.as<A>()[begin + c]));
                 }
               });
}

void linear_few_rows(Stream& stream, const Linear& args) {
  ARCUS_CHECK(!args.accumulate, "linear: few rows are not added to what is there");
  const std::int64_t out = args.weight.rows;
  if (args.y.empty()) return;
  dispatch_compute(args.x.dtype, [&]<class T>() {
    parallel_tasks(stream, (out + kFewRowsCols - 1) / kFewRowsCols, [&](std::int64_t task, int) {
      const std::int64_t begin = task * kFewRowsCols;
      const std::int64_t cols = std::min(kFewRowsCols, out - begin);
      if (args.y.dtype == dtype_of<T>()) {
        linear_few_rows_block<T, T>(args, begin, cols);
      } else {
        linear_few_rows_block<T, Acc<T>>(args, begin, cols);
      }
    });
  });
}

}  // namespace

void linear_forward(Stream& stream, const Linear& args) {
  const std::int64_t out = args.weight.rows;
  const std::int64_t in = args.weight.cols;
  ARCUS_CHECK(args.x.cols == in && args.y.cols == out && args.x.rows == args.y.rows,
              "linear: y [{}, {}], x [{}, {}], weight [{}, {}]", args.y.rows, args.y.cols,
              args.x.rows, args.x.cols, out, in);
  if (args.few_rows) return linear_few_rows(stream, args);
  const GemmKey key = forward_key(args.x.dtype, args.y.dtype, out, in, args.x.stride, args.y.stride,
                                  !args.bias.empty(), args.accumulate);
  run_row_tiles(stream, key, args.x, args.weight.data, args.y, args.bias.data);
}

void linear_dgrad(Stream& stream, const LinearDgrad& args) {
  const std::int64_t out = args.weight.rows;
  const std::int64_t in = args.weight.cols;
  ARCUS_CHECK(args.dy.cols == out && args.dx.cols == in && args.dx.rows == args.dy.rows,
              "dgrad: dx [{}, {}], dy [{}, {}], weight [{}, {}]", args.dx.rows, args.dx.cols,
              args.dy.rows, args.dy.cols, out, in);
  const GemmKey key = dgrad_key(args.dy.dtype, args.dx.dtype, out, in, args.dy.stride,
                                args.dx.stride, args.accumulate);
  run_row_tiles(stream, key, args.dy, args.weight.data, args.dx, nullptr);
}

std::int64_t wgrad_scratch_bytes(DType compute, std::int64_t in, std::int64_t rows) {
  const std::int64_t tile_rows = wgrad_tile_rows(in);
  return round_to_line(bytes_of(compute, tile_rows * padded_rows(rows))) +
         bytes_of(accumulate_dtype(compute), tile_rows * in);
}

void run_wgrad_tile(Context& context, int thread, const WgradTile& tile) {
  const std::int64_t k = padded_rows(tile.rows);
  auto* operand = static_cast<char*>(
      context.scratch(thread, wgrad_scratch_bytes(tile.compute, tile.in, tile.rows)));
  const auto* dy = static_cast<const char*>(tile.dy) + bytes_of(tile.compute, tile.begin);
  transpose_operand(tile.compute, operand, k, dy, tile.dy_stride, tile.rows, tile.tile_rows);
  const GradientSum target = tile.dweight.at(tile.begin * tile.in);
  // Plain sums take the product as it comes; only integer sums need the leaf by itself.
  const bool plain = target.dtype == accumulate_dtype(tile.compute);
  const GemmKey key = wgrad_key(tile.compute, tile.tile_rows, tile.in, tile.rows, tile.x_stride,
                                plain && tile.write == LeafWrite::add);
  if (plain) return run_gemm(context, thread, key, operand, tile.x, target.sum);
  ARCUS_CHECK(target.dtype == DType::i64 && tile.compute != DType::f64,
              "no gradient sums of {} for {} products", name_of(target.dtype),
              name_of(tile.compute));
  auto* leaf = reinterpret_cast<float*>(
      operand + round_to_line(bytes_of(tile.compute, wgrad_tile_rows(tile.in) * k)));
  run_gemm(context, thread, key, operand, tile.x, leaf);
  const ThreadTimer timer(context.profile() == nullptr ? nullptr
                                                       : &context.profile()->work(thread).sums);
  add_leaf_rows(target, tile.in, leaf, tile.in, tile.tile_rows, tile.in, tile.micro_batch,
                tile.write);
}

void linear_wgrad(Stream& stream, const LinearWgrad& args) {
  const std::int64_t out = args.dy.cols;
  const std::int64_t in = args.x.cols;
  ARCUS_CHECK(args.dy.rows == args.x.rows && args.dy.dtype == args.x.dtype,
              "wgrad: dy [{}, {}] {}, x [{}, {}] {}", args.dy.rows, out, name_of(args.dy.dtype),
              args.x.rows, in, name_of(args.x.dtype));
  if (args.x.rows == 0) return;
  const std::int64_t height = linear_wgrad_tile_rows(out, in);
  std::uint8_t* stale = args.dweight.stale;
  const LeafWrite write = stale != nullptr && *stale != 0 ? LeafWrite::stream : LeafWrite::add;
  parallel_tasks(stream, (out + height - 1) / height, [&](std::int64_t tile, int thread) {
    const std::int64_t begin = tile * height;
    run_wgrad_tile(stream.cpu(), thread,
                   {.dweight = args.dweight,
                    .begin = begin,
                    .tile_rows = std::min(height, out - begin),
                    .in = in,
                    .dy = args.dy.data,
                    .dy_stride = args.dy.stride,
                    .x = args.x.data,
                    .x_stride = args.x.stride,
                    .rows = args.x.rows,
                    .compute = args.x.dtype,
                    .micro_batch = args.micro_batch,
                    .write = write});
  });
  if (stale != nullptr) *stale = 0;
}

void bias_grad(Stream& stream, const BiasGrad& args) {
  if (args.dy.rows == 0) return;
  const std::int64_t out = args.dy.cols;
  dispatch_compute(args.dy.dtype, [&]<class T>() {
    parallel_tasks(stream, (out + kColumnChunk - 1) / kColumnChunk, [&](std::int64_t chunk, int) {
      const std::int64_t begin = chunk * kColumnChunk;
      add_column_leaf<T>(args.dbias, args.dy, begin, std::min(kColumnChunk, out - begin),
                         args.micro_batch);
    });
  });
}

namespace {

/// Every number of rows a tile of this product can have when problems have min_rows..max_rows rows:
/// with tiles of `heights` rows and their tails.
void build_row_tiles(Context& context, const GemmKey& key, std::int64_t min_rows,
                     std::int64_t max_rows) {
  if (max_rows < 1) return;
  std::array<bool, kTallestTile + 1> wanted{};
  const std::int64_t height = row_tile_height(key.ab_dtype, key.n, key.k);
  // Beyond two tiles every tail has been seen.
  const std::int64_t last =
      std::min(max_rows, std::max<std::int64_t>(min_rows, 1) + 4 * kTallestTile);
  for (std::int64_t rows = std::max<std::int64_t>(min_rows, 1); rows <= last; ++rows) {
    for (const std::int64_t tile : {height, linear_tile_rows(key, rows)}) {
      if (rows >= tile) wanted[static_cast<std::size_t>(tile)] = true;
      wanted[static_cast<std::size_t>(rows % tile)] = true;
    }
  }
  for (std::int64_t rows = 1; rows <= kTallestTile; ++rows) {
    if (wanted[static_cast<std::size_t>(rows)]) build_gemm_tile(context, key, rows);
  }
}

void build_wgrad(Context& context, const GemmShape& shape) {
  const std::int64_t height = shape.kind == GemmKind::ffn_wgrad
                                  ? wgrad_tile_rows(shape.in)
                                  : linear_wgrad_tile_rows(shape.out, shape.in);
  for (std::int64_t k = padded_rows(std::max<std::int64_t>(shape.min_rows, 1));
       k <= padded_rows(shape.max_rows); k += kWgradRowPadding) {
    for (const std::int64_t rows : {std::min(height, shape.out), shape.out % height}) {
      if (rows == 0) continue;
      for (const bool accumulate : {false, true}) {
        build_gemm(context, wgrad_key(shape.dtype, rows, shape.in, k, shape.x_stride, accumulate));
      }
    }
  }
  context.reserve_scratch(wgrad_scratch_bytes(shape.dtype, shape.in, shape.max_rows));
}

void build_shape(Context& context, const GemmShape& shape) {
  switch (shape.kind) {
    case GemmKind::forward:
      return build_row_tiles(
          context,
          forward_key(shape.dtype, shape.result_dtype, shape.out, shape.in, shape.x_stride,
                      shape.y_stride, shape.bias, shape.accumulate),
          shape.min_rows, shape.max_rows);
    case GemmKind::dgrad:
      // The FFN keeps the result of its first dgrad in scratch.
      context.reserve_scratch(bytes_of(shape.result_dtype, kTallestTile * shape.in));
      return build_row_tiles(context,
                             dgrad_key(shape.dtype, shape.result_dtype, shape.out, shape.in,
                                       shape.y_stride, shape.x_stride, shape.accumulate),
                             shape.min_rows, shape.max_rows);
    case GemmKind::wgrad:
    case GemmKind::ffn_wgrad:
      return build_wgrad(context, shape);
  }
}

}  // namespace

PrimitiveReport build_gemm_shapes(Stream& stream, std::span<const GemmShape> shapes) {
  Context& context = stream.cpu();
  const auto start = std::chrono::steady_clock::now();
  const std::int64_t before = context.gemm().num_primitives();
  for (const GemmShape& shape : shapes) build_shape(context, shape);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return {.primitives = context.gemm().num_primitives() - before,
          .bytes = context.gemm().scratch_bytes() + context.num_threads() * context.scratch_bytes(),
          .seconds = seconds.count()};
}

}  // namespace cpu
}  // namespace arcus
