#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/arena.hpp"

namespace arcus {
class Profile;
}

namespace arcus::cpu {

class GemmCache;

/// What a CPU stream keeps between ops: matrix-product primitives and scratch memory per thread.
/// Belongs to one stream; nothing in it is shared between streams.
class Context {
 public:
  explicit Context(int num_threads);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  GemmCache& gemm() { return *gemm_; }
  /// Scratch of one thread of the stream's team, 128-byte aligned, at least `bytes` long; valid
  /// until the thread asks again. Grown ahead of steps by reserve_scratch; a thread that asks for
  /// more gets it, at the price of one mapping.
  void* scratch(int thread, std::int64_t bytes) { return grown(scratch_[index(thread)], bytes); }
  /// Scratch for the calling op as a whole, apart from the threads': task lists and the like. To be
  /// asked for outside parallel regions; valid until asked for again.
  void* op_scratch(std::int64_t bytes) { return grown(op_scratch_, bytes); }
  void reserve_scratch(std::int64_t bytes_per_thread);
  std::int64_t scratch_bytes() const { return scratch_bytes_; }
  int num_threads() const { return num_threads_; }
  /// The stream's profile, or null.
  void set_profile(Profile* profile) { profile_ = profile; }
  Profile* profile() const { return profile_; }
  /// See let_row_bits_differ.
  void let_row_bits_differ() { row_bits_may_differ_ = true; }
  bool row_bits_may_differ() const { return row_bits_may_differ_; }

 private:
  static std::size_t index(int thread) { return static_cast<std::size_t>(thread); }
  static void* grown(std::unique_ptr<Arena>& arena, std::int64_t bytes);

  int num_threads_;
  std::int64_t scratch_bytes_ = 0;
  Profile* profile_ = nullptr;
  bool row_bits_may_differ_ = false;
  std::vector<std::unique_ptr<Arena>> scratch_;
  std::unique_ptr<Arena> op_scratch_;
  std::unique_ptr<GemmCache> gemm_;
};

}  // namespace arcus::cpu
