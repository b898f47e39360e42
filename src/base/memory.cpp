#include "src/base/memory.hpp"

#include <algorithm>
#include <fstream>
#include <limits>
#include <string>

namespace arcus {
namespace {

namespace fs = std::filesystem;

constexpr std::int64_t kUnknown = std::numeric_limits<std::int64_t>::max();

/// The number behind "name:" in a file of lines such as "VmRSS:   123 kB", in bytes; 0 = not there.
std::int64_t field(const fs::path& file, const std::string& name) {
  std::ifstream in(file);
  for (std::string word; in >> word;) {
    std::int64_t kilobytes = 0;
    if (word == name + ":" && in >> kilobytes) return kilobytes * 1024;
  }
  return 0;
}

/// A number that stands alone in a file; kUnknown where it is not there or says "max".
std::int64_t number(const fs::path& file) {
  std::ifstream in(file);
  std::int64_t value = 0;
  return in >> value ? value : kUnknown;
}

/// Where a version of control groups keeps its numbers.
struct GroupFiles {
  const char* top;
  const char* limit;
  const char* usage;
  const char* inactive;  ///< page cache in memory.stat, of the groups inside too
  const char* active;
};
constexpr GroupFiles kVersion2{"sys/fs/cgroup", "memory.max", "memory.current", "inactive_file",
                               "active_file"};
constexpr GroupFiles kVersion1{"sys/fs/cgroup/memory", "memory.limit_in_bytes",
                               "memory.usage_in_bytes", "total_inactive_file", "total_active_file"};

/// What is left of a control group's limit. Page cache counts as used there but is given back.
std::int64_t left_in_group(const fs::path& dir, const GroupFiles& files) {
  const std::int64_t limit = number(dir / files.limit);
  const std::int64_t usage = number(dir / files.usage);
  if (limit == kUnknown || usage == kUnknown) return kUnknown;
  std::ifstream stat(dir / "memory.stat");
  std::int64_t cache = 0;
  std::string name;
  for (std::int64_t value = 0; stat >> name >> value;) {
    if (name == files.inactive || name == files.active) cache += value;
  }
  return std::max<std::int64_t>(0, limit - std::max<std::int64_t>(0, usage - cache));
}

/// The least that this process's control group (a line of /proc/self/cgroup: ID:CONTROLLERS:PATH)
/// and those around it leave.
std::int64_t left_in_groups(const fs::path& root, const std::string& line) {
  const std::size_t first = line.find(':');
  const std::size_t second = line.find(':', first + 1);
  if (second == std::string::npos) return kUnknown;
  const bool v2 = second == first + 1;
  const bool v1 = line.substr(first, second - first).find("memory") != std::string::npos;
  if (!v1 && !v2) return kUnknown;
  const GroupFiles& files = v1 ? kVersion1 : kVersion2;
  fs::path group = fs::path(line.substr(second + 1)).relative_path();
  std::int64_t left = kUnknown;
  while (true) {
    left = std::min(left, left_in_group(root / files.top / group, files));
    if (group.empty()) return left;
    group = group.parent_path();
  }
}

}  // namespace

std::int64_t available_memory(const fs::path& root) {
  const std::int64_t machine = field(root / "proc/meminfo", "MemAvailable");
  std::int64_t left = machine > 0 ? machine : kUnknown;
  std::ifstream groups(root / "proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    left = std::min(left, left_in_groups(root, line));
  }
  return left == kUnknown ? 0 : left;
}

std::int64_t resident_memory() { return field("/proc/self/status", "VmRSS"); }
std::int64_t peak_memory() { return field("/proc/self/status", "VmHWM"); }
void reset_peak_memory() { std::ofstream("/proc/self/clear_refs") << "5\n"; }

}  // namespace arcus
