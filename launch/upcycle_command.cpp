#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <cmath>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "launch/checks.hpp"
#include "launch/commands.hpp"
#include "launch/new_run.hpp"
#include "launch/portable.hpp"
#include "launch/probe.hpp"
#include "launch/run_folder.hpp"
#include "launch/run_setup.hpp"
#include "launch/session.hpp"
#include "launch/version.hpp"
#include "src/base/error.hpp"
#include "src/model/upcycle.hpp"

namespace arcus {
namespace {

struct Arguments {
  std::string from;
  std::string out;
  std::string data;
  std::vector<std::string> sets;
  UpcycleOptions options;
  bool check = true;
};

constexpr const char* kFooter =
    "Every dense feed-forward layer becomes E experts, copies of it, behind a new gate. With\n"
    "renormalized weights (the default) and no noise the new model computes what the dense one\n"
    "does; both are evaluated, on held-out text where there is some, and the difference is "
    "printed.\n"
    "--granularity G cuts each copy into G experts of a G-th of the width, E and K multiples of "
    "G.\n"
    "Training goes on with `arcus train --init`.\n"
    "\n"
    "Examples:\n"
    "  arcus import --from models/llama --out runs/llama\n"
    "  arcus upcycle --from runs/llama --experts 8 --topk 2 --out runs/upcycled\n"
    "  arcus upcycle --from runs/llama --experts 64 --topk 8 --granularity 8 --out runs/granular\n"
    "  arcus upcycle --from runs/qwen --experts 8 --topk 2 --set routing.score=sigmoid --out "
    "runs/q";

Config upcycled_config(const Arguments& arguments, const Config& before, const ModelConfig& dense) {
  Config config = before;
  config.routing = RoutingConfig();
  config.routing_overrides.clear();
  for (const std::string& assignment : arguments.sets) {
    ARCUS_REQUIRE(!assignment.starts_with("model."), ExitCode::usage,
                  "--set {}: what the model is follows from the dense one and the options; leave "
                  "it out",
                  assignment);
    apply_set(config, assignment);
  }
  config.model = upcycled_model(dense, config.routing, arguments.options);
  config.lora = {};       // merged into the weights
  config.groups.clear();  // they may name what is no longer there
  config.run.dir = arguments.out;
  config.parallel = ParallelConfig();
  validate(config);
  return config;
}

std::vector<char> make_tensor(const Upcycling& upcycling, const UnitReader& read,
                              const TensorSpec& spec) {
  std::vector<char> bytes(static_cast<std::size_t>(spec.num_elements()) * sizeof(float));
  upcycling.make(
      spec, [&](const std::string& name, std::span<float> out) { read({name}, out); },
      {reinterpret_cast<float*>(bytes.data()), static_cast<std::size_t>(spec.num_elements())});
  ARCUS_REQUIRE(all_finite({reinterpret_cast<const float*>(bytes.data()),
                            static_cast<std::size_t>(spec.num_elements())}),
                ExitCode::usage,
                "{} would hold numbers that are not finite; lower --noise, or the dense model is "
                "damaged",
                spec.name);
  return bytes;
}

void print_difference(const ProbeDifference& d, const ProbeTexts& texts, bool preserves) {
  fmt::print(
      "on {} tokens of {}:\n  loss {:.6f} dense, {:.6f} upcycled; logits differ by up to "
      "{:.3g} (std {:.3g})\n",
      d.tokens, texts.source, d.loss_before, d.loss_after, d.max_logit, d.logit_std);
  constexpr double kRounding = 1e-4;
  if (preserves && !(d.max_logit <= kRounding * std::max(1.0, d.logit_std))) {
    spdlog::warn("that is more than rounding explains; the dense model may be badly conditioned");
  }
}

ExitCode run_on_ranks(Session& session, const Arguments& arguments) {
  Checkpoint checkpoint;
  Config before, config;
  std::optional<Upcycling> upcycling;
  session.together([&] {
    checkpoint = open_checkpoint(locate_checkpoint(arguments.from));
    before = from_toml(checkpoint.info.config_text, "the checkpoint's configuration");
    const ModelConfig dense = stored_model(checkpoint, before);
    config = upcycled_config(arguments, before, dense);
    upcycling.emplace(dense, config.routing, arguments.options);
  });
  const PortableModel after = portable_model(config, upcycling->model());
  CheckpointInfo info{.config_text = to_toml(config),
                      .run_id = new_run_id(),
                      .created_by = "arcus " + version_line() + ", upcycle"};
  for (const char* key :
       {extra_key::kTokenizerKind, extra_key::kTokenizer, extra_key::kPairTemplate}) {
    if (checkpoint.info.extra.contains(key)) info.extra[key] = checkpoint.info.extra.at(key);
  }
  session.together([&] {
    ARCUS_REQUIRE(arguments.data.empty() || std::filesystem::exists(arguments.data), ExitCode::data,
                  "--data {}: no such folder", arguments.data);
  });
  ProbeTexts texts;
  if (arguments.check) {
    texts = choose_probe_texts(session, arguments.data.empty() ? before.run.data : arguments.data,
                               before, upcycling->model().vocab_size);
  }
  NewRun run(session, arguments.out);
  const UnitReader read = read_from(checkpoint, before.lora);
  const SaveReport report = run.save(info, portable_tensors(after), [&](const TensorSpec& spec) {
    return make_tensor(*upcycling, read, spec);
  });
  const ModelConfig& m = upcycling->model();
  if (session.is_root()) {
    fmt::print("{}: {} experts of {} columns, {} per token, in {} of {} layers, {:.1f} MB\n",
               report.path.string(), m.num_experts, m.expert_ff_size, m.topk,
               m.num_layers - m.first_k_dense, m.num_layers,
               static_cast<double>(report.bytes) / 1e6);
    const std::string reason = why_not_exportable(config, m);
    if (!reason.empty()) spdlog::warn("what is trained from it cannot be exported: {}", reason);
  }
  if (!arguments.check) return ExitCode::ok;
  const std::int64_t longest = texts.longest();
  const auto probe_checkpoint = [&](const std::filesystem::path& path) {
    LoadedModel loaded = load_for_logits(session, path, {}, longest, /*exact=*/true);
    return probe(*loaded.instance, texts);
  };
  const ProbeResult dense = probe_checkpoint(checkpoint.path);
  const ProbeResult upcycled = probe_checkpoint(report.path);
  if (session.is_root()) {
    print_difference(compare(dense, upcycled), texts,
                     preserves_function(arguments.options, config.routing));
  }
  return ExitCode::ok;
}

}  // namespace

void add_upcycle_command(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand("upcycle", "A mixture-of-experts run from a dense model");
  auto args = std::make_shared<Arguments>();
  command->add_option("--from", args->from, "run folder or checkpoint of a dense model")
      ->required()
      ->type_name("DENSE");
  command->add_option("--experts", args->options.num_experts, "experts of a layer")
      ->required()
      ->check(whole_number(1, 1 << 20))
      ->type_name("E");
  command->add_option("--topk", args->options.topk, "experts per token")
      ->required()
      ->check(whole_number(1, 1 << 20))
      ->type_name("K");
  command->add_option("--out", args->out, "folder of the new run")->required()->type_name("DIR");
  command
      ->add_option("--granularity", args->options.granularity,
                   "experts that a copy of the dense layer is cut into")
      ->capture_default_str()
      ->check(whole_number(1, 1 << 20))
      ->type_name("G");
  command
      ->add_option("--noise", args->options.noise,
                   "added to the experts' weights, relative to their root mean square")
      ->capture_default_str()
      ->check(number_of_at_least(0))
      ->type_name("S");
  command
      ->add_option("--scaling", args->options.scaling,
                   "of shards: exact (nothing changes) or literature (all weights alike)")
      ->capture_default_str()
      ->type_name("HOW");
  command
      ->add_option("--first-dense", args->options.first_k_dense, "leading layers that stay dense")
      ->capture_default_str()
      ->check(whole_number(0, 1 << 20))
      ->type_name("N");
  command
      ->add_option("--set", args->sets, "a key of the new run's configuration; may be given again")
      ->expected(1)
      ->take_all()
      ->type_name("KEY=VALUE");
  command->add_option("--data", args->data, "data set to compare on; default: the dense run's")
      ->type_name("DIR");
  command->add_option("--seed", args->options.seed, "of the gate and the noise")
      ->capture_default_str()
      ->type_name("N");
  command->add_flag("--check,!--no-check", args->check,
                    "evaluate both models and print the difference (on by default)");
  command->footer(kFooter);
  command->callback([&action, args] {
    action = [args] {
      return run_session({}, [args](Session& session) { return run_on_ranks(session, *args); });
    };
  });
}

}  // namespace arcus
