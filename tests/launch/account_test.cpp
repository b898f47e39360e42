// Spans and the account of a step: time goes to the innermost span, threads' work to the op that
// did it, and the rows add up.

#include "launch/account.hpp"

#include <gtest/gtest.h>

#include <thread>

namespace arcus {
namespace {

using namespace std::chrono_literals;

TEST(Profile, TimeGoesToTheInnermostSpan) {
  Stream stream(1);
  Profile profile(1, false);
  stream.set_profile(&profile);
  profile.start(true);
  {
    const Span outer(stream, "outer");
    std::this_thread::sleep_for(20ms);
    for (int i = 0; i < 2; ++i) {
      const Span inner(stream, "inner");
      profile.work(0).busy += 0.25;
      profile.work(0).gemm_flops += 10;
      std::this_thread::sleep_for(5ms);
    }
    profile.work(0).busy += 1;
  }
  stream.set_profile(nullptr);
  ASSERT_EQ(profile.totals().size(), 2U);
  const auto& inner = profile.totals()[0];
  const auto& outer = profile.totals()[1];
  EXPECT_STREQ(inner.name, "inner");
  EXPECT_STREQ(inner.outer, "outer");
  EXPECT_EQ(inner.calls, 2);
  EXPECT_GE(inner.seconds, 0.010);
  EXPECT_EQ(inner.work.busy, 0.5);
  EXPECT_EQ(inner.work.gemm_flops, 20);
  EXPECT_EQ(outer.outer, nullptr);
  EXPECT_GE(outer.seconds, 0.020);
  EXPECT_EQ(outer.work.busy, 1);
  ASSERT_EQ(profile.events().size(), 3U);
  // The outer span ends last and holds its own time and that of the inner ones.
  const auto& event = profile.events()[2];
  EXPECT_NEAR(event.end - event.begin, inner.seconds + outer.seconds, 1e-9);
  profile.start();
  EXPECT_TRUE(profile.totals().empty());
}

TEST(StepAccount, RowsAddUpToTheStep) {
  Stream stream(2);
  Profile profile(2, false);
  stream.set_profile(&profile);
  profile.start();
  const auto begin = std::chrono::steady_clock::now();
  {
    const Span step(stream, "step");
    std::this_thread::sleep_for(2ms);
    {
      // 4 ms of an op on two threads: 3 ms of products on each, half of it at the peak, a quarter
      // of the operations on zero rows.
      const Span op(stream, "ffn_forward");
      for (int thread = 0; thread < 2; ++thread) {
        auto& work = profile.work(thread);
        work.busy += 3.5e-3;
        work.gemm += 3e-3;
        work.sums += 0.25e-3;
        work.gemm_flops += 2e-3 * 50e9;
        work.padding_flops += 0.5e-3 * 50e9;
      }
      std::this_thread::sleep_for(4ms);
    }
    {
      const Span reduction(stream, "reduction");
      const Span exchange(stream, "all_gather_v");
      std::this_thread::sleep_for(1ms);
    }
    { const Span other(stream, "rmsnorm_forward"); }
  }
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  stream.set_profile(nullptr);
  const StepAccount account = account_of(profile, seconds, 1, 100, 2);
  const auto row = [&](std::string_view name) {
    for (std::size_t i = 0; i < StepAccount::kNumRows; ++i) {
      if (name == StepAccount::names()[i]) return account.ms[i];
    }
    return -1.0;
  };
  EXPECT_NEAR(row("experts' products at the measured peak"), 1.5, 1e-9);
  EXPECT_NEAR(row("experts' products below it"), 0.75, 1e-9);
  EXPECT_NEAR(row("zero rows that fill tiles of fixed height"), 0.75, 1e-9);
  EXPECT_NEAR(row("order-independent sums"), 0.25, 1e-9);
  EXPECT_GE(row("threads idle inside products"), 0.5);
  EXPECT_GE(row("reduction and gathering"), 1);
  EXPECT_GE(row("other"), 2);
  EXPECT_EQ(row("attention"), 0);
  EXPECT_NEAR(account.sum(), account.step_ms, 0.03 * account.step_ms);
}

}  // namespace
}  // namespace arcus
