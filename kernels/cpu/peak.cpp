#include "kernels/peak.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <vector>

#include "kernels/cpu/gemm_cache.hpp"
#include "kernels/cpu/parallel.hpp"

namespace arcus {
namespace {

constexpr std::size_t kSamples = 7;

double seconds_of(const auto& fn) {
  const auto start = std::chrono::steady_clock::now();
  fn();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

std::array<double, kSamples> sorted_seconds(const auto& fn) {
  fn();
  std::array<double, kSamples> samples;
  for (double& sample : samples) sample = seconds_of(fn);
  std::sort(samples.begin(), samples.end());
  return samples;
}

}  // namespace

double measure_gemm_peak(Stream& stream, DType dtype) {
  constexpr std::int64_t kSize = 1024;
  const cpu::GemmKey key{.ab_dtype = dtype,
                         .c_dtype = accumulate_dtype(dtype),
                         .m = kSize,
                         .n = kSize,
                         .k = kSize,
                         .lda = kSize,
                         .ldb = kSize,
                         .ldc = kSize};
  cpu::build_gemm(stream.cpu(), key);
  const std::int64_t matrix = kSize * kSize * static_cast<std::int64_t>(size_of(key.c_dtype));
  Arena arena("peak measurement", 3 * matrix * stream.num_threads());
  char* memory = static_cast<char*>(arena.allocate_bytes(3 * matrix * stream.num_threads()));
  std::fill_n(reinterpret_cast<float*>(memory), 3 * matrix * stream.num_threads() / 4, 1.0F / 3);
  const auto run = [&] {
    cpu::parallel_tasks(stream, stream.num_threads(), [&](std::int64_t task, int thread) {
      char* own = memory + task * 3 * matrix;
      cpu::run_gemm(stream.cpu(), thread, key, own, own + matrix, own + 2 * matrix);
    });
  };
  const double seconds = sorted_seconds(run)[kSamples / 2];
  return 2e-9 * kSize * kSize * kSize * stream.num_threads() / seconds;
}

double measure_triad(Stream& stream) {
  constexpr std::int64_t kElements = std::int64_t{1} << 24;
  Arena arena("triad measurement", 3 * kElements * static_cast<std::int64_t>(sizeof(double)));
  double* a = arena.allocate_array<double>(kElements).data();
  double* b = arena.allocate_array<double>(kElements).data();
  double* c = arena.allocate_array<double>(kElements).data();
  // Written first: untouched pages would all be one page of zeros.
  std::fill_n(b, kElements, 1.0);
  std::fill_n(c, kElements, 2.0);
  const auto run = [&] {
    cpu::parallel_rows(stream, kElements, 1 << 16, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t i = begin; i < end; ++i) a[i] = b[i] + 3.0 * c[i];
    });
  };
  return 24e-9 * kElements / sorted_seconds(run)[0];
}

}  // namespace arcus
