#include "src/model/dense_ffn.hpp"

#include <algorithm>

#include "src/base/error.hpp"

namespace arcus {
namespace {

Activation activation_from_name(const std::string& name) {
  if (name == "swiglu") return Activation::swiglu;
  if (name == "gelu_new") return Activation::gelu_new;
  if (name == "gelu") return Activation::gelu;
  ARCUS_FAIL(ExitCode::usage,
             "model.activation is \"{}\"; it must be \"swiglu\", \"gelu_new\" or \"gelu\"", name);
}

}  // namespace

FfnShape ffn_shape(const ModelConfig& model, std::int64_t ff_size) {
  return {model.hidden_size, ff_size, activation_from_name(model.activation), model.mlp_bias};
}

DenseFfn::DenseFfn(const std::string& prefix, const FfnShape& shape, double down_init_std,
                   ParamRegistry& registry)
    : shape_(shape) {
  const std::int64_t h = shape.hidden_size;
  const std::int64_t f = shape.ff_size;
  const bool gated = shape.gated();
  if (gated) {
    gate_ =
        registry.add({.name = prefix + "gate_proj.weight", .shape = {f, h}, .whole_leaves = true});
  }
  up_ = registry.add({.name = prefix + "up_proj.weight",
                      .shape = {f, h},
                      .follows_previous = gated,
                      .whole_leaves = true});
  down_ = registry.add({.name = prefix + "down_proj.weight",
                        .shape = {h, f},
                        .init_std = down_init_std,
                        .whole_leaves = true});
  if (shape.bias) add_biases(prefix, registry);
  adapters_ = FfnAdapters(gate_, up_, down_, registry);
}

void DenseFfn::add_biases(const std::string& prefix, ParamRegistry& registry) {
  const auto bias = [&](const char* name, std::int64_t size, bool follows) {
    return registry.add({.name = prefix + name,
                         .shape = {size},
                         .keep_accumulate_type = true,
                         .init = ParamInit::zeros,
                         .follows_previous = follows});
  };
  const bool gated = shape_.gated();
  if (gated) gate_bias_ = bias("gate_proj.bias", shape_.ff_size, false);
  up_bias_ = bias("up_proj.bias", shape_.ff_size, gated);
  down_bias_ = bias("down_proj.bias", shape_.hidden_size, false);
}

DenseFfn::Saved DenseFfn::allocate(Arena& arena, std::int64_t num_tokens, DType compute) const {
  const std::int64_t rows = padded_rows(num_tokens);
  const std::int64_t f = shape_.ff_size;
  const std::int64_t u = shape_.gate_up_size();
  return {arena.allocate(compute, rows, u, ffn_row_stride(u)),
          arena.allocate(compute, rows, f, ffn_row_stride(f)),
          adapters_.allocate(arena, rows, compute)};
}

FfnWeights DenseFfn::weights(const ParamStore& params) const {
  const std::int64_t u = shape_.gate_up_size();
  const bool gated = shape_.gated();
  return {.gate_up = params.values(gated ? gate_ : up_, 0, u),
          .down = params.values(down_),
          .gate_up_bias = params.values(gated ? gate_bias_ : up_bias_, 0, u),
          .down_bias = params.values(down_bias_)};
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
  const std::int64_t u = shape_.gate_up_size();
  const TensorView dy_padded = ctx.scratch.allocate(dy.dtype, rows, h, ffn_row_stride(h));
  const TensorView dgate_up = ctx.scratch.allocate(dy.dtype, rows, u, ffn_row_stride(u));
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
                         .dgate_bias = params.sums(gate_bias_),
                         .dup_bias = params.sums(up_bias_),
                         .ddown_bias = params.sums(down_bias_),
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
