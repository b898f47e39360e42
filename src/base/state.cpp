#include "src/base/state.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <span>

namespace arcus {

std::int64_t TensorSpec::cols() const { return shape.size() < 2 ? 1 : shape.back(); }

std::int64_t TensorSpec::num_rows() const {
  const auto end = shape.size() < 2 ? shape.end() : shape.end() - 1;
  return std::accumulate(shape.begin(), end, std::int64_t{1}, std::multiplies<>());
}

std::int64_t block_rows(const TensorSpec& spec) {
  const std::int64_t cols = std::max<std::int64_t>(1, spec.cols());
  const std::int64_t rows = (kBlockElements + cols - 1) / cols;
  return std::max<std::int64_t>(1, std::min(rows, spec.unit_rows()));
}

std::int64_t blocks_per_unit(const TensorSpec& spec) {
  const std::int64_t rows = block_rows(spec);
  return (spec.unit_rows() + rows - 1) / rows;
}

std::int64_t num_blocks(const TensorSpec& spec) { return spec.num_units * blocks_per_unit(spec); }

RowRange block_range(const TensorSpec& spec, std::int64_t index) {
  const std::int64_t per_unit = blocks_per_unit(spec);
  const std::int64_t unit_begin = index / per_unit * spec.unit_rows();
  const std::int64_t begin = index % per_unit * block_rows(spec);
  return {unit_begin + begin, unit_begin + std::min(begin + block_rows(spec), spec.unit_rows())};
}

std::string list_names(const std::vector<std::string>& names) {
  constexpr std::size_t kShown = 5;
  const std::span shown(names.data(), std::min(names.size(), kShown));
  std::string text = fmt::format("{}", fmt::join(shown, ", "));
  if (names.size() > kShown) text += fmt::format(" and {} more", names.size() - kShown);
  return text;
}

}  // namespace arcus
