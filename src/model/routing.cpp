#include "src/model/routing.hpp"

#include <array>

#include "src/base/error.hpp"

namespace arcus {
namespace {

void select_largest(PassContext& ctx, const ModelConfig&, const RoutingConfig&, Routing& routing) {
  select_topk(ctx.stream, {.topk_idx = routing.topk_idx, .s = routing.s});
}

constexpr std::array kScores{ScoreRow{"softmax", Score::softmax}};
constexpr std::array kSelects{SelectRow{"topk", select_largest}};
void report_aux(const RoutingConfig& config, const MicroBatch& batch, const BalanceValues& values,
                std::size_t layer, MicroBatchStats& stats) {
  stats.aux_loss[layer] = config.aux_loss * batch.weight * values.aux;
}
void add_aux_gradient(const RoutingConfig& config, const MicroBatch& batch, GateBackward& args) {
  args.aux_coeff = config.aux_loss * batch.weight;
}

void report_z(const RoutingConfig& config, const MicroBatch& batch, const BalanceValues& values,
              std::size_t layer, MicroBatchStats& stats) {
  stats.z_loss[layer] = config.z_loss * batch.weight * values.z_loss;
}
void add_z_gradient(const RoutingConfig& config, const MicroBatch& batch, GateBackward& args) {
  args.z_coeff = config.z_loss * batch.weight;
}

constexpr std::array kBalances{BalanceRow{"aux_loss", report_aux, add_aux_gradient},
                               BalanceRow{"z_loss", report_z, add_z_gradient}};

template <class Table>
const auto& find(const Table& table, std::string_view key, std::string_view name) {
  std::string known;
  for (const auto& row : table) {
    if (row.name == name) return row;
    known += fmt::format("{}\"{}\"", known.empty() ? "" : ", ", row.name);
  }
  ARCUS_FAIL(ExitCode::usage, "routing.{} is \"{}\"; it must be one of {}", key, name, known);
}

}  // namespace

std::span<const ScoreRow> score_table() { return kScores; }
std::span<const SelectRow> select_table() { return kSelects; }
std::span<const BalanceRow> balance_table() { return kBalances; }

const ScoreRow& find_score(std::string_view name) { return find(kScores, "score", name); }
const SelectRow& find_select(std::string_view name) { return find(kSelects, "select", name); }

std::int64_t aux_group_tokens(const RoutingConfig& config, const MicroBatch& batch) {
  return config.aux_scope == "sequence" ? batch.seq_len : batch.num_real_tokens();
}

}  // namespace arcus
