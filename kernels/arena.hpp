#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "src/base/tensor.hpp"

namespace arcus {

/// Memory handed out in stack order from one reservation of address space: the pages of an arena
/// become real when first touched, so a worst-case reservation costs nothing until it happens.
/// A *counting* arena hands out null views and only adds up: the dry pass that plans a real one.
class Arena {
 public:
  struct Mark {
    std::int64_t used = 0;
  };

  static Arena counting(std::string name);
  /// Reserves `capacity` bytes of zeroed memory.
  Arena(std::string name, std::int64_t capacity);
  /// Hands out memory that belongs to somebody else, who outlives it; aligned to 128 bytes.
  Arena(std::string name, void* memory, std::int64_t capacity);
  ~Arena();
  Arena(Arena&& other) noexcept;
  Arena& operator=(Arena&&) = delete;

  /// [rows, cols], rows `stride` elements apart (0 = cols); 128-byte aligned. Contents are whatever
  /// was there before. Fails (internal) when the reservation is exhausted.
  TensorView allocate(DType dtype, std::int64_t rows, std::int64_t cols, std::int64_t stride = 0);
  template <class T>
  std::span<T> allocate_array(std::int64_t count) {
    auto view = allocate(dtype_of<T>(), 1, count);
    return {static_cast<T*>(view.data), view.data == nullptr ? 0 : static_cast<std::size_t>(count)};
  }
  void* allocate_bytes(std::int64_t bytes);

  Mark mark() const { return {used_}; }
  /// Gives back everything allocated since the mark.
  void release(Mark mark) { used_ = mark.used; }
  void reset() { used_ = 0; }
  bool is_counting() const { return counting_; }
  std::int64_t used() const { return used_; }
  std::int64_t peak() const { return peak_; }
  std::int64_t capacity() const { return capacity_; }
  const std::string& name() const { return name_; }

 private:
  struct Counting {};
  Arena(std::string name, Counting) : name_(std::move(name)), counting_(true) {}
  std::string name_;
  bool counting_ = false;
  bool owner_ = false;
  char* base_ = nullptr;
  std::int64_t capacity_ = 0;
  std::int64_t used_ = 0;
  std::int64_t peak_ = 0;
};

/// Releases on scope exit whatever was allocated inside the scope.
class ArenaScope {
 public:
  explicit ArenaScope(Arena& arena) : arena_(arena), mark_(arena.mark()) {}
  ~ArenaScope() { arena_.release(mark_); }
  ArenaScope(const ArenaScope&) = delete;
  ArenaScope& operator=(const ArenaScope&) = delete;

 private:
  Arena& arena_;
  Arena::Mark mark_;
};

}  // namespace arcus
