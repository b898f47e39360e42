#pragma once

#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace arcus {

/// Exit codes of the `arcus` binary; scripts may rely on them.
enum class ExitCode : int {
  ok = 0,
  usage = 64,        ///< command line or configuration
  data = 65,         ///< training text, token files, tokenizers
  checkpoint = 66,   ///< a checkpoint is missing, damaged or does not fit
  comm = 69,         ///< communication failed or a rank is lost
  internal = 70,     ///< a broken invariant: a defect of Arcus
  interrupted = 75,  ///< stopped by a signal, everything saved
};

/// The one exception of Arcus. `what()` is the message for the user; the source location is kept
/// apart because only defects of Arcus profit from showing it. Line 0: there is none to show.
class Error : public std::runtime_error {
 public:
  Error(ExitCode code, const std::string& message, std::string file, int line)
      : std::runtime_error(message), code_(code), file_(std::move(file)), line_(line) {}

  ExitCode code() const { return code_; }
  const std::string& file() const { return file_; }
  int line() const { return line_; }
  /// The message, and for a defect of Arcus where it was found.
  std::string report() const;

 private:
  ExitCode code_;
  std::string file_;
  int line_;
};

/// Any exception as an Error: out of memory, errors of the system (files, output) and unexpected
/// ones get a message and a code of their own.
Error as_error(const std::exception& exception);

}  // namespace arcus

/// Throws arcus::Error with a formatted message: what, where, the values and the remedy.
#define ARCUS_FAIL(exit_code, ...) \
  throw ::arcus::Error((exit_code), ::fmt::format(__VA_ARGS__), __FILE__, __LINE__)

/// Checks what a user or the outside world may get wrong; always on.
#define ARCUS_REQUIRE(condition, exit_code, ...)            \
  do {                                                      \
    if (!(condition)) ARCUS_FAIL((exit_code), __VA_ARGS__); \
  } while (false)

/// Checks an invariant of Arcus itself; always on, exit code 70.
#define ARCUS_CHECK(condition, ...) \
  ARCUS_REQUIRE(condition, ::arcus::ExitCode::internal, __VA_ARGS__)

/// Like ARCUS_CHECK, in debug builds only: for checks inside inner loops.
#ifdef NDEBUG
#define ARCUS_DCHECK(condition, ...) \
  do {                               \
  } while (false)
#else
#define ARCUS_DCHECK(condition, ...) ARCUS_CHECK(condition, __VA_ARGS__)
#endif
