#include "kernels/elementwise.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "kernels/cpu/math.hpp"
#include "kernels/cpu/parallel.hpp"
#include "kernels/cpu/rows.hpp"

namespace arcus::cpu {
namespace {

constexpr std::int64_t kRowGrain = 16;
constexpr std::int64_t kElementGrain = 1 << 14;
constexpr std::int64_t kColumnChunk = 512;  ///< columns whose sums stand on the stack

/// fn(row, first column, columns) over a [rows, cols] matrix on the stream's threads; a contiguous
/// one is cut as a single row, so that a long vector is shared out too.
template <class Fn>
void parallel_pieces(Stream& stream, const ConstTensorView& shape, bool contiguous, Fn&& fn) {
  if (contiguous) {
    parallel_rows(stream, shape.size(), kElementGrain,
                  [&](std::int64_t begin, std::int64_t end, int) { fn(0, begin, end - begin); });
  } else {
    parallel_rows(stream, shape.cols > 0 ? shape.rows : 0, kRowGrain,
                  [&](std::int64_t begin, std::int64_t end, int) {
                    for (std::int64_t t = begin; t < end; ++t) fn(t, 0, shape.cols);
                  });
  }
}

void check_same_shape(const char* op, const ConstTensorView& a, const ConstTensorView& b) {
  ARCUS_CHECK(a.rows == b.rows && a.cols == b.cols, "{}: shapes {} x {} and {} x {} differ", op,
              a.rows, a.cols, b.rows, b.cols);
}

/// fn.operator()<U>() with U the type of `dtype`: the compute type T or its accumulate type.
template <class T, class Fn>
void dispatch_addend(DType dtype, Fn&& fn) {
  if (dtype == dtype_of<T>()) {
    fn.template operator()<T>();
  } else {
    ARCUS_CHECK(dtype == dtype_of<Acc<T>>(), "an addend of {} to a result of {}", name_of(dtype),
                name_of(dtype_of<T>()));
    fn.template operator()<Acc<T>>();
  }
}

template <class T, class U, class V>
void add_pieces(Stream& stream, const Add& args) {
  using A = Acc<T>;
  const bool contiguous = args.y.contiguous() && args.a.contiguous() && args.b.contiguous();
  parallel_pieces(stream, args.y, contiguous,
                  [&](std::int64_t row, std::int64_t first, std::int64_t count) {
                    T* y = args.y.row<T>(row) + first;
                    const U* a = args.a.row<U>(row) + first;
                    const V* b = args.b.row<V>(row) + first;
#pragma omp simd
                    for (std::int64_t i = 0; i < count; ++i) {
                      store(y[i], static_cast<A>(a[i]) + static_cast<A>(b[i]));
                    }
                  });
}

template <class T, class U>
void cast_pieces(Stream& stream, const Cast& args) {
  using A = std::conditional_t<std::is_same_v<U, double>, double, float>;
  parallel_pieces(stream, args.y, args.y.contiguous() && args.x.contiguous(),
                  [&](std::int64_t row, std::int64_t first, std::int64_t count) {
                    T* y = args.y.row<T>(row) + first;
                    const U* x = args.x.row<U>(row) + first;
                    if constexpr (std::is_same_v<T, U>) {
                      std::memmove(y, x, static_cast<std::size_t>(count) * sizeof(T));
                    } else {
#pragma omp simd
                      for (std::int64_t i = 0; i < count; ++i) store(y[i], static_cast<A>(x[i]));
                    }
                  });
}

/// sum[i] = weight * x[i] + sum[i].
template <class A, class U>
void accumulate(A* sum, A weight, const U* x, std::int64_t count) {
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) {
    sum[i] = std::fma(weight, static_cast<A>(x[i]), sum[i]);
  }
}

template <class T, class A = Acc<T>>
void accumulate_addend(A* sum, const ConstTensorView& addend, std::int64_t row, std::int64_t first,
                       std::int64_t count) {
  if (addend.empty()) return;
  dispatch_addend<T>(addend.dtype,
                     [&]<class U>() { accumulate(sum, A(1), addend.row<U>(row) + first, count); });
}

template <class T, class A = Acc<T>>
void weighted_sum_row(const WeightedSum& args, std::int64_t t) {
  const std::int64_t num_slots = args.slots_per_token;
  const A* weight = args.weight.empty() ? nullptr : args.weight.row<A>(t);
  for (std::int64_t first = 0; first < args.out.cols; first += kColumnChunk) {
    const std::int64_t count = std::min(kColumnChunk, args.out.cols - first);
    std::array<A, kColumnChunk> sum;
    std::fill_n(sum.begin(), count, A(0));
    for (std::int64_t j = 0; j < num_slots; ++j) {
      const void* slot = args.slot_rows[t * num_slots + j];
      if (slot == nullptr) continue;
      accumulate(sum.data(), weight == nullptr ? A(1) : weight[j],
                 static_cast<const T*>(slot) + first, count);
    }
    accumulate_addend<T>(sum.data(), args.addend1, t, first, count);
    accumulate_addend<T>(sum.data(), args.addend2, t, first, count);
    T* out = args.out.row<T>(t) + first;
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) store(out[i], sum[i]);
  }
}

template <class T, class A>
void scale_row(T* out, const T* x, A factor, std::int64_t count) {
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) store(out[i], static_cast<A>(x[i]) * factor);
}

}  // namespace

void add(Stream& stream, const Add& args) {
  check_same_shape("add", args.y, args.a);
  check_same_shape("add", args.y, args.b);
  dispatch_compute(args.y.dtype, [&]<class T>() {
    dispatch_addend<T>(args.a.dtype, [&]<class U>() {
      dispatch_addend<T>(args.b.dtype, [&]<class V>() { add_pieces<T, U, V>(stream, args); });
    });
  });
}

void cast(Stream& stream, const Cast& args) {
  check_same_shape("cast", args.y, args.x);
  dispatch_compute(args.y.dtype, [&]<class T>() {
    dispatch_compute(args.x.dtype, [&]<class U>() { cast_pieces<T, U>(stream, args); });
  });
}

void fill_zero(Stream& stream, const FillZero& args) {
  const auto size = static_cast<std::int64_t>(size_of(args.y.dtype));
  parallel_pieces(stream, args.y, args.y.contiguous(),
                  [&](std::int64_t row, std::int64_t first, std::int64_t count) {
                    char* y =
                        static_cast<char*>(args.y.data) + (row * args.y.stride + first) * size;
                    std::memset(y, 0, static_cast<std::size_t>(count * size));
                  });
}

void fill_value(Stream& stream, const FillValue& args) {
  dispatch_compute(args.y.dtype, [&]<class T>() {
    T value;
    store(value, static_cast<Acc<T>>(args.value));
    parallel_pieces(stream, args.y, args.y.contiguous(),
                    [&](std::int64_t row, std::int64_t first, std::int64_t count) {
                      std::fill_n(args.y.row<T>(row) + first, count, value);
                    });
  });
}

void weighted_sum(Stream& stream, const WeightedSum& args) {
  dispatch_compute(args.out.dtype, [&]<class T>() {
    parallel_rows(stream, args.out.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) weighted_sum_row<T>(args, t);
    });
  });
}

void scale_rows_sigmoid(Stream& stream, const ScaleRows& args) {
  check_same_shape("scale_rows_sigmoid", args.out, args.x);
  dispatch_compute(args.x.dtype, [&]<class T>() {
    parallel_rows(stream, args.x.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) {
        const auto factor = sigmoid(args.logit.row<Acc<T>>(t)[0]);
        scale_row(args.out.row<T>(t), args.x.row<T>(t), factor, args.x.cols);
      }
    });
  });
}

void scale_rows_sigmoid_backward(Stream& stream, const ScaleRowsBackward& args) {
  check_same_shape("scale_rows_sigmoid_backward", args.dx, args.x);
  dispatch_compute(args.x.dtype, [&]<class T>() {
    using A = Acc<T>;
    parallel_rows(stream, args.x.rows, kRowGrain, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) {
        const A logit = args.logit.row<A>(t)[0];
        const A factor = sigmoid(logit);
        const A product = dot<A>(args.dout.row<T>(t), args.x.row<T>(t), args.x.cols);
        args.dlogit.row<A>(t)[0] = factor * sigmoid(-logit) * product;
        scale_row(args.dx.row<T>(t), args.dout.row<T>(t), factor, args.x.cols);
      }
    });
  });
}

}  // namespace arcus::cpu
