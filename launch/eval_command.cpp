#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "launch/checks.hpp"
#include "launch/commands.hpp"
#include "launch/eval_ids.hpp"
#include "launch/run_setup.hpp"
#include "launch/session.hpp"
#include "src/base/error.hpp"
#include "src/base/hash.hpp"
#include "src/base/log.hpp"
#include "src/train/evaluation.hpp"

namespace arcus {
namespace {

struct Arguments {
  std::string path;
  std::string data;
  std::vector<std::string> domains;
  std::vector<std::string> sets;
  std::string ids;
  std::string logits;
  std::int64_t batches = 0;
  bool json = false;
  bool routing = false;
};

constexpr const char* kFooter =
    "Loss, perplexity and bits per byte on text that was never trained on. The last row counts "
    "all\n"
    "bytes of all domains.\n"
    "\n"
    "Examples:\n"
    "  arcus eval runs/quickstart                         # all held-out text, latest checkpoint\n"
    "  arcus eval runs/quickstart --ids ids.txt --logits logits.h5   # to compare with other "
    "programs\n"
    "  arcus eval runs/quickstart --domain code --batches 20 --json\n"
    "  mpirun -np 4 arcus eval runs/large/checkpoints/step-00010000 --data data/other";

/// The data set, checked against the tokenizer that the checkpoint was trained with.
TokenDataset open_matching_data(Session& session, const LoadedModel& model,
                                const std::string& data) {
  const std::string dir = data.empty() ? model.config.run.data : data;
  session.together([&] {
    ARCUS_REQUIRE(!data.empty() || std::filesystem::exists(dir), ExitCode::data,
                  "the run's data, {}, is not there (seen from {}); name its folder with --data",
                  dir, std::filesystem::current_path().string());
  });
  TokenDataset dataset = open_dataset(session, dir);
  session.together([&] {
    const auto stored = model.info.extra.find(extra_key::kTokenizer);
    const auto kind = model.info.extra.find(extra_key::kTokenizerKind);
    const bool same = stored != model.info.extra.end() && kind != model.info.extra.end() &&
                      kind->second == dataset.tokenizer().kind() &&
                      stored->second == dataset.tokenizer().serialized();
    ARCUS_REQUIRE(same, ExitCode::data,
                  "{} was made with another tokenizer than the data that {} was trained on; "
                  "prepare it with the same one",
                  dir, model.path.string());
  });
  return dataset;
}

void print_table(const EvalMetrics& eval) {
  fmt::print("{:<20} {:>10} {:>12} {:>8} {:>10} {:>14}\n", "domain", "bytes", "tokens", "loss",
             "ppl", "bits per byte");
  std::int64_t bytes = 0;
  std::int64_t tokens = 0;
  for (const DomainEval& d : eval.domains) {
    fmt::print("{:<20} {:>10} {:>12} {:>8.4f} {:>10.3f} {:>14.4f}\n", d.domain, d.bytes, d.tokens,
               d.loss, d.ppl, d.bits_per_byte);
    bytes += d.bytes;
    tokens += d.tokens;
  }
  fmt::print("{:<20} {:>10} {:>12} {:>8} {:>10} {:>14.4f}\n", "all", bytes, tokens, "", "",
             eval.bits_per_byte());
}

ExitCode run_on_ranks(Session& session, const Arguments& arguments) {
  std::vector<std::string> domains;
  for (const std::string& name : arguments.domains) {
    if (std::ranges::find(domains, name) == domains.end()) domains.push_back(name);
  }
  LoadedModel model = load_model(session, arguments.path, arguments.sets);
  const TokenDataset dataset = open_matching_data(session, model, arguments.data);
  session.together([&] {
    for (const std::string& name : domains) dataset.domain_idx(name);
  });
  const EvalMetrics eval = evaluate(*model.instance, dataset, model.config.data, domains,
                                    arguments.batches, model.info.step);
  if (!session.is_root()) return ExitCode::ok;
  if (arguments.json) {
    fmt::print("{}\n", to_json_line(eval, arguments.routing));
  } else {
    fmt::print("{}, step {}\n", model.path.string(), model.info.step);
    print_table(eval);
  }
  return ExitCode::ok;
}

}  // namespace

void add_eval_command(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand("eval", "Loss of a trained model on held-out text");
  auto args = std::make_shared<Arguments>();
  command->add_option("path", args->path, "run folder or checkpoint")->required();
  command->add_option("--data", args->data, "data set; default: the run's")->type_name("DIR");
  command->add_option("--domain", args->domains, "only this domain; may be given again")
      ->expected(1)
      ->take_all()
      ->type_name("NAME");
  command->add_option("--batches", args->batches, "micro-batches per domain; 0 = all text")
      ->capture_default_str()
      ->check(whole_number(0))
      ->type_name("N");
  CLI::Option* ids =
      command->add_option("--ids", args->ids, "evaluate these token ids, one text a line, instead");
  ids->type_name("FILE");
  command->add_option("--logits", args->logits, "with --ids: write their logits (HDF5)")
      ->needs(ids)
      ->type_name("OUT.h5");
  command->add_option("--set", args->sets, "override a key of the run's configuration")
      ->expected(1)
      ->take_all()
      ->type_name("KEY=VALUE");
  CLI::Option* json =
      command->add_flag("--json", args->json, "one JSON object, as in metrics.jsonl");
  command->add_flag("--routing", args->routing, "with --json: tokens per expert of every layer")
      ->needs(json);
  for (const char* other : {"--data", "--domain", "--batches", "--json"}) {
    ids->excludes(command->get_option(other));
  }
  command->footer(kFooter);
  command->callback([&action, args] {
    action = [args] {
      return run_session({}, [args](Session& session) {
        return args->ids.empty()
                   ? run_on_ranks(session, *args)
                   : evaluate_ids(session, args->path, args->sets, args->ids, args->logits);
      });
    };
  });
}

}  // namespace arcus
