#include "src/model/dense_ffn.hpp"

#include <algorithm>

namespace arcus {

DenseFfn::DenseFfn(const std::string& prefix, std::int64_t hidden_size, std::int64_t ff_size,
                   double down_init_std, ParamRegistry& registry)
    : shape_{hidden_size, ff_size} {
  gate_ = registry.add(
      {.name = prefix + "gate_proj.weight", .shape = {ff_size, hidden_size}, .whole_leaves = true});
  up_ = registry.add({.name = prefix + "up_proj.weight",
                      .shape = {ff_size, hidden_size},
                      .follows_previous = true,
                      .whole_leaves = true});
  down_ = registry.add({.name = prefix + "down_proj.weight",
                        .shape = {hidden_size, ff_size},
                        .init_std = down_init_std,
                        .whole_leaves = true});
  adapters_ = FfnAdapters(gate_, up_, down_, registry);
}

DenseFfn::Saved DenseFfn::allocate(Arena& arena, std::int64_t num_tokens, DType compute) const {
  const std::int64_t rows = padded_rows(num_tokens);
  const std::int64_t f = shape_.ff_size;
  return {arena.allocate(compute, rows, 2 * f, ffn_row_stride(2 * f)),
          arena.allocate(compute, rows, f, ffn_row_stride(f)),
          adapters_.allocate(arena, rows, compute)};
}

FfnWeights DenseFfn::weights(const ParamStore& params) const {
  return {params.values(gate_, 0, 2 * shape_.ff_size), params.values(down_), 0};
}

Segment DenseFfn::whole(const PassContext& ctx) const {
  return {.micro_batch = ctx.batch.number, .rows = ctx.batch.num_tokens()};
}

void DenseFfn::forward(PassContext& ctx, const ParamStore& params, TensorView y, ConstTensorView x,
                       const Saved& saved) const {
  const Segment segment = whole(ctx);
  ffn_forward(ctx.stream, {.y = y,
                           .gate_up = saved.gate_up,
                           .act = saved.act,
                           .x = x,
                           .weights = weights(params),
                           .shape = shape_,
                           .segments = {&segment, 1},
                           .few_rows = ctx.decoding,
                           .low_rank = adapters_.views(params, saved.u)});
}

void DenseFfn::backward(PassContext& ctx, const ParamStore& params, TensorView dx,
                        ConstTensorView dy, ConstTensorView x, const Saved& saved) const {
  const ArenaScope scope(ctx.scratch);
  const Segment segment = whole(ctx);
  const std::int64_t rows = saved.act.rows;
  const std::int64_t h = shape_.hidden_size;
  const std::int64_t f = shape_.ff_size;
  const TensorView dy_padded = ctx.scratch.allocate(dy.dtype, rows, h, ffn_row_stride(h));
  const TensorView dgate_up = ctx.scratch.allocate(dy.dtype, rows, 2 * f, ffn_row_stride(2 * f));
  const FfnAdapters::Rows v = adapters_.allocate(ctx.scratch, rows, dy.dtype);
  ffn_backward(ctx.stream, {.dx = dx,
                            .dy = dy_padded,
                            .dgate_up = dgate_up,
                            .dout = dy,
                            .gate_up = saved.gate_up,
                            .weights = weights(params),
                            .shape = shape_,
                            .segments = {&segment, 1},
                            .low_rank = adapters_.views(params, v)});
  ffn_wgrad(ctx.stream, {.dgate = params.sums(gate_),
                         .dup = params.sums(up_),
                         .ddown = params.sums(down_),
                         .x = x,
                         .act = saved.act,
                         .dy = dy_padded,
                         .dgate_up = dgate_up,
                         .shape = shape_,
                         .segments = {&segment, 1}});
  adapters_.add_leaves(ctx, params, x, saved.act, dy_padded, dgate_up, saved.u, v, {&segment, 1});
}

std::vector<GemmShape> DenseFfn::gemm_shapes(std::int64_t max_tokens, DType compute,
                                             bool training) const {
  std::vector<GemmShape> shapes = ffn_gemm_shapes(shape_, compute, max_tokens, training);
  adapters_.append_gemm_shapes(shape_, compute, max_tokens, training, shapes);
  return shapes;
}

}  // namespace arcus
