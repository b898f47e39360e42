#pragma once

#include <memory>
#include <string_view>

namespace arcus {

enum class Device { cpu, cuda };
std::string_view name_of(Device device);

/// Something a stream or a communicator has under way. Owned by whoever started it.
class Pending {
 public:
  virtual ~Pending() = default;
  /// Makes progress; true once complete. Throws what went wrong.
  virtual bool test() = 0;
  virtual void wait() = 0;
};

/// Handle to work that may be under way; a default one is complete. Never owns, never allocates.
class Event {
 public:
  Event() = default;
  explicit Event(Pending* pending) : pending_(pending) {}
  bool test() const { return pending_ == nullptr || pending_->test(); }
  void wait() const {
    if (pending_ != nullptr) pending_->wait();
  }

 private:
  Pending* pending_ = nullptr;
};

namespace cpu {
class Context;
}
class Profile;

/// An ordered queue of work on one device. A CPU stream runs each op at once, on `num_threads`
/// threads; ops are free functions that take `Stream&` first.
class Stream {
 public:
  /// A CPU stream. num_threads >= 1.
  explicit Stream(int num_threads);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  Device device() const { return Device::cpu; }
  int num_threads() const { return num_threads_; }
  /// Work enqueued after this call starts when `event` is complete.
  void wait(const Event& event);
  /// Time spent in wait, in all.
  double waited_seconds() const { return waited_seconds_; }
  /// Ops call poll() between pieces of work so that a pending exchange moves on (MPI makes no
  /// progress by itself). At most one event is polled; a complete one is dropped.
  void poll_between_tasks(const Event& event) { polled_ = event; }
  void poll() {
    if (polled_.test()) polled_ = Event();
  }
  cpu::Context& cpu() { return *cpu_; }
  /// Measures what follows; null ends that. The profile must outlive it.
  void set_profile(Profile* profile);
  Profile* profile() const { return profile_; }

 private:
  int num_threads_;
  Event polled_;
  double waited_seconds_ = 0;
  Profile* profile_ = nullptr;
  std::unique_ptr<cpu::Context> cpu_;
};

}  // namespace arcus
