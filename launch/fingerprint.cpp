#include "launch/fingerprint.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <vector>

#include "comm/backends.hpp"
#include "launch/version.hpp"
#include "src/base/error.hpp"
#include "src/base/hash.hpp"
#include "src/base/rng.hpp"

namespace arcus {
namespace {

constexpr std::int64_t kSeqLen = 48;

/// The run's model with one layer of each kind, so that the problem is small.
TrainerOptions small_problem(TrainerOptions options) {
  options.model.first_k_dense = std::min<std::int64_t>(options.model.first_k_dense, 1);
  options.model.num_layers = options.model.first_k_dense + 1;
  options.train.seq_len = kSeqLen;
  options.train.micro_batch_seqs = 1;
  options.train.global_batch_seqs = 1;
  options.groups.clear();
  options.seed = 1;
  return options;
}

std::uint64_t hash_of_sums(const ParamStore& params) {
  std::vector<std::uint64_t> hashes;
  for (const FlatId flat : kFlatIds) {
    const TensorView sums = params.flat_sums(flat);
    const auto bytes = static_cast<std::size_t>(sums.size()) * size_of(sums.dtype);
    hashes.push_back(hash_bytes(sums.data, bytes));
  }
  return hash_of_hashes(hashes);
}

std::uint64_t solve(const TrainerOptions& options, Stream& stream) {
  auto world = make_self_communicator({.reproducible = options.reproducible});
  ModelInstance instance(make_process_groups(*world, 1), stream, instance_options(options));
  instance.initialize_parameters();
  instance.params().zero_sums();

  const Rng rng(1, "fingerprint", "tokens");
  std::vector<std::int32_t> ids;
  for (std::int64_t t = 0; t <= kSeqLen; ++t) {
    const auto draw = static_cast<double>(rng.uniform(0, static_cast<std::uint64_t>(t)));
    ids.push_back(static_cast<std::int32_t>(draw * static_cast<double>(options.model.vocab_size)));
  }
  BatchBuffers buffers(1, kSeqLen);
  const auto inputs = std::span(ids).first(static_cast<std::size_t>(kSeqLen));
  const auto targets = std::span(ids).last(static_cast<std::size_t>(kSeqLen));
  MicroBatch batch = buffers.fill(inputs, targets, 0);
  batch.loss_scale = 1.0 / kSeqLen;
  batch.weight = 1;

  MicroBatchStats stats = instance.transformer().make_stats();
  auto workspace = instance.transformer().make_workspace();
  PassContext ctx{.stream = stream,
                  .saved = instance.saved(),
                  .scratch = instance.scratch(),
                  .batch = batch,
                  .stats = stats,
                  .training = true};
  instance.transformer().train(ctx, instance.params(), instance.dispatcher(), workspace, false);
  const std::uint64_t parts[] = {hash_of_sums(instance.params()),
                                 hash_bytes(&stats.token_loss_sum, sizeof(double))};
  return hash_of_hashes(parts);
}

}  // namespace

std::string numeric_fingerprint(const TrainerOptions& options, Stream& stream) {
  return fmt::format("{}, {}", arithmetic_libraries(), hex(solve(small_problem(options), stream)));
}

void check_fingerprints(Communicator& world, Stream& stream, const std::string& fingerprint,
                        bool reproducible) {
  const auto all = gather_texts(world, stream, fingerprint);
  std::vector<std::size_t> others;
  for (std::size_t rank = 0; rank < all.size(); ++rank) {
    if (all[rank] != all[0]) others.push_back(rank);
  }
  if (others.empty()) return;
  const std::string message = fmt::format(
      "ranks {} compute other bits than rank 0 ({} against {}): their processors or libraries "
      "differ",
      fmt::join(others, ", "), all[others[0]], all[0]);
  agree_on_errors(world, stream, [&] {
    ARCUS_REQUIRE(!reproducible, ExitCode::usage,
                  "{}; use equal nodes, lower all to one level (ONEDNN_MAX_CPU_ISA), or set "
                  "run.reproducible = false",
                  message);
  });
  if (world.rank() == 0) spdlog::warn("{}; results depend on the layout", message);
}

}  // namespace arcus
