#include "src/model/lora.hpp"

#include <algorithm>
#include <cmath>
#include <regex>

namespace arcus {
namespace {

constexpr std::string_view kWeight = ".weight";
constexpr std::string_view kA = ".lora_A";
constexpr std::string_view kB = ".lora_B";

std::string with_ending(std::string_view weight, std::string_view ending) {
  ARCUS_CHECK(weight.ends_with(kWeight), "{} is no weight", weight);
  return std::string(weight.substr(0, weight.size() - kWeight.size())) + std::string(ending);
}

}  // namespace

std::string lora_a_name(std::string_view weight) { return with_ending(weight, kA); }
std::string lora_b_name(std::string_view weight) { return with_ending(weight, kB); }

std::optional<std::string> lora_base_name(std::string_view name) {
  if (!name.ends_with(kA) && !name.ends_with(kB)) return std::nullopt;
  return std::string(name.substr(0, name.size() - kA.size())) + std::string(kWeight);
}

void merge_lora(std::span<float> w, std::span<const float> weight, std::span<const float> a,
                std::span<const float> b, std::int64_t out, std::int64_t in, std::int64_t rank,
                double scale) {
  const auto size = [](std::int64_t rows, std::int64_t cols) {
    return static_cast<std::size_t>(rows * cols);
  };
  ARCUS_CHECK(w.size() == size(out, in) && weight.size() == w.size() &&
                  a.size() == size(rank, in) && b.size() == size(out, rank),
              "a weight [{}, {}] of {} elements and adapters of rank {} with {} and {}", out, in,
              weight.size(), rank, a.size(), b.size());
  const auto cols = static_cast<std::size_t>(in);
  std::vector<double> row(cols);
  for (std::size_t i = 0; i < static_cast<std::size_t>(out); ++i) {
    std::fill(row.begin(), row.end(), 0.0);
    for (std::size_t k = 0; k < static_cast<std::size_t>(rank); ++k) {
      const auto factor = static_cast<double>(b[i * static_cast<std::size_t>(rank) + k]);
      for (std::size_t j = 0; j < cols; ++j)
        row[j] += factor * static_cast<double>(a[k * cols + j]);
    }
    for (std::size_t j = 0; j < cols; ++j) {
      w[i * cols + j] =
          static_cast<float>(static_cast<double>(weight[i * cols + j]) + scale * row[j]);
    }
  }
}

void require_adapters(const ParamRegistry& registry) {
  const auto& rows = registry.rows();
  const bool found =
      std::any_of(rows.begin(), rows.end(), [](const auto& row) { return row.adapter; });
  ARCUS_REQUIRE(found || !registry.lora().active(), ExitCode::usage,
                "train.lora.match = \"{}\" matches no weight that takes adapters; those are "
                "self_attn.{{q,k,v,o}}_proj and mlp...{{gate,up,down}}_proj (\"_proj\" matches "
                "all, \"experts\" every expert's)",
                registry.lora().match);
}

LowRank::LowRank(ParamRef weight, ParamRegistry& registry) {
  if (!weight.valid()) return;
  const LoraConfig& lora = registry.lora();
  const ParamRow row = registry.row(weight);
  if (!lora.active() || !std::regex_search(row.name, std::regex(lora.match))) return;
  const bool expert = row.kind == ParamKind::expert;
  rank_ = lora.rank;
  scale_ = lora.scale();
  in_ = row.shape.back();
  out_ = row.shape[row.shape.size() - 2];
  ParamRow a{.name = lora_a_name(row.name),
             .shape = {rank_, in_},
             .adapter = true,
             .init_std = 1 / std::sqrt(3.0 * static_cast<double>(in_)),
             .active_units = row.active_units};
  ParamRow b{.name = lora_b_name(row.name),
             .shape = {out_, rank_},
             .adapter = true,
             .init = ParamInit::zeros,
             .active_units = row.active_units};
  if (!expert) {
    a_ = registry.add(std::move(a));
    b_ = registry.add(std::move(b));
    return;
  }
  for (ParamRow* each : {&a, &b}) each->shape.insert(each->shape.begin(), row.shape[0]);
  const std::vector<ParamRef> refs = registry.add_experts({std::move(a), std::move(b)});
  a_ = refs[0];
  b_ = refs[1];
}

LowRankWeights LowRank::weights(const ParamStore& params) const {
  if (!active()) return {};
  return {params.values(a_), params.values(b_), params.registry().row(a_).expert_stride, scale_};
}

TensorView LowRank::allocate(Arena& arena, std::int64_t rows, DType compute) const {
  return active() ? allocate_padded(arena, compute, rows, rank_) : TensorView();
}

void LowRank::forward(PassContext& ctx, const ParamStore& params, TensorView y, ConstTensorView x,
                      TensorView u) const {
  if (!active()) return;
  low_rank_forward(ctx.stream,
                   {.y = y, .u = u, .x = x, .weights = weights(params), .few_rows = ctx.decoding});
}

void LowRank::backward(PassContext& ctx, const ParamStore& params, TensorView dx,
                       ConstTensorView dy, ConstTensorView x, TensorView u) const {
  if (!active()) return;
  const ArenaScope scope(ctx.scratch);
  const TensorView v = allocate(ctx.scratch, dy.rows, dy.dtype);
  low_rank_backward(ctx.stream, {.dx = dx, .v = v, .dy = dy, .weights = weights(params)});
  const Segment whole{.micro_batch = ctx.batch.number, .rows = dy.rows};
  add_leaves(ctx, params, dy, x, false, u, v, {&whole, 1});
}

void LowRank::add_leaves(PassContext& ctx, const ParamStore& params, ConstTensorView dy,
                         ConstTensorView x, bool x_is_padded, TensorView u, ConstTensorView v,
                         std::span<const Segment> segments) const {
  if (!active()) return;
  low_rank_wgrad(ctx.stream, {.da = params.sums(a_),
                              .db = params.sums(b_),
                              .expert_stride = params.registry().row(a_).expert_stride,
                              .tensor_idx_stride = 1,
                              .x = x,
                              .x_is_padded = x_is_padded,
                              .dy = dy,
                              .u = u,
                              .v = v,
                              .segments = segments});
}

void LowRank::append_gemm_shapes(LowRankShape shape, bool training,
                                 std::vector<GemmShape>& shapes) const {
  if (!active()) return;
  shape.out = out_;
  shape.in = in_;
  shape.rank = rank_;
  const std::vector<GemmShape> more = low_rank_gemm_shapes(shape, training);
  shapes.insert(shapes.end(), more.begin(), more.end());
}

FfnAdapters::FfnAdapters(ParamRef gate, ParamRef up, ParamRef down, ParamRegistry& registry)
    : gate_(gate, registry), up_(up, registry), down_(down, registry) {}

FfnAdapters::Rows FfnAdapters::allocate(Arena& arena, std::int64_t padded_rows,
                                        DType compute) const {
  const auto rows_of = [&](const LowRank& adapter) {
    return adapter.active() ? arena.allocate(compute, padded_rows, adapter.rank()) : TensorView();
  };
  return {rows_of(gate_), rows_of(up_), rows_of(down_)};
}

FfnLowRank FfnAdapters::views(const ParamStore& params, const Rows& rows) const {
  return {{gate_.weights(params), rows.gate},
          {up_.weights(params), rows.up},
          {down_.weights(params), rows.down}};
}

void FfnAdapters::add_leaves(PassContext& ctx, const ParamStore& params, ConstTensorView x,
                             ConstTensorView act, ConstTensorView dy, ConstTensorView dgate_up,
                             const Rows& u, const Rows& v,
                             std::span<const Segment> segments) const {
  // gate, then up, or up alone
  const std::int64_t width = act.cols;
  const ConstTensorView dup = dgate_up.col_range(dgate_up.cols - width, width);
  gate_.add_leaves(ctx, params, dgate_up.col_range(0, width), x, false, u.gate, v.gate, segments);
  up_.add_leaves(ctx, params, dup, x, false, u.up, v.up, segments);
  down_.add_leaves(ctx, params, dy, act, true, u.down, v.down, segments);
}

void FfnAdapters::append_gemm_shapes(const FfnShape& shape, DType compute, std::int64_t max_rows,
                                     bool training, std::vector<GemmShape>& shapes) const {
  const std::int64_t hidden = shape.hidden_size;
  const std::int64_t gate_up = ffn_row_stride(shape.gate_up_size());
  LowRankShape in{.x_stride = hidden,
                  .y_stride = gate_up,
                  .compute = compute,
                  .dx_type = compute,
                  .max_rows = max_rows};
  gate_.append_gemm_shapes(in, training, shapes);
  up_.append_gemm_shapes(in, training, shapes);
  down_.append_gemm_shapes({.x_stride = shape.ff_size,
                            .y_stride = hidden,
                            .compute = compute,
                            .dx_type = accumulate_dtype(compute),
                            .max_rows = max_rows},
                           training, shapes);
}

}  // namespace arcus
