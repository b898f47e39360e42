#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "launch/checks.hpp"
#include "launch/commands.hpp"
#include "launch/memory_check.hpp"
#include "launch/run_setup.hpp"
#include "launch/session.hpp"
#include "launch/signals.hpp"
#include "launch/threads.hpp"
#include "launch/train_run.hpp"
#include "src/base/error.hpp"
#include "src/base/log.hpp"
#include "src/train/plan.hpp"

namespace arcus {
namespace {

struct Arguments {
  std::string config;
  std::vector<std::string> sets;
  RunStart start;
  bool plan = false;
  int ranks = 1;
  int ranks_per_node = 0;
};

constexpr const char* kFooter =
    "The run lives in [run] dir: checkpoints/, metrics.jsonl, run.log. Started again, it goes on "
    "from\n"
    "its latest checkpoint, on any number of ranks. USR1, TERM and Ctrl-C save a checkpoint at "
    "the\n"
    "step's end and exit with 75.\n"
    "\n"
    "With --init a new run starts at step 0 from a checkpoint's weights; what the model is then\n"
    "comes from the checkpoint, and [model] and [routing] may be left out of the file.\n"
    "\n"
    "Examples:\n"
    "  arcus train launch/configs/quickstart.toml --set run.max_minutes=2\n"
    "  arcus train tune.toml --init runs/quickstart --set train.lora.rank=8\n"
    "  mpirun -np 4 arcus train my.toml --set train.lr=1e-3 --set parallel.ep_size=2\n"
    "  arcus train my.toml --plan --ranks 16     # what it needs, without starting it\n"
    "  arcus help config                         # every key of a configuration file";

int print_plan(const Arguments& arguments) {
  init_log(0, 1);
  const LoadedConfig loaded =
      try_load_run_config(arguments.config, arguments.sets, arguments.start);
  if (loaded.error) std::rethrow_exception(loaded.error);
  const Config& config = loaded.config;
  std::optional<TokenDataset> dataset;
  if (!config.run.data.empty() &&
      (config.model.vocab_size == 0 || std::filesystem::exists(config.run.data))) {
    dataset.emplace(TokenDataset::open(config.run.data));
  }
  const TokenDataset* data = dataset ? &*dataset : nullptr;
  const int threads = config.parallel.threads > 0
                          ? static_cast<int>(config.parallel.threads)
                          : std::max(1, available_cores() / arguments.ranks);
  const TrainerOptions options = trainer_options(config, resolve_model(config, data));
  const int per_node = arguments.ranks_per_node > 0 ? arguments.ranks_per_node : arguments.ranks;
  TrainPlan plan = make_plan(options, arguments.ranks, per_node, config.parallel.ep_size, threads);
  const std::int64_t available = memory_per_rank(per_node);
  std::string tight;
  if (available > 0) {
    tight = memory_fit(options, plan, per_node, config.parallel.ep_size, available).text;
  }
  plan_background_saves(plan, config, available);
  fmt::print("{}", to_text(plan));
  if (!tight.empty()) spdlog::warn("on a machine like this one {}", tight);
  for (const std::string& line : keys_without_effect(config)) spdlog::warn("{}", line);
  return static_cast<int>(ExitCode::ok);
}

ExitCode train(Session& session, const LoadedConfig& loaded, const Arguments& arguments) {
  session.together([&] {
    if (loaded.error) std::rethrow_exception(loaded.error);
    for (const auto& [name, value] :
         {std::pair{"dir", &loaded.config.run.dir}, std::pair{"data", &loaded.config.run.data}}) {
      ARCUS_REQUIRE(!value->empty(), ExitCode::usage,
                    "run.{0} is not set; set it in {1} or with --set run.{0}=FOLDER", name,
                    arguments.config);
    }
  });
  check_same_config(session, loaded.config);
  TrainRun run(session, loaded.config, arguments.start);
  return run.run();
}

int run_train(const Arguments& arguments) {
  if (arguments.plan) return print_plan(arguments);
  // Before the ranks meet: a launcher that is told to stop tells ranks that are still starting.
  install_signal_handlers();
  const LoadedConfig loaded =
      try_load_run_config(arguments.config, arguments.sets, arguments.start);
  return run_session({.reproducible = loaded.config.run.reproducible},
                     [&](Session& session) { return train(session, loaded, arguments); });
}

}  // namespace

void add_train_command(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand("train", "Train a model, or go on with a run");
  auto args = std::make_shared<Arguments>();
  command->add_option("config", args->config, "configuration file")
      ->required()
      ->type_name("CONFIG.toml");
  command->add_option("--set", args->sets, "override a key of the file; may be given again")
      ->expected(1)
      ->take_all()
      ->type_name("KEY=VALUE");
  command
      ->add_option("--resume", args->start.resume,
                   "auto (the run's latest checkpoint), none (start anew), or a checkpoint")
      ->capture_default_str()
      ->type_name("WHAT");
  CLI::Option* init =
      command
          ->add_option("--init", args->start.init.path,
                       "start from the weights of another run's, or an imported, checkpoint")
          ->type_name("CHECKPOINT");
  command
      ->add_option("--fresh", args->start.init.fresh,
                   "with --init: tensors whose name matches keep their initial values; may be "
                   "given again")
      ->needs(init)
      ->expected(1)
      ->take_all()
      ->type_name("REGEX");
  CLI::Option* plan = command->add_flag(
      "--plan", args->plan, "print parameters, layout, memory and steps, then exit; needs no MPI");
  command->add_option("--ranks", args->ranks, "ranks to plan for")
      ->needs(plan)
      ->capture_default_str()
      ->check(whole_number(1, 1 << 24))
      ->type_name("N");
  command->add_option("--ranks-per-node", args->ranks_per_node, "of them on a node; 0 = all on one")
      ->needs(plan)
      ->capture_default_str()
      ->check(whole_number(0, 1 << 24))
      ->type_name("N");
  command->footer(kFooter);
  command->callback([&action, args] {
    const Action train = [args] { return run_train(*args); };
    action = args->plan ? once(train) : train;
  });
}

}  // namespace arcus
