#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "launch/checks.hpp"
#include "launch/commands.hpp"
#include "launch/progress.hpp"
#include "launch/tokenizer_source.hpp"
#include "src/base/error.hpp"
#include "src/base/log.hpp"
#include "src/data/prepare.hpp"

namespace arcus {
namespace {

struct Arguments {
  PrepareOptions options;
  std::vector<std::string> domains;
  std::vector<std::string> pairs;
  std::vector<std::string> separators;
  std::vector<std::string> split_bytes;
  std::int64_t spm_sample_mib = 32;
};

constexpr const char* kFooter =
    "Paths are files, folders (everything below) and globs; a path without NAME= adds to the "
    "domain\n"
    "before it. One file is one document unless --separator or --split-bytes cuts it. Held-out "
    "text\n"
    "is chosen document by document, so it is never trained on.\n"
    "\n"
    "Files of pairs hold a JSON object a line: {\"prompt\": ..., \"answer\": ...}, perhaps with\n"
    "\"system\", or {\"messages\": [{\"role\": \"user\", \"content\": ...}, {\"role\": "
    "\"assistant\", ...}]}.\n"
    "Answers are learned, with what the template writes after them and the end of the document;\n"
    "prompts are only read. {system} and what leads up to it is written where there is a system "
    "text.\n"
    "\n"
    "Examples:\n"
    "  arcus prepare --out data/code --domain 'c=/usr/include/**/*.h'\n"
    "  arcus prepare --out data/mix --tokenizer spm:8192 \\\n"
    "      --domain prose=books/ letters.txt --domain zh=zh/ --separator zh=%\n"
    "  arcus prepare --out data/more --tokenizer checkpoint:runs/imported --domain more=texts/\n"
    "  arcus prepare --out data/tune --domain code=src/ --pairs tasks=tasks.jsonl \\\n"
    "      --template '### Q\\n{prompt}\\n### A\\n{answer}'";

/// Splits "NAME=VALUE" and calls `set(source, VALUE)` for that domain; without NAME= for all.
void for_named_domains(const std::string& argument, std::vector<DomainSource>& domains,
                       const char* option,
                       const std::function<void(DomainSource&, const std::string&)>& set) {
  const std::size_t equals = argument.find('=');
  if (equals == std::string::npos) {
    for (DomainSource& domain : domains) {
      if (!domain.pairs) set(domain, argument);
    }
    return;
  }
  const std::string name = argument.substr(0, equals);
  for (DomainSource& domain : domains) {
    if (domain.name != name) continue;
    set(domain, argument.substr(equals + 1));
    return;
  }
  ARCUS_FAIL(ExitCode::usage, "{} {}: there is no --domain {}=...", option, argument, name);
}

std::int64_t parse_bytes(const std::string& text) {
  std::size_t used = 0;
  std::int64_t bytes = -1;
  try {
    bytes = std::stoll(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  ARCUS_REQUIRE(used == text.size() && used > 0 && bytes >= 0, ExitCode::usage,
                "--split-bytes {}: give a number of bytes, e.g. 8192", text);
  return bytes;
}

PrepareOptions complete(const Arguments& arguments) {
  PrepareOptions options = arguments.options;
  options.spm_sample_bytes = arguments.spm_sample_mib << 20;
  options.given = open_tokenizer_source(options.tokenizer);
  for (const std::string& argument : arguments.domains) {
    add_domain_argument(argument, options.domains);
  }
  for (const std::string& argument : arguments.pairs) {
    add_pairs_argument(argument, options.domains);
  }
  for (const std::string& argument : arguments.separators) {
    for_named_domains(argument, options.domains, "--separator",
                      [](DomainSource& d, const std::string& line) { d.rule.separator = line; });
  }
  for (const std::string& argument : arguments.split_bytes) {
    for_named_domains(
        argument, options.domains, "--split-bytes",
        [](DomainSource& d, const std::string& text) { d.rule.split_bytes = parse_bytes(text); });
  }
  return options;
}

std::string format_bytes(std::int64_t bytes) {
  const auto value = static_cast<double>(bytes);
  if (bytes < 1'000'000) return fmt::format("{:.1f} kB", value / 1e3);
  if (bytes < 1'000'000'000) return fmt::format("{:.1f} MB", value / 1e6);
  return fmt::format("{:.2f} GB", value / 1e9);
}

/// One line that is drawn again and again on a terminal; elsewhere one line per stage and domain.
class PrepareLine {
 public:
  void update(const PrepareProgress& p) {
    const std::string what = p.domain.empty() ? p.stage : fmt::format("{} {}", p.stage, p.domain);
    const auto now = std::chrono::steady_clock::now();
    const bool new_stage = what != what_;
    if (!new_stage && (!terminal_ || now - last_ < std::chrono::milliseconds(100))) return;
    what_ = what;
    last_ = now;
    if (terminal_) {
      fmt::print(stderr, "\r\033[K{}  {}", what, amount(p));
      drawn_ = true;
    } else {
      fmt::print(stderr, "{}\n", what);
    }
    std::fflush(stderr);
  }
  ~PrepareLine() {
    if (drawn_) std::fputs("\r\033[K", stderr);
  }

 private:
  static std::string amount(const PrepareProgress& p) {
    if (p.bytes_total <= 0) return format_bytes(p.bytes_done);
    return fmt::format("{} of {} ({} %)", format_bytes(p.bytes_done), format_bytes(p.bytes_total),
                       100 * p.bytes_done / p.bytes_total);
  }

  const bool terminal_ = isatty(STDERR_FILENO) != 0;
  bool drawn_ = false;
  std::string what_;
  std::chrono::steady_clock::time_point last_;
};

void print_report(const PrepareReport& report, const PrepareOptions& options) {
  fmt::print("{:<16} {:>7} {:>10} {:>11} {:>9} {:>10} {:>9}\n", "domain", "files", "documents",
             "text", "tokens", "held out", "tokens");
  for (const DomainReport& d : report.domains) {
    fmt::print("{:<16} {:>7} {:>10} {:>11} {:>9} {:>10} {:>9}\n", d.name, d.files,
               d.train.documents + d.valid.documents, format_bytes(d.train.bytes),
               format_count(static_cast<double>(d.train.tokens)), format_bytes(d.valid.bytes),
               format_count(static_cast<double>(d.valid.tokens)));
  }
  for (const DomainReport& d : report.domains) {
    if (d.duplicates > 0) {
      fmt::print("{}: {} documents ({}) occurred before and were left out\n", d.name, d.duplicates,
                 format_bytes(d.duplicate_bytes));
    }
    const std::int64_t targets = d.train.targets + d.valid.targets;
    if (const std::int64_t tokens = d.train.tokens + d.valid.tokens; targets < tokens) {
      fmt::print("{}: {} of {} tokens are answers, which are learned\n", d.name,
                 format_count(static_cast<double>(targets)),
                 format_count(static_cast<double>(tokens)));
    }
    for (const std::string& note : d.notes) fmt::print("{}: {}\n", d.name, note);
  }
  fmt::print("vocabulary {}, written to {}\n", report.vocab_size, options.out.string());
}

int run_prepare(const Arguments& arguments) {
  init_log(0, 1);
  const PrepareOptions options = complete(arguments);
  PrepareReport report;
  {
    PrepareLine line;
    report = prepare(options, [&](const PrepareProgress& p) { line.update(p); });
  }
  print_report(report, options);
  return static_cast<int>(ExitCode::ok);
}

}  // namespace

void add_prepare_command(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand("prepare", "Turn text files into a data set of tokens");
  auto args = std::make_shared<Arguments>();
  PrepareOptions& o = args->options;
  command->add_option("--out", o.out, "folder to make")->required()->type_name("DIR");
  command
      ->add_option("--domain", args->domains,
                   "a domain and its text; give one --domain per kind of text")
      ->expected(1, 1 << 20)
      ->type_name("NAME=PATH...");
  command
      ->add_option("--pairs", args->pairs,
                   "prompts and answers to learn, a JSON object a line; a domain of their own")
      ->expected(1, 1 << 20)
      ->type_name("[NAME=]FILE...");
  command
      ->add_option("--template", o.pair_template,
                   "how pairs are written; \\n is a line end, {{ a brace")
      ->capture_default_str()
      ->type_name("TEXT");
  command
      ->add_option("--tokenizer", o.tokenizer,
                   std::string("spm:VOCAB (trained on the text), ") + kTokenizerSources)
      ->capture_default_str()
      ->type_name("KIND");
  command->add_option("--valid-fraction", o.valid_fraction, "share of each domain to hold out")
      ->capture_default_str()
      ->type_name("SHARE");
  command
      ->add_option("--separator", args->separators,
                   "line between two documents, e.g. zh=% (without NAME= for all domains)")
      ->expected(1)
      ->take_all()
      ->type_name("[NAME=]LINE");
  command
      ->add_option("--split-bytes", args->split_bytes,
                   "cut documents much larger than this at a paragraph's end; 0 = never")
      ->expected(1)
      ->take_all()
      ->type_name("[NAME=]BYTES");
  command->add_option("--seed", o.seed, "of the choice of held-out documents")
      ->capture_default_str()
      ->check(whole_number(0));
  command->add_flag("--force", o.force, "replace an existing data set");
  command->add_flag("--skip-bad", o.skip_bad,
                    "leave out empty, binary and non-UTF-8 files instead of stopping");
  command
      ->add_option("--character-coverage", o.character_coverage,
                   "spm: share of characters in the vocabulary; rarer ones become bytes")
      ->capture_default_str();
  command
      ->add_option("--spm-sample-mib", args->spm_sample_mib,
                   "spm: text that the vocabulary is trained on")
      ->capture_default_str()
      ->check(whole_number(1, 1 << 20))
      ->type_name("MIB");
  command->footer(std::string(kTokenizerSourcesExplained) + "\n" + kFooter);
  command->callback([&action, args] { action = once([args] { return run_prepare(*args); }); });
}

}  // namespace arcus
