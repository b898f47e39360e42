#include "src/data/regex.hpp"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdint>

#include "src/base/error.hpp"
#include "src/data/checked_json.hpp"
#include "src/data/utf8.hpp"

namespace arcus {
namespace {

constexpr std::size_t kLongestPattern = 1 << 16;
/// Steps of one match, and more for each byte of a text; real patterns need a few per character.
constexpr std::size_t kMostSteps = 1'000'000;
constexpr std::size_t kMostStepsPerByte = 16;
constexpr std::uint32_t kMostHeapKib = 64 << 10;
constexpr std::size_t kJitStack = std::size_t{1} << 20;

/// Oniguruma's \w: PCRE2's leaves out marks and connecting punctuation.
constexpr std::string_view kWord = R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc})";

bool is_category(std::string_view name) {
  constexpr std::array<std::string_view, 37> kCategories{
      "L",  "Lu", "Ll", "Lt", "Lm", "Lo", "M",  "Mn", "Mc", "Me", "N",  "Nd", "Nl",
      "No", "P",  "Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "S",  "Sm", "Sc", "Sk",
      "So", "Z",  "Zs", "Zl", "Zp", "C",  "Cc", "Cf", "Cs", "Co", "Cn"};
  return std::find(kCategories.begin(), kCategories.end(), name) != kCategories.end();
}

/// One pass over a pattern. Whatever Oniguruma and PCRE2 would take differently is rewritten or
/// refused.
class Translator {
 public:
  explicit Translator(std::string_view pattern) : in_(pattern) {}

  std::string run() {
    while (at_ < in_.size()) {
      const char c = in_[at_];
      if (c == '\\') {
        escape(/*in_class=*/false);
      } else if (c == '[') {
        char_class(0);
      } else if (c == '(') {
        group();
      } else if (c == '{') {
        interval();
      } else {
        copy(1);
      }
    }
    return std::move(out_);
  }

 private:
  [[noreturn]] void refuse(std::string_view what) const {
    ARCUS_FAIL(ExitCode::data, "the regular expression \"{}\" has {}, which is not supported",
               excerpt(in_, 100), what);
  }
  char peek(std::size_t ahead = 0) const {
    return at_ + ahead < in_.size() ? in_[at_ + ahead] : '\0';
  }
  void copy(std::size_t bytes) {
    out_ += in_.substr(at_, bytes);
    at_ += bytes;
  }
  void replace(std::size_t bytes, std::string_view text) {
    at_ += bytes;
    out_ += text;
  }

  void escape(bool in_class) {
    const char c = peek(1);
    const auto word = [&](std::string_view open) {
      replace(2, std::string(open) + std::string(kWord) + "]");
    };
    switch (c) {
      case '\0':
        refuse("a \\ at its end");
      case 's':
        return replace(2, R"(\p{White_Space})");
      case 'S':
        return replace(2, R"(\P{White_Space})");
      case 'd':
        return replace(2, R"(\p{Nd})");
      case 'D':
        return replace(2, R"(\P{Nd})");
      case 'w':
        return in_class ? replace(2, kWord) : word("[");
      case 'W':
        if (in_class) refuse("\\W in a class");
        return word("[^");
      case 'p':
      case 'P':
        return property();
      case 'v':
        return replace(2, R"(\x0b)");
      case 'r':
      case 'n':
      case 't':
      case 'f':
      case 'a':
      case 'e':
        return copy(2);
      case 'x':
        return code_point();
      case 'u':
        return short_code_point();
      case 'b':
      case 'B':
        return in_class ? backspace(c) : word_boundary(c == 'B');
      case 'A':
      case 'z':
        if (!in_class) return copy(2);
        [[fallthrough]];
      default:
        if (std::isalnum(static_cast<unsigned char>(c)) != 0) {
          refuse(fmt::format("\\{}", c));
        }
        copy(1);  // the next character, of however many bytes, follows as it is
        return copy_character();
    }
  }

  void copy_character() {
    std::size_t bytes = 1;
    while (at_ + bytes < in_.size() &&
           (static_cast<unsigned char>(in_[at_ + bytes]) & 0xC0) == 0x80)
      ++bytes;
    copy(bytes);
  }

  void backspace(char c) {
    if (c == 'B') refuse("\\B in a class");
    replace(2, R"(\x08)");
  }

  void word_boundary(bool inverted) {
    const std::string in = fmt::format("[{}]", kWord);
    replace(2, inverted ? fmt::format("(?:(?<={0})(?={0})|(?<!{0})(?!{0}))", in)
                        : fmt::format("(?:(?<={0})(?!{0})|(?<!{0})(?={0}))", in));
  }

  /// \p{L}, \p{^L}, \P{Han}: categories have the same names, scripts are spelled so that script
  /// extensions do not count.
  void property() {
    const std::size_t end = in_.find('}', at_);
    if (peek(2) != '{' || end == std::string_view::npos) refuse("a \\p without {...}");
    std::string_view name = in_.substr(at_ + 3, end - at_ - 3);
    bool inverted = peek(1) == 'P';
    if (name.starts_with('^')) {
      inverted = !inverted;
      name.remove_prefix(1);
    }
    const bool plausible = !name.empty() && std::all_of(name.begin(), name.end(), [](char c) {
      return std::isalpha(static_cast<unsigned char>(c)) != 0 || c == '_';
    });
    if (!plausible) refuse(fmt::format("\\p{{{}}}", excerpt(name)));
    const bool plain = is_category(name) || name == "Alphabetic" || name == "White_Space";
    replace(end + 1 - at_,
            fmt::format("\\{}{{{}{}}}", inverted ? 'P' : 'p', plain ? "" : "sc:", name));
  }

  /// \x41 and \x{4E00}; two digits above 7F would be a byte in one and a character in the other.
  void code_point() {
    if (peek(2) == '{') {
      const std::size_t end = in_.find('}', at_);
      if (end == std::string_view::npos) refuse("a \\x{ that does not end");
      return copy(end + 1 - at_);
    }
    const bool ascii =
        peek(2) >= '0' && peek(2) <= '7' && std::isxdigit(static_cast<unsigned char>(peek(3))) != 0;
    if (!ascii) refuse("a \\x that is not \\x00 to \\x7F or \\x{...}");
    copy(4);
  }

  void short_code_point() {
    const std::string_view digits = in_.substr(std::min(at_ + 2, in_.size()), 4);
    const bool hex = digits.size() == 4 && std::all_of(digits.begin(), digits.end(), [](char c) {
                       return std::isxdigit(static_cast<unsigned char>(c)) != 0;
                     });
    if (!hex) refuse("a \\u without four digits");
    replace(6, fmt::format("\\x{{{}}}", digits));
  }

  /// A class; classes inside it are its parts, as Oniguruma has it.
  void char_class(int depth) {
    const bool inverted = peek(1) == '^';
    if (depth > 0 && inverted) refuse("a negated class in a class");
    if (depth > 0) {
      ++at_;
    } else {
      copy(inverted ? 2 : 1);
    }
    if (peek() == ']') refuse("an empty class");
    while (at_ < in_.size() && peek() != ']') {
      if (peek() == '\\') {
        escape(/*in_class=*/true);
      } else if (peek() == '[') {
        if (peek(1) == ':') refuse("a POSIX class");
        char_class(depth + 1);
      } else if (peek() == '&' && peek(1) == '&') {
        refuse("an intersection of classes");
      } else {
        copy_character();
      }
    }
    if (at_ >= in_.size()) refuse("a class that does not end");
    depth > 0 ? void(++at_) : copy(1);
  }

  void group() {
    if (peek(1) == '*') refuse("(*");
    if (peek(1) != '?') return copy(1);
    const std::string_view rest = in_.substr(at_ + 2);
    for (const std::string_view kind : {":", "=", "!", ">", "<=", "<!", "i:", "-i:"}) {
      if (rest.starts_with(kind)) return copy(2 + kind.size());
    }
    // Elsewhere Oniguruma takes it for all that follows, alternatives too.
    if (rest.starts_with("i)") && at_ == 0) return copy(4);
    refuse(fmt::format("(?{}", excerpt(rest, 2)));
  }

  /// {n}, {n,} and {n,m} mean the same; {,m} is spelled out; what follows one need not.
  void interval() {
    std::size_t end = at_ + 1;
    while (end < in_.size() &&
           (std::isdigit(static_cast<unsigned char>(in_[end])) != 0 || in_[end] == ','))
      ++end;
    const std::string_view inside = in_.substr(at_ + 1, end - at_ - 1);
    const bool counts = end < in_.size() && in_[end] == '}' && inside.size() > 0 &&
                        std::count(inside.begin(), inside.end(), ',') <= 1 && inside != ",";
    if (!counts) return replace(1, "\\{");
    const char after = end + 1 < in_.size() ? in_[end + 1] : '\0';
    if (after == '+' || (after == '?' && inside.find(',') == std::string_view::npos)) {
      refuse(fmt::format("{{{}}}{}", inside, after));
    }
    replace(end + 1 - at_, fmt::format("{{{}{}}}", inside.starts_with(',') ? "0" : "", inside));
  }

  std::string_view in_;
  std::size_t at_ = 0;
  std::string out_;
};

template <class T, void (*Free)(T*)>
struct Freer {
  void operator()(T* object) const { Free(object); }
};
using MatchData = std::unique_ptr<pcre2_match_data, Freer<pcre2_match_data, pcre2_match_data_free>>;
using MatchContext =
    std::unique_ptr<pcre2_match_context, Freer<pcre2_match_context, pcre2_match_context_free>>;
using CompileContext = std::unique_ptr<pcre2_compile_context,
                                       Freer<pcre2_compile_context, pcre2_compile_context_free>>;
using JitStack = std::unique_ptr<pcre2_jit_stack, Freer<pcre2_jit_stack, pcre2_jit_stack_free>>;

/// What a thread needs to match, whichever the pattern.
struct MatchSpace {
  MatchData data{pcre2_match_data_create(1, nullptr)};
  MatchContext context{pcre2_match_context_create(nullptr)};
  JitStack stack{pcre2_jit_stack_create(32 << 10, kJitStack, nullptr)};

  MatchSpace() {
    pcre2_set_heap_limit(context.get(), kMostHeapKib);
    pcre2_jit_stack_assign(context.get(), nullptr, stack.get());
  }
};

std::string message_of(int error) {
  std::array<PCRE2_UCHAR, 256> text{};
  pcre2_get_error_message(error, text.data(), text.size());
  return reinterpret_cast<const char*>(text.data());
}

PCRE2_SPTR units(std::string_view text) { return reinterpret_cast<PCRE2_SPTR>(text.data()); }

}  // namespace

std::string translate_regex(const std::string& pattern) { return Translator(pattern).run(); }

std::string escape_regex(std::string_view text) {
  std::string escaped;
  for (const char c : text) {
    if (static_cast<unsigned char>(c) < 0x80 && std::isalnum(static_cast<unsigned char>(c)) == 0) {
      escaped += '\\';
    }
    escaped += c;
  }
  return escaped;
}

Regex::Regex(const std::string& pattern) : pattern_(pattern) {
  ARCUS_REQUIRE(pattern.size() <= kLongestPattern, ExitCode::data,
                "a regular expression of {} bytes is longer than {}", pattern.size(),
                kLongestPattern);
  const std::string translated = translate_regex(pattern);
  const CompileContext context(pcre2_compile_context_create(nullptr));
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  int error = 0;
  PCRE2_SIZE offset = 0;
  pcre2_code* code =
      pcre2_compile(units(translated), translated.size(),
                    PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &error,
                    &offset, context.get());
  ARCUS_REQUIRE(
      code != nullptr, ExitCode::data,
      "the regular expression \"{}\" is not supported: {} (at \"{}\")", excerpt(pattern, 100),
      message_of(error),
      excerpt(std::string_view(translated).substr(std::min(offset, translated.size())), 20));
  pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);  // where it cannot, matching interprets
  code_ = std::shared_ptr<const void>(code, [](const void* held) {
    pcre2_code_free(static_cast<pcre2_code*>(const_cast<void*>(held)));
  });
}

void Regex::for_each_match(std::string_view text,
                           const std::function<void(std::size_t, std::size_t)>& found) const {
  thread_local MatchSpace space;
  const auto* code = static_cast<const pcre2_code*>(code_.get());
  const std::size_t steps = kMostSteps + kMostStepsPerByte * text.size();
  pcre2_set_match_limit(space.context.get(),
                        static_cast<std::uint32_t>(std::min<std::size_t>(steps, UINT32_MAX)));
  const auto match = [&](std::size_t from, std::uint32_t options) {
    return pcre2_match(code, units(text), text.size(), from, PCRE2_NO_UTF_CHECK | options,
                       space.data.get(), space.context.get());
  };
  std::size_t last_end = std::string_view::npos;
  for (std::size_t from = 0; from <= text.size();) {
    int result = match(from, 0);
    if (result == PCRE2_ERROR_JIT_STACKLIMIT) result = match(from, PCRE2_NO_JIT);
    if (result == PCRE2_ERROR_NOMATCH) return;
    ARCUS_REQUIRE(result >= 0, ExitCode::data,
                  "the regular expression \"{}\" gave up at byte {} of a text: {}",
                  excerpt(pattern_, 100), from, message_of(result));
    const PCRE2_SIZE* ends = pcre2_get_ovector_pointer(space.data.get());
    const std::size_t begin = ends[0];
    const std::size_t end = ends[1];
    ARCUS_REQUIRE(begin <= end && begin >= from, ExitCode::data,
                  "the regular expression \"{}\" matches backwards", excerpt(pattern_, 100));
    if (begin == end && end == last_end) {
      if (from == text.size()) return;
      from = next_code_point(text, from);
      continue;
    }
    found(begin, end);
    from = last_end = end;
  }
}

}  // namespace arcus
