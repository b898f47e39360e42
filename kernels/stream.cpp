#include "kernels/stream.hpp"

#include <chrono>

#include "kernels/cpu/context.hpp"
#include "kernels/profile.hpp"
#include "src/base/error.hpp"

namespace arcus {

std::string_view name_of(Device device) { return device == Device::cpu ? "cpu" : "cuda"; }

Stream::Stream(int num_threads) : num_threads_(num_threads) {
  ARCUS_REQUIRE(
      num_threads >= 1, ExitCode::usage,
      "a CPU stream needs at least one thread, {} given; set parallel.threads to 1 or more",
      num_threads);
  cpu_ = std::make_unique<cpu::Context>(num_threads);
}

Stream::~Stream() = default;

void Stream::set_profile(Profile* profile) {
  profile_ = profile;
  cpu_->set_profile(profile);
}

void Stream::wait(const Event& event) {
  const Span span(*this, "wait");
  const auto begin = std::chrono::steady_clock::now();
  event.wait();
  // What is complete is dropped now: it may not outlive the exchange that it belongs to, and an
  // idle rank has no op left that would look at it.
  poll();
  waited_seconds_ +=
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace arcus
