#pragma once

#include "comm/dispatch_plan.hpp"
#include "kernels/stream.hpp"

namespace arcus {

/// A combine under way: when its exchange is complete, results are put in their place, once.
class Combining : public Pending {
 public:
  void begin(Event exchange, const DispatchPlan& plan) {
    exchange_ = exchange;
    plan_ = &plan;
  }
  bool test() override {
    if (plan_ == nullptr) return true;
    if (!exchange_.test()) return false;
    finish();
    return true;
  }
  void wait() override {
    if (plan_ == nullptr) return;
    exchange_.wait();
    finish();
  }

 protected:
  virtual void place(const DispatchPlan& plan) = 0;

 private:
  void finish() {
    const DispatchPlan& plan = *plan_;
    plan_ = nullptr;
    exchange_ = Event();
    place(plan);
  }

  Event exchange_;
  const DispatchPlan* plan_ = nullptr;
};

}  // namespace arcus
