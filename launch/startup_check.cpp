// Refuses to run on a processor without the instructions that the rest of the binary was compiled
// for, before any of that code runs. This file is compiled for the oldest processor of the
// architecture; isa_features.inc is generated from the compiler's own macros for ARCUS_ARCH.
#include <unistd.h>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int kExitUsage = 64;

// Plain system calls: the C++ library's objects may not be constructed yet.
void print(const char* text) {
  if (write(STDERR_FILENO, text, std::strlen(text)) < 0) _exit(kExitUsage);
}

[[noreturn]] void refuse(const char* feature) {
  print("arcus: error: this binary was compiled for a processor with ");
  print(feature);
  print(
      ", which this one lacks; build it on this machine, or anywhere with "
      "cmake -DARCUS_ARCH=x86-64-v2 (or -v3, -v4), the level that every node supports\n");
  _exit(kExitUsage);
}

// Priority 101 is the first that is open to programs: ahead of every static initialiser.
__attribute__((constructor(101))) void check_processor() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#define ARCUS_ISA_FEATURE(name) \
  if (!__builtin_cpu_supports(name)) refuse(name);
#include "isa_features.inc"
#undef ARCUS_ISA_FEATURE
#endif
}

}  // namespace
