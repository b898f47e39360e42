#include "kernels/permute.hpp"

#include <algorithm>
#include <cstring>

#include "kernels/cpu/parallel.hpp"

namespace arcus::cpu {
namespace {

/// Bytes that one thread copies before it looks at the pending exchange again.
constexpr std::int64_t kTaskBytes = std::int64_t{1} << 16;

}  // namespace

void gather_rows(Stream& stream, const GatherRows& args) {
  const std::int64_t num_rows = args.y.rows;
  if (args.y.empty()) return;
  ARCUS_CHECK(args.y.dtype == args.x.dtype && args.y.cols == args.x.cols,
              "gather_rows: rows of {} {} from rows of {} {}", args.y.cols, name_of(args.y.dtype),
              args.x.cols, name_of(args.x.dtype));
  ARCUS_CHECK(args.index.size() == num_rows && args.indices_per_row >= 1,
              "gather_rows: {} indices, {} to a row, for {} rows", args.index.size(),
              args.indices_per_row, num_rows);
  const auto* index = args.index.as<std::int32_t>();
  const auto* x = static_cast<const char*>(args.x.data);
  auto* y = static_cast<char*>(args.y.data);
  const auto element_bytes = static_cast<std::int64_t>(size_of(args.y.dtype));
  const std::int64_t row_bytes = args.y.cols * element_bytes;
  const std::int64_t x_stride = args.x.stride * element_bytes;
  const std::int64_t y_stride = args.y.stride * element_bytes;
  parallel_rows(stream, num_rows, std::max<std::int64_t>(1, kTaskBytes / row_bytes),
                [&](std::int64_t begin, std::int64_t end, int) {
                  for (std::int64_t r = begin; r < end; ++r) {
                    if (index[r] < 0) {
                      std::memset(y + r * y_stride, 0, static_cast<std::size_t>(row_bytes));
                      continue;
                    }
                    const std::int64_t from = index[r] / args.indices_per_row;
                    ARCUS_DCHECK(from < args.x.rows, "gather_rows: index {} of {} rows", index[r],
                                 args.x.rows);
                    std::memcpy(y + r * y_stride, x + from * x_stride,
                                static_cast<std::size_t>(row_bytes));
                  }
                });
}

}  // namespace arcus::cpu
