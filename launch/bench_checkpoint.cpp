#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <functional>
#include <vector>

#include "checkpoints/saver.hpp"
#include "launch/bench.hpp"
#include "src/base/error.hpp"
#include "src/base/memory.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

constexpr std::int64_t kNumTensors = 16;
constexpr std::int64_t kNumExperts = 16;
constexpr std::int64_t kRowsPerExpert = 512;
constexpr std::size_t kTransfer = std::size_t{1} << 26;

/// This rank's experts of made-up tensors [16, 512, W] in f32, one block of memory for all.
class MadeUpState {
 public:
  MadeUpState(int rank, int num_ranks, std::int64_t total_bytes)
      : cols_(std::max<std::int64_t>(1, total_bytes / (kNumTensors * kNumExperts * kRowsPerExpert *
                                                       std::int64_t{sizeof(float)}))) {
    const std::int64_t first = kNumExperts * rank / num_ranks * kRowsPerExpert;
    const std::int64_t last = kNumExperts * (rank + 1) / num_ranks * kRowsPerExpert;
    values_.resize(static_cast<std::size_t>(kNumTensors * (last - first) * cols_));
    std::uint32_t word = static_cast<std::uint32_t>(rank) + 1;
    for (float& value : values_) {
      word = word * 1664525 + 1013904223;
      value = static_cast<float>(word);
    }
    for (std::int64_t i = 0; i < kNumTensors; ++i) {
      StateView view{{fmt::format("layers.{}.experts", i),
                      DType::f32,
                      {kNumExperts, kRowsPerExpert, cols_},
                      kNumExperts},
                     false,
                     {}};
      view.slices.push_back({{first, last}, values_.data() + i * (last - first) * cols_});
      views_.push_back(std::move(view));
    }
  }
  std::span<const StateView> views() const { return views_; }
  char* data() { return reinterpret_cast<char*>(values_.data()); }
  std::size_t bytes() const { return values_.size() * sizeof(float); }
  std::int64_t total_bytes() const {
    return kNumTensors * kNumExperts * kRowsPerExpert * cols_ * std::int64_t{sizeof(float)};
  }

 private:
  std::int64_t cols_;
  std::vector<float> values_;
  std::vector<StateView> views_;
};

int open_or_fail(const fs::path& path, int flags) {
  const int fd = ::open(path.c_str(), flags, 0666);
  ARCUS_REQUIRE(fd >= 0, ExitCode::usage, "cannot open {}: {}", path.string(),
                std::strerror(errno));
  return fd;
}

/// All of `bytes` through `call`, which moves some and returns how many.
void transfer(const fs::path& path, std::size_t bytes,
              const std::function<ssize_t(std::size_t at, std::size_t size)>& call) {
  for (std::size_t at = 0; at < bytes;) {
    const ssize_t moved = call(at, std::min(kTransfer, bytes - at));
    ARCUS_REQUIRE(moved > 0, ExitCode::usage, "{}: {}", path.string(),
                  moved < 0 ? std::strerror(errno) : "shorter than it was");
    at += static_cast<std::size_t>(moved);
  }
}

void write_raw(const fs::path& path, const char* data, std::size_t bytes) {
  const int fd = open_or_fail(path, O_WRONLY | O_CREAT | O_TRUNC);
  transfer(path, bytes,
           [&](std::size_t at, std::size_t size) { return ::write(fd, data + at, size); });
  ARCUS_REQUIRE(::fsync(fd) == 0, ExitCode::usage, "{}: {}", path.string(), std::strerror(errno));
  ::close(fd);
}

void read_raw(const fs::path& path, char* data, std::size_t bytes) {
  const int fd = open_or_fail(path, O_RDONLY);
  transfer(path, bytes,
           [&](std::size_t at, std::size_t size) { return ::read(fd, data + at, size); });
  ::close(fd);
}

/// So that they are read from the disk. Files in memory (tmpfs) stay there.
void drop_from_cache(const fs::path& folder) {
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    if (!entry.is_regular_file()) continue;
    const int fd = open_or_fail(entry.path(), O_RDONLY);
    ::fsync(fd);
    ::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    ::close(fd);
  }
}

/// Seconds of one thing, sample by sample.
struct Series {
  std::vector<double> seconds;

  double at(double share) const {
    std::vector<double> sorted = seconds;
    std::sort(sorted.begin(), sorted.end());
    return sorted[static_cast<std::size_t>(share * static_cast<double>(sorted.size() - 1))];
  }
  double median() const { return at(0.5); }
  std::string text() const {
    return fmt::format("{:>7.3f} ({:.3f}-{:.3f})", median(), at(0), at(1));
  }
};

class CheckpointBench {
 public:
  CheckpointBench(Session& session, const BenchOptions& options)
      : session_(session),
        folder_(fs::path(options.dir) /
                broadcast_text(session.comm(), session.stream(),
                               fmt::format("arcus-bench-checkpoint-{}", ::getpid()))),
        state_(session.comm().rank(), session.comm().size(), options.mib << 20),
        raw_(folder_ / fmt::format("raw-{}", session.comm().rank())),
        saver_(session.comm(), session.stream(), folder_) {}

  ~CheckpointBench() {
    std::error_code ignored;
    if (session_.is_root()) fs::remove_all(folder_, ignored);
  }
  CheckpointBench(const CheckpointBench&) = delete;
  CheckpointBench& operator=(const CheckpointBench&) = delete;

  void run(std::int64_t repeats) {
    sample_files(/*counts=*/false);
    for (std::int64_t i = 0; i < repeats; ++i) {
      // In turn first: a disk may be slower after it has worked for a while.
      if (i % 2 == 0) sample_files(/*counts=*/true);
      sample_checkpoint();
      if (i % 2 == 1) sample_files(/*counts=*/true);
      sample_background();
    }
    print(repeats);
  }

 private:
  /// The slowest rank's seconds, from a common start.
  double timed(const std::function<void()>& fn) {
    session_.comm().barrier(session_.stream());
    const Clock::time_point begin = Clock::now();
    session_.together(fn);
    const std::chrono::duration<double> spent = Clock::now() - begin;
    const std::vector<double> all = gather(session_, spent.count());
    return *std::max_element(all.begin(), all.end());
  }

  /// What an earlier sample left is not overwritten, which would cost or save time.
  void begin_anew() {
    session_.comm().barrier(session_.stream());
    session_.together([&] {
      if (!session_.is_root()) return;
      fs::remove_all(folder_);
      fs::create_directories(folder_);
    });
  }
  void drop_caches() {
    session_.comm().barrier(session_.stream());
    session_.together([&] {
      if (session_.is_root()) drop_from_cache(folder_);
    });
  }

  void sample_files(bool counts) {
    begin_anew();
    const double written = timed([&] { write_raw(raw_, state_.data(), state_.bytes()); });
    drop_caches();
    const double read = timed([&] { read_raw(raw_, state_.data(), state_.bytes()); });
    if (!counts) return;
    raw_write_.seconds.push_back(written);
    raw_read_.seconds.push_back(read);
  }
  void sample_checkpoint() {
    begin_anew();
    const CheckpointInfo info{.step = 1};
    save_.seconds.push_back(timed([&] {
      save_checkpoint(session_.comm(), session_.stream(), folder_, info, state_.views());
    }));
    drop_caches();
    load_.seconds.push_back(timed([&] {
      const fs::path latest = *find_latest(folder_);
      load_checkpoint(session_.comm(), session_.stream(), latest, state_.views());
    }));
  }
  void sample_background() {
    begin_anew();
    const CheckpointInfo info{.step = 1};
    start_.seconds.push_back(timed([&] { saver_.start(info, state_.views(), {}, /*copy=*/true); }));
    copied_.seconds.push_back(timed([&] { saver_.wait_copied(); }));
    rest_.seconds.push_back(timed([&] { saver_.finish(); }));
  }

  void print(std::int64_t repeats) const {
    if (!session_.is_root()) return;
    fmt::print(
        "{} MiB of state on {} rank{}, in {}; medians of {} (least-most), taken in turn\n"
        "{:<26} {:>21} {:>23} {:>10}\n",
        state_.total_bytes() >> 20, session_.comm().size(), session_.comm().size() == 1 ? "" : "s",
        folder_.parent_path().string(), repeats, "seconds", "files alone", "checkpoint",
        "of raw speed");
    const auto row = [](const char* name, const Series& raw, const Series& ours) {
      fmt::print("{:<26} {:>21} {:>23} {:>8.0f} %{}\n", name, raw.text(), ours.text(),
                 100 * raw.median() / ours.median(),
                 ours.median() <= raw.at(1) ? ", within the spread of the files" : "");
    };
    row("write and fsync", raw_write_, save_);
    row("read, not cached", raw_read_, load_);
    fmt::print(
        "in the background: training goes on after {:.4f} s, {:.2f} % of a save; the state is "
        "copied {:.3f} s\nlater, the checkpoint there {:.3f} s after that\n",
        start_.median(), 100 * start_.median() / save_.median(), copied_.median(), rest_.median());
  }

  Session& session_;
  fs::path folder_;
  MadeUpState state_;
  fs::path raw_;
  CheckpointSaver saver_;
  Series raw_write_, save_, raw_read_, load_, start_, copied_, rest_;
};

}  // namespace

ExitCode bench_checkpoint(Session& session, const BenchOptions& options) {
  session.together([&] {
    // The state, and the copy of it for a save in the background.
    const std::int64_t needed =
        2 * (options.mib << 20) / session.comm().size() * session.comm().node_size();
    ARCUS_REQUIRE(available_memory() == 0 || needed <= available_memory(), ExitCode::usage,
                  "--mib {} needs {} MiB of memory on this machine, which has {} left; take less",
                  options.mib, needed >> 20, available_memory() >> 20);
  });
  CheckpointBench(session, options).run(options.repeats);
  return ExitCode::ok;
}

}  // namespace arcus
