#pragma once

#include "kernels/profile.hpp"
#include "src/base/error.hpp"

/// Declares the op `name(Stream&, const Args&)` and its instance on each device. This is the only
/// backend conditional in shared code.
#if ARCUS_WITH_CUDA
#define ARCUS_DECLARE_OP(name, Args)                                                            \
  namespace cpu {                                                                               \
  void name(Stream& stream, const Args& args);                                                  \
  }                                                                                             \
  namespace cuda {                                                                              \
  void name(Stream& stream, const Args& args);                                                  \
  }                                                                                             \
  inline void name(Stream& stream, const Args& args) {                                          \
    const Span span(stream, #name);                                                             \
    return stream.device() == Device::cpu ? cpu::name(stream, args) : cuda::name(stream, args); \
  }
#else
#define ARCUS_DECLARE_OP(name, Args)                   \
  namespace cpu {                                      \
  void name(Stream& stream, const Args& args);         \
  }                                                    \
  inline void name(Stream& stream, const Args& args) { \
    const Span span(stream, #name);                    \
    cpu::name(stream, args);                           \
  }
#endif
