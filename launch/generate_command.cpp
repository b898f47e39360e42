#include <fmt/format.h>

#include <cstdio>
#include <iostream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "launch/checks.hpp"
#include "launch/commands.hpp"
#include "launch/portable.hpp"
#include "launch/run_setup.hpp"
#include "launch/session.hpp"
#include "launch/utf8_stream.hpp"
#include "src/base/error.hpp"
#include "src/data/pairs.hpp"
#include "src/train/generation.hpp"

namespace arcus {
namespace {

/// More than any model's context; positions are 32-bit.
constexpr std::int64_t kMostTokens = 1 << 24;

struct Arguments {
  std::string path;
  std::vector<std::string> prompts;
  std::vector<std::string> sets;
  std::int64_t samples = 1;
  SamplingOptions sampling;
  bool ignore_eos = false;
  bool raw = false;
  bool ask = false;
};

constexpr const char* kFooter =
    "The text goes to standard output as it comes. A prompt of \"-\" is read from standard input;\n"
    "without a prompt the model begins a document of its own. The same command gives the same "
    "text\n"
    "on any number of ranks.\n"
    "\n"
    "Examples:\n"
    "  arcus generate runs/quickstart --prompt \"In the beginning\"\n"
    "  arcus generate runs/quickstart --prompt '#include <' --temperature 0 --max-tokens 400\n"
    "  arcus generate runs/tuned --ask --prompt 'What is an expert?'\n"
    "  mpirun -np 4 arcus generate runs/large --samples 3 --top-p 0.9 --seed 7";

std::unique_ptr<Tokenizer> tokenizer_of(const LoadedModel& model) {
  auto tokenizer = stored_tokenizer(model.info);
  ARCUS_REQUIRE(tokenizer != nullptr, ExitCode::checkpoint,
                "{} holds no tokenizer, so no text can be generated", model.path.string());
  return tokenizer;
}

/// How the pairs were written that the model was trained on.
PairTemplate stored_template(const LoadedModel& model) {
  const auto stored = model.info.extra.find(extra_key::kPairTemplate);
  ARCUS_REQUIRE(stored != model.info.extra.end(), ExitCode::usage,
                "{} was not trained on pairs, so there is no template to --ask by; leave it out",
                model.path.string());
  return PairTemplate(stored->second);
}

/// Standard input reaches rank 0 alone.
std::string read_standard_input(Session& session) {
  std::string text;
  if (session.is_root()) {
    text.assign(std::istreambuf_iterator<char>(std::cin), std::istreambuf_iterator<char>());
  }
  return broadcast_text(session.comm(), session.stream(), text);
}

/// Prompts in order, each as often as samples are wanted.
std::vector<std::string> all_prompts(Session& session, const Arguments& arguments) {
  std::vector<std::string> given = arguments.prompts;
  if (given.empty()) given.emplace_back();
  std::vector<std::string> prompts;
  for (std::string& prompt : given) {
    if (prompt == "-") prompt = read_standard_input(session);
    for (std::int64_t i = 0; i < arguments.samples; ++i) prompts.push_back(prompt);
  }
  return prompts;
}

/// Ids that a model sees for a prompt: a document begins after the end of another.
std::vector<std::int32_t> prompt_ids(const Tokenizer& tokenizer, const std::string& prompt) {
  std::vector<std::int32_t> ids{tokenizer.eos_id()};
  tokenizer.encode(prompt, ids);
  return ids;
}

/// Prints one sequence as it grows; several one after the other, when they are complete.
class TextPrinter {
 public:
  TextPrinter(const Tokenizer& tokenizer, const std::vector<std::string>& prompts, bool raw)
      : tokenizer_(tokenizer), prompts_(prompts), texts_(prompts.size()), raw_(raw) {
    if (prompts_.size() == 1) print(prompts_[0]);
  }

  void add(std::size_t prompt, std::int32_t id) {
    const std::string bytes = tokenizer_.token_text(id);
    if (prompts_.size() > 1) {
      texts_[prompt] += bytes;
    } else {
      print(raw_ ? bytes : filter_.push(bytes));
    }
  }

  void finish() {
    if (prompts_.size() == 1) {
      print(filter_.finish() + "\n");
      return;
    }
    for (std::size_t i = 0; i < prompts_.size(); ++i) {
      Utf8Stream filter;
      const std::string text = raw_ ? texts_[i] : filter.push(texts_[i]) + filter.finish();
      print(fmt::format("--- {} ---\n{}{}\n", i + 1, prompts_[i], text));
    }
  }

 private:
  static void print(const std::string& text) {
    std::fwrite(text.data(), 1, text.size(), stdout);
    std::fflush(stdout);
  }

  const Tokenizer& tokenizer_;
  const std::vector<std::string>& prompts_;
  std::vector<std::string> texts_;
  bool raw_;
  Utf8Stream filter_;
};

ExitCode run_on_ranks(Session& session, const Arguments& arguments) {
  std::vector<std::string> prompts = all_prompts(session, arguments);
  LoadedModel model = load_generator(session, arguments.path, arguments.sets,
                                     static_cast<std::int64_t>(prompts.size()));
  std::unique_ptr<Tokenizer> tokenizer;
  std::vector<std::vector<std::int32_t>> ids;
  session.together([&] {
    tokenizer = tokenizer_of(model);
    if (arguments.ask) {
      const PairTemplate how = stored_template(model);
      for (std::string& prompt : prompts) prompt = how.prompt(prompt);
    }
    for (const std::string& prompt : prompts) ids.push_back(prompt_ids(*tokenizer, prompt));
  });
  SamplingOptions sampling = arguments.sampling;
  sampling.eos_id = arguments.ignore_eos ? -1 : tokenizer->eos_id();
  if (!session.is_root()) {
    generate(*model.instance, ids, sampling, {});
    return ExitCode::ok;
  }
  TextPrinter printer(*tokenizer, prompts, arguments.raw);
  generate(*model.instance, ids, sampling,
           [&](std::size_t prompt, std::int32_t id) { printer.add(prompt, id); });
  printer.finish();
  return ExitCode::ok;
}

}  // namespace

void add_generate_command(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand("generate", "Continue a text with a trained model");
  auto args = std::make_shared<Arguments>();
  SamplingOptions& s = args->sampling;
  command->add_option("path", args->path, "run folder or checkpoint")->required();
  command->add_option("--prompt", args->prompts, "text to go on from; may be given again")
      ->expected(1)
      ->take_all();
  command->add_option("--max-tokens", s.max_new_tokens, "most tokens to add")
      ->capture_default_str()
      ->check(whole_number(1, kMostTokens));
  command->add_option("--temperature", s.temperature, "0 = always the most likely token")
      ->capture_default_str()
      ->check(number_of_at_least(0));
  command->add_option("--top-k", s.top_k, "choose among the k most likely; 0 = all")
      ->capture_default_str()
      ->check(whole_number(0));
  command->add_option("--top-p", s.top_p, "choose among the likeliest that add up to this")
      ->capture_default_str()
      ->check(share_up_to(1));
  command->add_option("--seed", s.seed, "of the draws")
      ->capture_default_str()
      ->check(whole_number(0));
  command->add_option("--samples", args->samples, "continuations of each prompt")
      ->capture_default_str()
      ->check(whole_number(1, 1 << 20));
  command->add_flag("--ignore-eos", args->ignore_eos, "go on after the end of a document");
  command->add_flag("--ask", args->ask,
                    "put prompts into the template of the pairs that the model was trained on");
  command->add_flag("--raw", args->raw, "print bytes as they are, valid UTF-8 or not");
  command->add_option("--set", args->sets, "override a key of the run's configuration")
      ->expected(1)
      ->take_all()
      ->type_name("KEY=VALUE");
  command->footer(kFooter);
  command->callback([&action, args] {
    action = [args] {
      return run_session({}, [args](Session& session) { return run_on_ranks(session, *args); });
    };
  });
}

}  // namespace arcus
