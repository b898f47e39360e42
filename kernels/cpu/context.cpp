#include "kernels/cpu/context.hpp"

#include <algorithm>

#include "kernels/cpu/gemm_cache.hpp"

namespace arcus::cpu {
namespace {

// Address space alone: pages are taken when they are touched.
constexpr std::int64_t kFirstReservation = std::int64_t{16} << 20;

}  // namespace

Context::Context(int num_threads)
    : num_threads_(num_threads),
      scratch_(index(num_threads)),
      gemm_(std::make_unique<GemmCache>(num_threads)) {
  reserve_scratch(kFirstReservation);
  grown(op_scratch_, kFirstReservation);
}

Context::~Context() = default;

void Context::reserve_scratch(std::int64_t bytes_per_thread) {
  for (auto& arena : scratch_) grown(arena, bytes_per_thread);
  scratch_bytes_ = std::max(scratch_bytes_, bytes_per_thread);
}

void* Context::grown(std::unique_ptr<Arena>& arena, std::int64_t bytes) {
  if (arena == nullptr || bytes > arena->capacity()) {
    arena = std::make_unique<Arena>("thread scratch", bytes);
  }
  arena->reset();
  return arena->allocate_bytes(bytes);
}

}  // namespace arcus::cpu
