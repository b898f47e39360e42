#pragma once

#include <sys/wait.h>

#include <array>
#include <cstdio>
#include <string>

namespace arcus {

struct ShellResult {
  int code = -1;    ///< exit code; -1 when a signal ended the command
  std::string out;  ///< standard output and error together
};

/// Runs a command line through the shell.
inline ShellResult shell(const std::string& command) {
  ShellResult result;
  std::FILE* pipe = popen(("( " + command + " ) 2>&1").c_str(), "r");
  if (pipe == nullptr) return result;
  std::array<char, 4096> buffer;
  while (const std::size_t n = std::fread(buffer.data(), 1, buffer.size(), pipe)) {
    result.out.append(buffer.data(), n);
  }
  const int status = pclose(pipe);
  if (WIFEXITED(status)) result.code = WEXITSTATUS(status);
  return result;
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace arcus
