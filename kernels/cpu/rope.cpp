#include <cmath>

#include "kernels/attention.hpp"
#include "kernels/cpu/context.hpp"
#include "kernels/cpu/parallel.hpp"
#include "kernels/cpu/rows.hpp"

namespace arcus::cpu {
namespace {

constexpr std::int64_t kPositionGrain = 8;

/// Cosines and sines of one position's angles; the sines' sign turns the rotation round.
template <class A>
struct Angles {
  A* cosine;
  A* sine;
  std::int64_t count;

  void set(const double* inv_freq, std::int32_t position, double direction) {
    for (std::int64_t i = 0; i < count; ++i) {
      const double angle = static_cast<double>(position) * inv_freq[i];
      cosine[i] = static_cast<A>(std::cos(angle));
      sine[i] = static_cast<A>(direction * std::sin(angle));
    }
  }
};

template <class T, class A = Acc<T>>
void rotate(T* out, const T* in, const Angles<A>& angles, std::int64_t head_dim) {
  const std::int64_t n = angles.count;
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    const A low = static_cast<A>(in[i]);
    const A high = static_cast<A>(in[i + n]);
    store(out[i], low * angles.cosine[i] - high * angles.sine[i]);
    store(out[i + n], high * angles.cosine[i] + low * angles.sine[i]);
  }
  for (std::int64_t i = 2 * n; i < head_dim; ++i) out[i] = in[i];
}

void check_shape(const AttentionShape& shape, const ConstTensorView& inv_freq) {
  ARCUS_CHECK(shape.num_kv_heads > 0 && shape.num_heads % shape.num_kv_heads == 0,
              "rope: {} query heads do not divide over {} KV heads", shape.num_heads,
              shape.num_kv_heads);
  ARCUS_CHECK(2 * inv_freq.cols <= shape.head_dim, "rope: {} angles for heads of {}", inv_freq.cols,
              shape.head_dim);
}

/// fn(token, position s, sequence b, angles) for every token. Sequences inside positions: where
/// they share a position its angles are computed once.
template <class A, class Fn>
void for_each_token(Stream& stream, const AttentionShape& shape, const ConstTensorView& inv_freq,
                    const ConstTensorView& position, double direction, Fn&& fn) {
  check_shape(shape, inv_freq);
  const auto* positions = position.as<std::int32_t>();
  const auto* frequencies = inv_freq.as<double>();
  const std::int64_t n = inv_freq.cols;
  parallel_rows(stream, shape.num_seqs > 0 ? shape.seq_len : 0, kPositionGrain,
                [&](std::int64_t begin, std::int64_t end, int thread) {
                  auto* scratch = static_cast<A*>(
                      stream.cpu().scratch(thread, 2 * n * static_cast<std::int64_t>(sizeof(A))));
                  Angles<A> angles{scratch, scratch + n, n};
                  std::int32_t angles_of = 0;
                  bool known = false;
                  for (std::int64_t s = begin; s < end; ++s) {
                    for (std::int64_t b = 0; b < shape.num_seqs; ++b) {
                      const std::int64_t token = b * shape.seq_len + s;
                      if (!known || positions[token] != angles_of) {
                        angles_of = positions[token];
                        angles.set(frequencies, angles_of, direction);
                        known = true;
                      }
                      fn(token, s, b, angles);
                    }
                  }
                });
}

/// Row of query head h, or of a KV head, in the layout of attention.
std::int64_t query_row(const AttentionShape& shape, std::int64_t b, std::int64_t s,
                       std::int64_t h) {
  const std::int64_t group = shape.group();
  return ((b * shape.num_kv_heads + h / group) * shape.seq_len + s) * group + h % group;
}
std::int64_t key_row(const AttentionShape& shape, std::int64_t b, std::int64_t s, std::int64_t kv) {
  return (b * shape.num_kv_heads + kv) * shape.seq_len + s;
}

}  // namespace

void rope_forward(Stream& stream, const RopeForward& args) {
  const AttentionShape& shape = args.shape;
  const std::int64_t dim = shape.head_dim;
  dispatch_compute(args.q.dtype, [&]<class T>() {
    for_each_token<Acc<T>>(
        stream, shape, args.inv_freq, args.position, 1.0,
        [&](std::int64_t token, std::int64_t s, std::int64_t b, const Angles<Acc<T>>& angles) {
          for (std::int64_t h = 0; h < shape.num_heads; ++h) {
            rotate(args.q_out.row<T>(query_row(shape, b, s, h)), args.q.row<T>(token) + h * dim,
                   angles, dim);
          }
          for (std::int64_t kv = 0; kv < shape.num_kv_heads; ++kv) {
            rotate(args.k_out.row<T>(key_row(shape, b, s, kv)), args.k.row<T>(token) + kv * dim,
                   angles, dim);
          }
        });
  });
}

void rope_backward(Stream& stream, const RopeBackward& args) {
  const AttentionShape& shape = args.shape;
  const std::int64_t dim = shape.head_dim;
  dispatch_compute(args.dq.dtype, [&]<class T>() {
    for_each_token<Acc<T>>(
        stream, shape, args.inv_freq, args.position, -1.0,
        [&](std::int64_t token, std::int64_t s, std::int64_t b, const Angles<Acc<T>>& angles) {
          for (std::int64_t h = 0; h < shape.num_heads; ++h) {
            rotate(args.dq.row<T>(token) + h * dim, args.dq_out.row<T>(query_row(shape, b, s, h)),
                   angles, dim);
          }
          for (std::int64_t kv = 0; kv < shape.num_kv_heads; ++kv) {
            rotate(args.dk.row<T>(token) + kv * dim, args.dk_out.row<T>(key_row(shape, b, s, kv)),
                   angles, dim);
          }
        });
  });
}

}  // namespace arcus::cpu
