#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace arcus {

/// How a file becomes documents. By default it is one.
struct DocumentRule {
  /// A line that equals this (without its line end) stands between two documents and belongs to
  /// neither, e.g. "%" in files of quotations. Empty: no such lines.
  std::string separator;
  /// Documents larger than 1.5 times this are cut at the first paragraph end (empty line) after
  /// this many bytes; at a line end where no paragraph ends within as many bytes more; inside a
  /// line where no line does. 0: not cut.
  std::int64_t split_bytes = 0;
};

/// Calls `document(begin, end)` for the documents of `text`, in order, none empty.
void cut_documents(std::string_view text, const DocumentRule& rule,
                   const std::function<void(std::size_t, std::size_t)>& document);

/// Where to cut `text` at or after `target`: after the first paragraph end before `limit`, else
/// after the first line end, else between two code points at `limit`.
std::size_t find_cut(std::string_view text, std::size_t target, std::size_t limit);

/// Files of a list of files, folders (all regular files below, hidden ones left out) and globs
/// (with "DIR/**/NAME" for files called NAME anywhere below DIR), sorted, each once. Throws (data)
/// naming an entry that gives no file.
std::vector<std::filesystem::path> expand_paths(const std::vector<std::string>& entries);

}  // namespace arcus
