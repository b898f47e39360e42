#pragma once

#include <cstdint>

#include "kernels/cpu/math.hpp"
#include "kernels/ffn.hpp"

/// What a feed-forward puts between its products, one row at a time.
namespace arcus::cpu {

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

/// act = F(up).
template <class F, class T>
void pointwise_row(T* __restrict act, const T* __restrict up, std::int64_t width) {
  using A = Acc<T>;
  for (std::int64_t i = 0; i < width; ++i) {
    act[i] = static_cast<T>(F::value(static_cast<A>(up[i])));
  }
}

/// dup = dact * F'(up).
template <class F, class T>
void pointwise_backward_row(T* __restrict dup, const Acc<T>* __restrict dact,
                            const T* __restrict up, std::int64_t width) {
  using A = Acc<T>;
  for (std::int64_t i = 0; i < width; ++i) {
    dup[i] = static_cast<T>(dact[i] * F::derivative(static_cast<A>(up[i])));
  }
}

/// act [F] from a row of the first product: gate and up [2F], or up [F].
template <class T>
void activation_row(Activation activation, T* act, const T* gate_up, std::int64_t width) {
  switch (activation) {
    case Activation::swiglu:
      return swiglu_row(act, gate_up, gate_up + width, width);
    case Activation::gelu_new:
      return pointwise_row<GeluTanh>(act, gate_up, width);
    case Activation::gelu:
      return pointwise_row<Gelu>(act, gate_up, width);
  }
}

template <class T>
void activation_backward_row(Activation activation, T* dgate_up, const Acc<T>* dact,
                             const T* gate_up, std::int64_t width) {
  switch (activation) {
    case Activation::swiglu:
      return swiglu_backward_row(dgate_up, dgate_up + width, dact, gate_up, gate_up + width, width);
    case Activation::gelu_new:
      return pointwise_backward_row<GeluTanh>(dgate_up, dact, gate_up, width);
    case Activation::gelu:
      return pointwise_backward_row<Gelu>(dgate_up, dact, gate_up, width);
  }
}

}  // namespace arcus::cpu
