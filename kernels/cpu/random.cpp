#include "kernels/random.hpp"

#include "kernels/cpu/parallel.hpp"
#include "kernels/cpu/rows.hpp"
#include "src/base/rng.hpp"

namespace arcus::cpu {
namespace {

constexpr std::int64_t kGrain = std::int64_t{1} << 12;

/// Elements begin..end of the op's. A call of the generator gives four numbers; the first and the
/// last one may serve in part only.
template <class T>
void fill_range(const FillNormal& args, std::int64_t begin, std::int64_t end) {
  const Rng rng(args.key);
  T* out = args.out.as<T>();
  for (std::int64_t i = begin; i < end;) {
    const std::int64_t element = args.first_element + i;
    const auto normals = rng.normals(static_cast<std::uint64_t>(element / 4));
    for (auto lane = static_cast<std::size_t>(element % 4); lane < 4 && i < end; ++lane, ++i) {
      store(out[i], normals[lane] * args.std);
    }
  }
}

}  // namespace

void fill_normal(Stream& stream, const FillNormal& args) {
  dispatch_compute(args.out.dtype, [&]<class T>() {
    parallel_rows(stream, args.out.size(), kGrain, [&](std::int64_t begin, std::int64_t end, int) {
      fill_range<T>(args, begin, end);
    });
  });
}

}  // namespace arcus::cpu
