#include "tests/structure/source_tree.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <functional>
#include <iterator>
#include <regex>
#include <set>

namespace arcus::structure {
namespace {

namespace fs = std::filesystem;

/// Headers that the build makes.
const std::set<std::string>& generated_headers() {
  static const std::set<std::string> headers = {"launch/git_commit.hpp", "isa_features.inc"};
  return headers;
}

/// A library's headers and the only files that may include them (prefixes of paths).
struct WrappedHeader {
  std::regex header;
  std::vector<std::string> homes;
};

const std::vector<WrappedHeader>& wrapped_headers() {
  static const std::vector<WrappedHeader> headers = {
      {std::regex(R"(mpi(_.*)?\.h)"), {"comm/", "tests/support/"}},
      {std::regex(R"(nccl.*)"), {"comm/nccl_", "kernels/cuda/", "tests/support/"}},
      {std::regex(R"((cuda|cublas).*)"), {"comm/nccl_", "kernels/cuda/", "tests/support/"}},
      {std::regex(R"((oneapi/dnnl/)?dnnl.*)"), {"kernels/cpu/", "tests/"}},
      {std::regex(R"(hdf5.*|H5.*\.h)"), {"src/base/hdf5"}}};
  return headers;
}

/// Whether `file` is shared code, which reaches devices through the ops of kernels/*.hpp alone.
bool is_shared_code(const std::string& file) {
  return !file.starts_with("kernels/") && !file.starts_with("tests/");
}

/// The row of folders() that `file` (a path from the root) lies in, or null.
const Folder* folder_of(const std::string& file) {
  const Folder* best = nullptr;
  for (const Folder& folder : folders()) {
    const bool inside = file.starts_with(folder.path + "/");
    if (inside && (best == nullptr || folder.path.size() > best->path.size())) best = &folder;
  }
  return best;
}

bool may_include(const Folder& from, const Folder& to) {
  return from.path == to.path || from.path == "tests" ||
         std::find(from.may_include.begin(), from.may_include.end(), to.path) !=
             from.may_include.end();
}

/// Sources and CMake files below `root`, paths from it, sorted; hidden folders and build/ left out.
std::vector<std::string> files_below(const fs::path& root,
                                     const std::function<bool(const fs::path&)>& wanted) {
  std::vector<std::string> files;
  for (const Folder& folder : folders()) {
    // Nested rows (checkpoints/interop) are part of their parent's walk.
    if (folder_of(folder.path) != nullptr || !fs::is_directory(root / folder.path)) continue;
    for (const auto& entry : fs::recursive_directory_iterator(root / folder.path)) {
      if (entry.is_regular_file() && wanted(entry.path())) {
        files.push_back(fs::relative(entry.path(), root).generic_string());
      }
    }
  }
  std::sort(files.begin(), files.end());
  return files;
}

bool is_source(const fs::path& path) {
  static const std::set<std::string> extensions = {".hpp", ".h", ".cpp", ".cu", ".cuh", ".inc"};
  return extensions.contains(path.extension().string());
}

/// Calls `fn(line number, line)` for each line of `file`.
void for_each_line(const fs::path& file, const std::function<void(int, const std::string&)>& fn) {
  std::ifstream stream(file);
  int number = 0;
  for (std::string line; std::getline(stream, line);) fn(++number, line);
}

/// What is wrong with `#include <header>` in `file`, or "".
std::string check_system_include(const std::string& file, const std::string& header) {
  for (const WrappedHeader& wrapped : wrapped_headers()) {
    if (!std::regex_match(header, wrapped.header)) continue;
    const bool at_home = std::any_of(wrapped.homes.begin(), wrapped.homes.end(),
                                     [&](const auto& home) { return file.starts_with(home); });
    if (!at_home) return fmt::format("<{}> must not be included here", header);
  }
  return "";
}

/// What is wrong with `#include "header"` in `file`, or "".
std::string check_project_include(const fs::path& root, const std::string& file,
                                  const std::string& header) {
  if (generated_headers().contains(header)) return "";
  if (!fs::is_regular_file(root / header)) {
    return fmt::format("\"{}\" is no path from the root of the tree", header);
  }
  if (is_shared_code(file) && std::regex_search(header, std::regex("^kernels/(cpu|cuda)/"))) {
    return fmt::format("\"{}\" belongs to a backend; call the ops of kernels/*.hpp", header);
  }
  const Folder* from = folder_of(file);
  const Folder* to = folder_of(header);
  if (to == nullptr) return fmt::format("\"{}\" lies outside the folders of sources", header);
  if (may_include(*from, *to)) return "";
  return fmt::format("{} must not include {} (\"{}\")", from->path, to->path, header);
}

/// What is wrong with a line that includes nothing, or "". Headers of ops declare the instances of
/// every backend, so that an include line alone does not show who calls one.
std::string check_code(const std::string& file, const std::string& line) {
  static const std::regex instance(R"(\b(cpu|cuda)::)");
  static const std::regex wall_clock(
      R"(\b(system_clock|utc_clock|gettimeofday|CLOCK_REALTIME)\b|\bstd::time\()");
  const std::string code = line.substr(0, line.find("//"));
  if (!file.starts_with("tests/") && std::regex_search(code, wall_clock)) {
    return "asks the wall clock, which jumps; steady_clock does not";
  }
  if (!is_shared_code(file) || !std::regex_search(code, instance)) return "";
  return "names a backend's instance; call the op, which chooses by the stream's device";
}

std::string check_line(const fs::path& root, const std::string& file, const std::string& line) {
  static const std::regex include(R"re(^\s*#\s*include\s*([<"])([^>"]+)[>"].*)re");
  std::smatch match;
  if (!std::regex_match(line, match, include)) return check_code(file, line);
  return match[1] == "<" ? check_system_include(file, match[2])
                         : check_project_include(root, file, match[2]);
}

void check_sources(const fs::path& root, std::vector<std::string>& violations) {
  for (const std::string& file : files_below(root, is_source)) {
    for_each_line(root / file, [&](int number, const std::string& line) {
      const std::string problem = check_line(root, file, line);
      if (!problem.empty()) violations.push_back(fmt::format("{}:{}: {}", file, number, problem));
    });
  }
}

const Folder* folder_of_target(const std::string& target) {
  for (const Folder& folder : folders()) {
    if (!folder.target.empty() && folder.target == target) return &folder;
  }
  return nullptr;
}

/// The text of a CMake file without comments.
std::string cmake_text(const fs::path& file) {
  std::string text;
  for_each_line(
      file, [&](int, const std::string& line) { text += line.substr(0, line.find('#')) + "\n"; });
  return text;
}

void check_targets(const fs::path& root, std::vector<std::string>& violations) {
  static const std::regex declaration(
      R"((arcus_library\s*\(\s*|add_library\s*\(\s*arcus_)([a-z_]+))");
  static const std::regex target_name(R"(\barcus_[a-z_]+\b)");
  for (const Folder& folder : folders()) {
    const fs::path file = root / folder.path / "CMakeLists.txt";
    if (folder.target.empty() || !fs::exists(file)) continue;
    const std::string name = folder.path + "/CMakeLists.txt";
    const std::string text = cmake_text(file);
    std::smatch match;
    if (!std::regex_search(text, match, declaration)) {
      violations.push_back(fmt::format("{}: makes no library {}", name, folder.target));
    } else if ("arcus_" + match[2].str() != folder.target) {
      violations.push_back(fmt::format("{}: the library is called arcus_{}, not {}", name,
                                       match[2].str(), folder.target));
    }
    for (std::sregex_iterator it(text.begin(), text.end(), target_name), end; it != end; ++it) {
      const Folder* linked = folder_of_target(it->str());
      if (linked != nullptr && !may_include(folder, *linked)) {
        violations.push_back(
            fmt::format("{}: {} must not link {}", name, folder.target, linked->target));
      }
    }
  }
}

}  // namespace

const std::vector<Folder>& folders() {
  static const std::vector<Folder> table = {
      {"src/base", "arcus_base", {}},
      {"kernels", "arcus_kernels", {"src/base"}},
      {"comm", "arcus_comm", {"src/base", "kernels"}},
      {"src/data", "arcus_data", {"src/base"}},
      {"src/model", "arcus_model", {"src/base", "kernels", "comm"}},
      {"src/train", "arcus_train", {"src/base", "src/data", "kernels", "comm", "src/model"}},
      {"checkpoints", "arcus_checkpoints", {"src/base", "kernels", "comm"}},
      {"checkpoints/interop",
       "arcus_interop",
       {"src/base", "src/data", "kernels", "comm", "src/model", "checkpoints"}},
      {"launch",
       "arcus_launch",
       {"src/base", "src/data", "kernels", "comm", "src/model", "src/train", "checkpoints",
        "checkpoints/interop"}},
      {"tests", "", {}}};
  return table;
}

std::vector<std::string> find_violations(const fs::path& root) {
  std::vector<std::string> violations;
  check_sources(root, violations);
  check_targets(root, violations);
  return violations;
}

}  // namespace arcus::structure
