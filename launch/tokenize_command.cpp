#include <fmt/format.h>

#include <charconv>
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <iterator>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "launch/commands.hpp"
#include "launch/tokenizer_source.hpp"
#include "src/base/error.hpp"

namespace arcus {
namespace {

struct Arguments {
  std::string path;
  std::string tokenizer;
  bool whole = false;
  bool zero = false;
  bool decode = false;
  bool special = false;
  bool describe = false;
};

constexpr const char* kFooter =
    "Each line of standard input is a text of its own, without its line end, and gives a line of\n"
    "ids; with -z texts end with a NUL byte instead and may hold lines; with --whole all of it is\n"
    "one text and gives one line. `arcus eval --ids` takes such lines. --decode goes back from\n"
    "lines of ids to texts.\n"
    "\n"
    "Examples:\n"
    "  arcus tokenize runs/first < texts.txt > ids.txt\n"
    "  arcus tokenize --tokenizer hf:downloads/model --whole < book.txt | wc -w\n"
    "  arcus tokenize runs/first --decode < ids.txt\n"
    "  arcus tokenize --tokenizer model:tokenizer.model --describe";

std::unique_ptr<Tokenizer> open_tokenizer(const Arguments& arguments) {
  ARCUS_REQUIRE(arguments.path.empty() != arguments.tokenizer.empty(), ExitCode::usage,
                "give a checkpoint or run, or --tokenizer, and not both");
  const std::string source =
      arguments.path.empty() ? arguments.tokenizer : "checkpoint:" + arguments.path;
  auto tokenizer = open_tokenizer_source(source);
  ARCUS_REQUIRE(tokenizer != nullptr, ExitCode::usage, "unknown tokenizer \"{}\"; use {}", source,
                kTokenizerSources);
  return tokenizer;
}

void write(std::string_view text) {
  ARCUS_REQUIRE(std::fwrite(text.data(), 1, text.size(), stdout) == text.size(), ExitCode::data,
                "cannot write to standard output");
}

std::string ids_of(const Tokenizer& tokenizer, std::string_view text, bool special) {
  std::vector<std::int32_t> ids;
  special ? tokenizer.encode_marked(text, ids) : tokenizer.encode(text, ids);
  std::string line;
  for (const std::int32_t id : ids) {
    fmt::format_to(std::back_inserter(line), "{}{}", line.empty() ? "" : " ", id);
  }
  return line + "\n";
}

std::string text_of(const Tokenizer& tokenizer, std::string_view line) {
  std::vector<std::int32_t> ids;
  const char* at = line.data();
  const char* end = at + line.size();
  for (;;) {
    while (at < end && (*at == ' ' || *at == '\t' || *at == '\r' || *at == '\n')) ++at;
    if (at == end) return tokenizer.decode(ids);
    std::int32_t id = -1;
    const auto parsed = std::from_chars(at, end, id);
    ARCUS_REQUIRE(parsed.ec == std::errc{} && id >= 0 && id < tokenizer.vocab_size(),
                  ExitCode::data, "\"{}\" is no id; they go from 0 to {}",
                  std::string_view(at, std::min<std::size_t>(12, end - at)),
                  tokenizer.vocab_size() - 1);
    ids.push_back(id);
    at = parsed.ptr;
  }
}

int run_tokenize(const Arguments& arguments) {
  const auto tokenizer = open_tokenizer(arguments);
  if (arguments.describe) {
    fmt::print("kind        {}\nids         {}\nend of text {}\n", tokenizer->kind(),
               tokenizer->vocab_size(), tokenizer->eos_id());
    return static_cast<int>(ExitCode::ok);
  }
  const auto convert = [&](std::string_view text) {
    return arguments.decode ? text_of(*tokenizer, text)
                            : ids_of(*tokenizer, text, arguments.special);
  };
  std::cin.tie(nullptr);
  std::ios::sync_with_stdio(false);
  if (arguments.whole) {
    const std::string text{std::istreambuf_iterator<char>(std::cin),
                           std::istreambuf_iterator<char>()};
    write(convert(text));
  } else {
    const char end_of_text = arguments.zero ? '\0' : '\n';
    const char end = arguments.decode ? '\n' : end_of_text;
    for (std::string line; std::getline(std::cin, line, end);) {
      write(convert(line));
      if (arguments.decode) write({&end_of_text, 1});
    }
  }
  ARCUS_REQUIRE(std::fflush(stdout) == 0, ExitCode::data, "cannot write to standard output");
  return static_cast<int>(ExitCode::ok);
}

}  // namespace

void add_tokenize_command(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand("tokenize", "Turn text into token ids, or ids into text");
  auto args = std::make_shared<Arguments>();
  command->add_option("path", args->path, "run folder or checkpoint, whose tokenizer is taken");
  command->add_option("--tokenizer", args->tokenizer, std::string("or ") + kTokenizerSources)
      ->type_name("SOURCE");
  command->add_flag("--whole", args->whole, "all of standard input is one text");
  command->add_flag("-z,--zero", args->zero, "texts end with a NUL byte, not with a line end");
  command->add_flag("--decode", args->decode, "ids to text");
  command->add_flag("--special", args->special,
                    "special tokens spelled in the text, as chat templates do, become their ids");
  command->add_flag("--describe", args->describe, "print what it is and read nothing");
  command->footer(std::string(kTokenizerSourcesExplained) + "\n" + kFooter);
  command->callback([&action, args] { action = once([args] { return run_tokenize(*args); }); });
}

}  // namespace arcus
