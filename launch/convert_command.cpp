#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "checkpoints/checkpoint.hpp"
#include "launch/checks.hpp"
#include "launch/commands.hpp"
#include "launch/rewrite.hpp"
#include "launch/run_setup.hpp"
#include "launch/session.hpp"
#include "src/base/error.hpp"
#include "src/model/expert_count.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;

struct Arguments {
  std::string path;
  std::string out;
  std::string keep;
  std::vector<std::string> sets;
  std::int64_t num_experts = 0;
  std::int64_t topk = 0;  ///< 0 = as it is
  double noise = 0.01;
  std::uint64_t seed = 1;
};

constexpr const char* kFooter =
    "Every other command takes a checkpoint's experts as they are; this one writes a new run's "
    "first\n"
    "checkpoint, of the same step, with optimizer state and all. New expert e is a copy of expert "
    "e\n"
    "mod E, and copies' gate rows get a little noise so that they part. Fewer experts need "
    "--keep:\n"
    "which ones stay, in every layer. N a multiple m of E, --topk m times as large and --noise 0 "
    "keep\n"
    "what the model computes where the gate takes the largest of all scores (routing.select = "
    "topk,\n"
    "n_group = 1, no topk in overrides), renormalized or of a softmax, and nothing is dropped.\n"
    "A large model goes through several ranks' memory: mpirun -np 4 arcus convert ...\n"
    "\n"
    "Examples:\n"
    "  arcus convert runs/small --num-experts 16 --out runs/wide\n"
    "  arcus convert runs/small --num-experts 16 --topk 4 --noise 0 --out runs/same\n"
    "  arcus convert runs/small --num-experts 5 --keep 0-3,7 --out runs/less\n"
    "  arcus inspect --config runs/wide > wide.toml; arcus train wide.toml            # goes on";

/// "0-3,7" as numbers.
std::vector<std::int64_t> parse_keep(const std::string& text, std::int64_t num_experts) {
  std::vector<std::int64_t> experts;
  const char* at = text.data();
  const char* const end = at + text.size();
  const auto number = [&] {
    std::int64_t value = -1;
    const auto [next, error] = std::from_chars(at, end, value);
    ARCUS_REQUIRE(error == std::errc() && value >= 0 && value < num_experts, ExitCode::usage,
                  "--keep {}: must be experts of 0 to {}, such as 0-3,7", text, num_experts - 1);
    at = next;
    return value;
  };
  while (at < end) {
    const std::int64_t first = number();
    std::int64_t last = first;
    if (at < end && *at == '-') {
      ++at;
      last = number();
    }
    for (std::int64_t e = first; e <= last; ++e) experts.push_back(e);
    ARCUS_REQUIRE(last >= first && (at == end || (*at == ',' && at + 1 < end)), ExitCode::usage,
                  "--keep {}: must be experts of 0 to {}, such as 0-3,7", text, num_experts - 1);
    if (at < end) ++at;
  }
  return experts;
}

ExpertMap choose_experts(const Arguments& arguments, std::int64_t num_before) {
  const std::int64_t num_after = arguments.num_experts;
  ARCUS_REQUIRE(num_after != num_before, ExitCode::usage,
                "{} has {} experts already; --num-experts asks for as many", arguments.path,
                num_before);
  if (arguments.keep.empty()) {
    ARCUS_REQUIRE(num_after > num_before, ExitCode::usage,
                  "--num-experts {} is less than the model's {}: --keep says which ones stay, "
                  "such as --keep 0-{}",
                  num_after, num_before, num_after - 1);
    return ExpertMap::repeated(num_before, num_after);
  }
  std::vector<std::int64_t> kept = parse_keep(arguments.keep, num_before);
  ARCUS_REQUIRE(static_cast<std::int64_t>(kept.size()) == num_after, ExitCode::usage,
                "--keep {} names {} experts, --num-experts {}", arguments.keep, kept.size(),
                num_after);
  return {num_before, std::move(kept)};
}

Config converted_config(const Arguments& arguments, Config config) {
  // Zero stands for topk expert_ff_size, which must not change with topk.
  if (config.model.dense_ff_size == 0) {
    config.model.dense_ff_size = config.model.topk * config.model.expert_ff_size;
  }
  config.model.num_experts = arguments.num_experts;
  if (arguments.topk > 0) config.model.topk = arguments.topk;
  if (config.parallel.ep_size > config.model.num_experts) config.parallel.ep_size = 0;
  for (const std::string& assignment : arguments.sets) {
    ARCUS_REQUIRE(!assignment.starts_with("model."), ExitCode::usage,
                  "--set {}: what the model is besides its experts does not change; leave it out",
                  assignment);
    apply_set(config, assignment);
  }
  config.run.dir = arguments.out;
  validate(config);
  return config;
}

/// optimizer/m/NAME and optimizer/v/NAME belong to NAME.
std::string parameter_of(const std::string& tensor) {
  constexpr std::string_view kOptimizer = "optimizer/";
  if (!tensor.starts_with(kOptimizer)) return tensor;
  return tensor.substr(tensor.find('/', kOptimizer.size()) + 1);
}

class Conversion final : public Rewriting {
 public:
  Conversion(const Checkpoint& checkpoint, const Config& config, ExpertMap experts,
             const Arguments& arguments)
      : checkpoint_(checkpoint),
        experts_(std::move(experts)),
        arguments_(arguments),
        by_expert_(tensors_by_expert(config.model, config.routing, resolve_overrides(config),
                                     config.lora)) {}

  std::optional<TensorSpec> rewritten(const TensorSpec& before) const override {
    TensorSpec spec = before;
    if (!of_experts(spec)) return spec;
    ARCUS_REQUIRE(!spec.shape.empty() && spec.shape[0] == experts_.num_before(),
                  ExitCode::checkpoint, "{}: {} has {} experts, the configuration {}",
                  checkpoint_.path.string(), spec.name, spec.shape.empty() ? 0 : spec.shape[0],
                  experts_.num_before());
    spec.shape[0] = experts_.num_after();
    if (spec.num_units == experts_.num_before()) spec.num_units = experts_.num_after();
    return spec;
  }

  std::vector<char> read(TensorReader& reader, const StoredTensor& tensor,
                         const TensorSpec& after) const override {
    std::vector<char> bytes(static_cast<std::size_t>(tensor.bytes()));
    reader.read(tensor, bytes.data());
    if (!of_experts(tensor.spec)) return bytes;
    std::vector<char> result(static_cast<std::size_t>(after.num_elements()) * size_of(after.dtype));
    // Counts of the step before say nothing of the new experts: as before the first step.
    if (after.name.starts_with("balance/")) return result;
    experts_.gather(bytes, result);
    if (after.name.ends_with(".gate.weight") && after.name == parameter_of(after.name)) {
      part_copies(experts_, after.name, arguments_.seed, arguments_.noise,
                  {reinterpret_cast<float*>(result.data()),
                   static_cast<std::size_t>(after.num_elements())});
    }
    return result;
  }

 private:
  bool of_experts(const TensorSpec& spec) const {
    return by_expert_.contains(parameter_of(spec.name));
  }

  const Checkpoint& checkpoint_;
  ExpertMap experts_;
  const Arguments& arguments_;
  std::set<std::string> by_expert_;
};

ExitCode run_on_ranks(Session& session, const Arguments& arguments) {
  Checkpoint checkpoint;
  Config before;
  Config config;
  std::unique_ptr<Conversion> conversion;
  session.together([&] {
    ARCUS_REQUIRE(!arguments.out.empty(), ExitCode::usage, "--out must name a folder");
    checkpoint = open_checkpoint(locate_checkpoint(arguments.path));
    before = from_toml(checkpoint.info.config_text, "the checkpoint's configuration");
    ExpertMap experts = choose_experts(arguments, before.model.num_experts);
    config = converted_config(arguments, before);
    conversion = std::make_unique<Conversion>(checkpoint, before, std::move(experts), arguments);
  });
  const SaveReport report =
      rewrite_checkpoint(session, checkpoint, {arguments.out, "convert", config}, *conversion);
  if (session.is_root()) {
    fmt::print("{}: step {}, {} experts instead of {}, {:.1f} MB\n", report.path.string(),
               checkpoint.info.step, config.model.num_experts, before.model.num_experts,
               static_cast<double>(report.bytes) / 1e6);
    fmt::print("changed in its configuration:\n{}\n", differences(before, config));
    for (const RoutingOverrideRow& row : config.routing_overrides) {
      if (arguments.topk == 0 || !row.given.contains("topk")) continue;
      fmt::print("note: routing.override for layers {} keeps its topk of {}\n", row.layers,
                 row.topk);
    }
  }
  return ExitCode::ok;
}

}  // namespace

void add_convert_command(CLI::App& app, Action& action) {
  CLI::App* command =
      app.add_subcommand("convert", "A checkpoint with more or fewer experts, for a new run");
  auto args = std::make_shared<Arguments>();
  command->add_option("path", args->path, "run folder or checkpoint")->required();
  command->add_option("--num-experts", args->num_experts, "experts afterwards")
      ->required()
      ->check(whole_number(1, 1 << 24))
      ->type_name("N");
  command->add_option("--out", args->out, "folder of the new run")->required()->type_name("DIR");
  command->add_option("--keep", args->keep, "the experts that stay, in their new order")
      ->type_name("LIST");
  command->add_option("--topk", args->topk, "experts per token afterwards; default: as before")
      ->check(whole_number(1, 1 << 24))
      ->type_name("K");
  command
      ->add_option("--noise", args->noise,
                   "of copies' gate rows, relative to their root mean square")
      ->capture_default_str()
      ->check(number_of_at_least(0))
      ->check(CLI::Range(0.0, 1.0))
      ->type_name("X");
  command
      ->add_option("--set", args->sets,
                   "change a key of the configuration, where the number of experts asks for it")
      ->expected(1)
      ->take_all()
      ->type_name("KEY=VALUE");
  command->add_option("--seed", args->seed, "of the noise")->capture_default_str()->type_name("N");
  command->footer(kFooter);
  command->callback([&action, args] {
    action = [args] {
      return run_session({}, [&](Session& session) { return run_on_ranks(session, *args); });
    };
  });
}

}  // namespace arcus
