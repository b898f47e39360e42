#include <memory>
#include <string>
#include <vector>

#include "launch/bench.hpp"
#include "launch/checks.hpp"
#include "launch/commands.hpp"
#include "launch/run_setup.hpp"

namespace arcus {
namespace {

using Benchmark = ExitCode (*)(Session&, const BenchOptions&);

struct Arguments {
  std::string config;
  std::vector<std::string> sets;
  BenchOptions options;
  Benchmark benchmark = nullptr;
};

constexpr const char* kFooter =
    "Machines differ, so every figure stands beside what the same run measured of the machine. "
    "The\n"
    "model is the one of launch/configs/bench.toml unless --config names another.\n"
    "\n"
    "Examples:\n"
    "  arcus bench gemm --set parallel.threads=2 --set train.dtype=bf16\n"
    "  mpirun -np 4 arcus bench dispatch\n"
    "  mpirun -np 2 arcus bench step --set parallel.threads=1 --repeats 30 --account";

/// The defaults of a Config are the bench model; its tokens are bytes.
LoadedConfig load(const Arguments& arguments) {
  if (!arguments.config.empty()) return try_load_config(arguments.config, arguments.sets);
  LoadedConfig loaded;
  try {
    loaded.config.model.vocab_size = 256;
    for (const std::string& assignment : arguments.sets) apply_set(loaded.config, assignment);
    validate(loaded.config);
    check_device(loaded.config);
  } catch (...) {
    loaded.error = std::current_exception();
  }
  return loaded;
}

int run_bench(const Arguments& arguments) {
  const LoadedConfig loaded = load(arguments);
  // Plain sums are measured for comparison, so reductions of numbers are allowed here.
  return run_session({.reproducible = false}, [&](Session& session) {
    session.together([&] {
      if (loaded.error) std::rethrow_exception(loaded.error);
    });
    BenchOptions options = arguments.options;
    options.config = loaded.config;
    return arguments.benchmark(session, options);
  });
}

CLI::App* add_benchmark(CLI::App& bench, Action& action, const std::shared_ptr<Arguments>& args,
                        const char* name, const char* description, Benchmark benchmark) {
  CLI::App* command = bench.add_subcommand(name, description);
  command->add_option("--config", args->config, "configuration of another model")
      ->type_name("CONFIG.toml");
  command->add_option("--set", args->sets, "override a key, e.g. train.dtype=bf16")
      ->expected(1)
      ->take_all()
      ->type_name("KEY=VALUE");
  command
      ->add_option("--repeats", args->options.repeats,
                   "samples of each figure; the median is printed")
      ->capture_default_str()
      ->check(whole_number(1, 1 << 20))
      ->type_name("N");
  command->footer(kFooter);
  command->callback([&action, args, benchmark] {
    args->benchmark = benchmark;
    action = [args] { return run_bench(*args); };
  });
  return command;
}

}  // namespace

void add_bench_command(CLI::App& app, Action& action) {
  CLI::App* bench = app.add_subcommand("bench", "Measure the parts of a training step");
  bench->require_subcommand(1);
  bench->footer(kFooter);
  auto args = std::make_shared<Arguments>();
  add_benchmark(*bench, action, args, "gemm",
                "Experts' matrix products against the machine's own peak", bench_gemm);
  CLI::App* checkpoint =
      add_benchmark(*bench, action, args, "checkpoint",
                    "Saving and loading against plain files of the same bytes", bench_checkpoint);
  checkpoint->add_option("--dir", args->options.dir, "folder to write in, on the disk in question")
      ->capture_default_str()
      ->check(CLI::ExistingDirectory)
      ->type_name("DIR");
  checkpoint->add_option("--mib", args->options.mib, "size of the state")
      ->capture_default_str()
      ->check(whole_number(1, 1 << 20))
      ->type_name("N");
  CLI::App* dispatch =
      add_benchmark(*bench, action, args, "dispatch",
                    "Dispatch and combine against the MPI library's Alltoallv", bench_dispatch);
  dispatch->add_flag("--overlap", args->options.overlap,
                     "also how much of an exchange hides behind the feed-forward of other rows");
  add_benchmark(*bench, action, args, "generate",
                "New tokens with a KV cache against the memory's speed", bench_generate);
  CLI::App* step = add_benchmark(*bench, action, args, "step",
                                 "Whole training steps against a roofline", bench_step);
  step->add_flag("--account", args->options.account,
                 "where the time of a step goes, per rank and on average");
  step->add_option("--trace", args->options.trace,
                   "file for the spans of one step, for Perfetto or chrome://tracing")
      ->type_name("FILE.json");
  step->add_option("--json", args->options.json, "file for every figure of the tables")
      ->type_name("FILE.json");
  step->add_option("--repeated", args->options.repeated,
                   "share of made-up tokens that are one and the same: with "
                   "routing.select=hash one expert gets them all")
      ->check(CLI::Range(0.0, 1.0))
      ->type_name("SHARE");
}

}  // namespace arcus
