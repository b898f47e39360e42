#include <fmt/format.h>

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "checkpoints/checkpoint.hpp"
#include "launch/adapters.hpp"
#include "launch/commands.hpp"
#include "launch/rewrite.hpp"
#include "launch/run_config.hpp"
#include "launch/session.hpp"
#include "src/base/error.hpp"
#include "src/model/lora.hpp"

namespace arcus {
namespace {

struct Arguments {
  std::string path;
  std::string out;
};

constexpr const char* kFooter =
    "Every weight W with adapters A and B becomes W + alpha / rank B A, formed in double "
    "precision\n"
    "and rounded once; all others stay as they are. What comes out holds weights alone: it can be\n"
    "evaluated, exported, and started from with `arcus train --init`.\n"
    "\n"
    "Examples:\n"
    "  arcus merge runs/tuned --out runs/merged\n"
    "  arcus eval runs/merged";

class Merging final : public Rewriting {
 public:
  Merging(const Checkpoint& checkpoint, const LoraConfig& lora)
      : checkpoint_(checkpoint), lora_(lora) {}

  std::optional<TensorSpec> rewritten(const TensorSpec& before) const override {
    const std::string& name = before.name;
    const bool of_training = name.starts_with("optimizer/") || name.starts_with("counters/");
    if (of_training || lora_base_name(name)) return std::nullopt;
    return before;
  }

  std::vector<char> read(TensorReader& reader, const StoredTensor& tensor,
                         const TensorSpec& after) const override {
    std::vector<char> bytes(static_cast<std::size_t>(tensor.bytes()));
    reader.read(tensor, bytes.data());
    const auto adapters = StoredAdapters::find(checkpoint_, lora_, after);
    if (!adapters) return bytes;
    const std::span<float> w(reinterpret_cast<float*>(bytes.data()),
                             static_cast<std::size_t>(after.num_elements()));
    const std::size_t size = w.size() / static_cast<std::size_t>(after.num_units);
    for (std::int64_t unit = 0; unit < after.num_units; ++unit) {
      adapters->merge(reader, unit, w.subspan(static_cast<std::size_t>(unit) * size, size));
    }
    return bytes;
  }

 private:
  const Checkpoint& checkpoint_;
  LoraConfig lora_;
};

ExitCode run_on_ranks(Session& session, const Arguments& arguments) {
  Checkpoint checkpoint;
  Config before, config;
  session.together([&] {
    ARCUS_REQUIRE(!arguments.out.empty(), ExitCode::usage, "--out must name a folder");
    checkpoint = open_checkpoint(locate_checkpoint(arguments.path));
    before = from_toml(checkpoint.info.config_text, "the checkpoint's configuration");
    ARCUS_REQUIRE(before.lora.active(), ExitCode::usage,
                  "{} has no adapters (its train.lora.rank is 0); there is nothing to merge",
                  checkpoint.path.string());
    config = before;
    config.lora = {};
    config.groups.clear();  // they may name what is no longer there
    config.run.dir = arguments.out;
  });
  const Merging merging(checkpoint, before.lora);
  const SaveReport report =
      rewrite_checkpoint(session, checkpoint, {arguments.out, "merge", config}, merging);
  if (session.is_root()) {
    fmt::print("{}: step {}, adapters of rank {} merged into their weights, {:.1f} MB\n",
               report.path.string(), checkpoint.info.step, before.lora.rank,
               static_cast<double>(report.bytes) / 1e6);
  }
  return ExitCode::ok;
}

}  // namespace

void add_merge_command(CLI::App& app, Action& action) {
  CLI::App* command =
      app.add_subcommand("merge", "A checkpoint whose low-rank adapters are part of the weights");
  auto args = std::make_shared<Arguments>();
  command->add_option("path", args->path, "run folder or checkpoint")->required();
  command->add_option("--out", args->out, "folder of the new run")->required()->type_name("DIR");
  command->footer(kFooter);
  command->callback([&action, args] {
    action = [args] {
      return run_session({}, [&](Session& session) { return run_on_ranks(session, *args); });
    };
  });
}

}  // namespace arcus
