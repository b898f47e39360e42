#include "src/data/documents.hpp"

#include <fnmatch.h>
#include <glob.h>

#include <algorithm>
#include <cstring>

#include "src/base/error.hpp"
#include "src/data/utf8.hpp"

namespace arcus {
namespace {

namespace fs = std::filesystem;
constexpr std::size_t kNone = std::string_view::npos;

std::size_t find_text(std::string_view text, std::string_view what, std::size_t from) {
  const void* found = memmem(text.data() + from, text.size() - from, what.data(), what.size());
  return found == nullptr ? kNone
                          : static_cast<std::size_t>(static_cast<const char*>(found) - text.data());
}

struct Line {
  std::size_t begin = kNone;
  std::size_t end = kNone;  ///< after its line end
};

/// The first line at or after `from` (a line's begin) that equals `separator`.
Line find_separator(std::string_view text, std::string_view separator, std::size_t from) {
  for (std::size_t at = from; at <= text.size();) {
    const std::size_t begin = find_text(text, separator, at);
    if (begin == kNone) break;
    std::size_t end = begin + separator.size();
    if (end < text.size() && text[end] == '\r') ++end;
    const bool at_line_begin = begin == 0 || text[begin - 1] == '\n';
    if (at_line_begin && (end == text.size() || text[end] == '\n')) {
      return {begin, std::min(end + 1, text.size())};
    }
    at = begin + 1;
  }
  return {text.size(), text.size()};
}

void cut_large(std::string_view text, std::size_t begin, std::size_t end, std::int64_t split_bytes,
               const std::function<void(std::size_t, std::size_t)>& document) {
  const auto step = static_cast<std::size_t>(split_bytes);
  while (step > 0 && end - begin > step + step / 2) {
    const std::string_view rest = text.substr(begin, end - begin);
    const std::size_t cut = find_cut(rest, step, std::min(2 * step, rest.size()));
    document(begin, begin + cut);
    begin += cut;
  }
  if (begin < end) document(begin, end);
}

bool is_hidden(const fs::path& path) { return path.filename().string().starts_with('.'); }

/// Regular files below `folder` whose name matches `pattern`.
void add_folder(const fs::path& folder, const std::string& pattern, std::vector<fs::path>& files) {
  std::error_code error;
  fs::recursive_directory_iterator entry(folder, error);
  for (; !error && entry != fs::recursive_directory_iterator(); entry.increment(error)) {
    if (is_hidden(entry->path())) {
      entry.disable_recursion_pending();
      continue;
    }
    std::error_code ignored;  // a dangling link is no file
    if (!entry->is_regular_file(ignored)) continue;
    if (fnmatch(pattern.c_str(), entry->path().filename().c_str(), 0) == 0) {
      files.push_back(entry->path());
    }
  }
  ARCUS_REQUIRE(!error, ExitCode::data, "cannot read the folder {}: {}", folder.string(),
                error.message());
}

void add_glob(const std::string& pattern, std::vector<fs::path>& files) {
  const std::size_t stars = pattern.find("/**/");
  if (stars != std::string::npos) {
    const std::string name = pattern.substr(stars + 4);
    ARCUS_REQUIRE(name.find('/') == std::string::npos, ExitCode::data,
                  "{}: only a file name may follow \"/**/\"", pattern);
    add_folder(pattern.substr(0, std::max<std::size_t>(stars, 1)), name, files);
    return;
  }
  glob_t found{};
  if (glob(pattern.c_str(), 0, nullptr, &found) == 0) {
    for (std::size_t i = 0; i < found.gl_pathc; ++i) {
      const fs::path path = found.gl_pathv[i];
      if (fs::is_directory(path)) {
        add_folder(path, "*", files);
      } else {
        files.push_back(path);
      }
    }
  }
  globfree(&found);
}

}  // namespace

void cut_documents(std::string_view text, const DocumentRule& rule,
                   const std::function<void(std::size_t, std::size_t)>& document) {
  ARCUS_CHECK(rule.split_bytes == 0 || rule.split_bytes >= 16, "documents of {} bytes",
              rule.split_bytes);  // a cut must leave room for a code point
  std::size_t begin = 0;
  while (begin < text.size()) {
    const Line separator = rule.separator.empty() ? Line{text.size(), text.size()}
                                                  : find_separator(text, rule.separator, begin);
    cut_large(text, begin, separator.begin, rule.split_bytes, document);
    begin = separator.end;
  }
}

std::size_t find_cut(std::string_view text, std::size_t target, std::size_t limit) {
  const std::string_view part = text.substr(0, limit);
  std::size_t first_line_end = kNone;
  std::size_t from = target > 0 ? target - 1 : 0;
  for (std::size_t at = part.find('\n', from); at != kNone; at = part.find('\n', at + 1)) {
    if (first_line_end == kNone) first_line_end = at + 1;
    const std::size_t next = part.find_first_not_of('\r', at + 1);
    if (next != kNone && part[next] == '\n') return next + 1;
  }
  return first_line_end != kNone ? first_line_end : utf8_boundary(text, limit);
}

std::vector<fs::path> expand_paths(const std::vector<std::string>& entries) {
  std::vector<fs::path> files;
  for (const std::string& entry : entries) {
    const std::size_t before = files.size();
    if (fs::is_directory(entry)) {
      add_folder(entry, "*", files);
    } else if (fs::exists(entry)) {
      files.emplace_back(entry);
    } else {
      add_glob(entry, files);
    }
    ARCUS_REQUIRE(files.size() > before, ExitCode::data,
                  "\"{}\" is no file, no folder with files and no glob that matches any", entry);
  }
  std::sort(files.begin(), files.end());
  files.erase(std::unique(files.begin(), files.end()), files.end());
  return files;
}

}  // namespace arcus
