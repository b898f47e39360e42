#pragma once

#include <cstdint>
#include <memory>

#include "kernels/arena.hpp"

namespace arcus::cpu {

class GemmCache;

/// What a CPU stream keeps between ops: matrix-product primitives and scratch memory per thread.
class Context {
 public:
  explicit Context(int num_threads);
  ~Context();
  GemmCache& gemm() { return *gemm_; }
  /// Scratch of one thread of the stream's team, 64-byte aligned, at least `bytes` long; valid until
  /// the thread asks again. Grown outside steps (reserve_scratch), never inside.
  void* scratch(int thread, std::int64_t bytes);
  void reserve_scratch(std::int64_t bytes_per_thread);
  std::int64_t scratch_bytes() const { return scratch_bytes_; }
  int num_threads() const { return num_threads_; }

 private:
  int num_threads_;
  std::int64_t scratch_bytes_ = 0;
  std::unique_ptr<std::unique_ptr<Arena>[]> scratch_;
  std::unique_ptr<GemmCache> gemm_;
};

}  // namespace arcus::cpu
