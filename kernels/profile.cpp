#include "kernels/profile.hpp"

#include <cstring>

namespace arcus {
namespace {

bool same(const char* a, const char* b) {
  return a == b || (a != nullptr && b != nullptr && std::strcmp(a, b) == 0);
}

}  // namespace

Profile::Work& Profile::Work::operator+=(const Work& other) {
  busy += other.busy;
  gemm += other.gemm;
  sums += other.sums;
  gemm_flops += other.gemm_flops;
  padding_flops += other.padding_flops;
  return *this;
}

Profile::Work& Profile::Work::operator-=(const Work& other) {
  busy -= other.busy;
  gemm -= other.gemm;
  sums -= other.sums;
  gemm_flops -= other.gemm_flops;
  padding_flops -= other.padding_flops;
  return *this;
}

void Profile::start(bool with_events) {
  with_events_ = with_events;
  open_.clear();
  totals_.clear();
  events_.clear();
  for (ThreadWork& thread : work_) thread.of_thread = {};
  start_ = Clock::now();
}

Profile::Work Profile::work_so_far() const {
  Work sum;
  for (const ThreadWork& thread : work_) sum += thread.of_thread;
  return sum;
}

Profile::Total& Profile::total_of(const char* name, const char* outer) {
  for (Total& total : totals_) {
    if (same(total.name, name) && same(total.outer, outer)) return total;
  }
  return totals_.emplace_back(Total{.name = name, .outer = outer});
}

void Profile::begin(const char* name) {
  open_.push_back({.name = name, .begin = now(), .work_before = work_so_far()});
}

void Profile::end() {
  const double at = now();
  Work work = work_so_far();
  const Open span = open_.back();
  open_.pop_back();
  work -= span.work_before;
  const double seconds = at - span.begin;
  if (!open_.empty()) {
    open_.back().inner += seconds;
    open_.back().inner_work += work;
  }
  Total& total = total_of(span.name, open_.empty() ? nullptr : open_.back().name);
  ++total.calls;
  total.seconds += seconds - span.inner;
  work -= span.inner_work;
  total.work += work;
  if (with_events_) events_.push_back({span.name, span.begin, at});
}

}  // namespace arcus
