#include "kernels/arena.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

namespace arcus {
namespace {

constexpr std::int64_t kAlignment = 128;

std::int64_t round_up(std::int64_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

Arena Arena::counting(std::string name) { return {std::move(name), Counting{}}; }

Arena::Arena(std::string name, std::int64_t capacity)
    : name_(std::move(name)), capacity_(round_up(std::max(capacity, kAlignment))) {
  void* memory = mmap(nullptr, static_cast<std::size_t>(capacity_), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ARCUS_REQUIRE(memory != MAP_FAILED, ExitCode::usage,
                "cannot reserve {} bytes of address space for {}: {}; use more ranks, a smaller "
                "model or micro-batch, or a higher limit (ulimit -v)",
                capacity_, name_, std::strerror(errno));
  // Large pages where the kernel offers them: fewer faults in the first steps.
  madvise(memory, static_cast<std::size_t>(capacity_), MADV_HUGEPAGE);
  base_ = static_cast<char*>(memory);
  owner_ = true;
}

Arena::Arena(std::string name, void* memory, std::int64_t capacity)
    : name_(std::move(name)), base_(static_cast<char*>(memory)), capacity_(capacity) {}

Arena::Arena(Arena&& other) noexcept
    : name_(std::move(other.name_)),
      counting_(other.counting_),
      owner_(std::exchange(other.owner_, false)),
      base_(std::exchange(other.base_, nullptr)),
      capacity_(std::exchange(other.capacity_, 0)),
      used_(other.used_),
      peak_(other.peak_) {}

Arena::~Arena() {
  if (owner_) munmap(base_, static_cast<std::size_t>(capacity_));
}

void* Arena::allocate_bytes(std::int64_t bytes) {
  ARCUS_CHECK(bytes >= 0, "arena {}: {} bytes asked for", name_, bytes);
  const std::int64_t begin = used_;
  used_ += round_up(bytes);
  peak_ = std::max(peak_, used_);
  if (counting_) return nullptr;
  ARCUS_CHECK(used_ <= capacity_,
              "the {} arena is exhausted: {} bytes in use, {} asked for, {} planned", name_, begin,
              bytes, capacity_);
  return base_ + begin;
}

TensorView Arena::allocate(DType dtype, std::int64_t rows, std::int64_t cols, std::int64_t stride) {
  if (stride == 0) stride = cols;
  void* data = allocate_bytes(rows * stride * static_cast<std::int64_t>(size_of(dtype)));
  return {data, dtype, rows, cols, stride};
}

}  // namespace arcus
