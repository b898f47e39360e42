// Preloaded into a program, it befalls those of its calls that change files:
//
//   ARCUS_FAULT_PATH     only files whose path holds this text
//   ARCUS_FAULT_RANK     only the rank of this number (Open MPI's)
//   ARCUS_FAULT_CALL     n: SIGKILL at the n-th such call, a write half done
//   ARCUS_FAULT_ALL      set: its launcher and all other ranks are killed with it
//   ARCUS_FAULT_ERRNO    with ARCUS_FAULT_CALL: from the n-th call on all fail with this number
//   ARCUS_FAULT_DELAY_US every call, or those from the n-th on, take so much longer
//   ARCUS_FAULT_COUNT    file to which the number of calls is written at the end

#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>

namespace {

long number(const char* name) {
  const char* text = std::getenv(name);
  return text == nullptr ? -1 : std::atol(text);
}

struct Plan {
  const char* path = std::getenv("ARCUS_FAULT_PATH");
  bool here = number("ARCUS_FAULT_RANK") < 0 ||
              number("ARCUS_FAULT_RANK") == number("OMPI_COMM_WORLD_RANK");
  bool all = std::getenv("ARCUS_FAULT_ALL") != nullptr;
  long call = number("ARCUS_FAULT_CALL");
  long error = number("ARCUS_FAULT_ERRNO");
  long delay_us = number("ARCUS_FAULT_DELAY_US");
  std::atomic<long> calls{0};
};

Plan& plan() {
  static Plan* the = new Plan;  // calls come until the very end of the process
  return *the;
}

__attribute__((destructor)) void write_count() {
  const char* file = std::getenv("ARCUS_FAULT_COUNT");
  if (file != nullptr && plan().here) std::ofstream(file) << plan().calls << "\n";
}

/// The launcher's children, then the launcher, then this process.
[[noreturn]] void die() {
  if (plan().all) {
    const std::string launcher = std::to_string(getppid());
    std::ifstream children("/proc/" + launcher + "/task/" + launcher + "/children");
    for (pid_t child; children >> child;) {
      if (child != getpid()) kill(child, SIGKILL);
    }
    kill(getppid(), SIGKILL);
  }
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

enum class Fate { go_on, fail, killed };

Fate fate_of(const char* path) {
  Plan& p = plan();
  if (!p.here || p.path == nullptr || path == nullptr || std::strstr(path, p.path) == nullptr) {
    return Fate::go_on;
  }
  const long call = ++p.calls;
  if (call < p.call) return Fate::go_on;
  if (p.delay_us > 0) usleep(static_cast<useconds_t>(p.delay_us));
  if (p.call < 0 || p.delay_us > 0) return Fate::go_on;
  if (p.error >= 0) {
    errno = static_cast<int>(p.error);
    return Fate::fail;
  }
  return Fate::killed;
}

Fate fate_of(int descriptor) {
  char name[64];
  char path[4096];
  std::snprintf(name, sizeof name, "/proc/self/fd/%d", descriptor);
  const ssize_t length = readlink(name, path, sizeof path - 1);
  if (length <= 0) return Fate::go_on;
  path[length] = '\0';
  return fate_of(path);
}

template <class Function>
Function next(Function, const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

bool changes(int flags) { return (flags & (O_CREAT | O_TRUNC)) != 0; }

}  // namespace

#define NEXT(name) \
  static const auto next_##name = next(static_cast<decltype(&::name)>(nullptr), #name)

/// `call` unless the fate of `what` forbids it.
#define BEFALL(what, call) \
  switch (fate_of(what)) { \
    case Fate::fail:       \
      return -1;           \
    case Fate::killed:     \
      die();               \
    case Fate::go_on:      \
      break;               \
  }                        \
  return call

/// Half of it is done where the process is killed.
#define BEFALL_WRITE(descriptor, half, whole) \
  switch (fate_of(descriptor)) {              \
    case Fate::fail:                          \
      return -1;                              \
    case Fate::killed:                        \
      (void)!(half);                          \
      die();                                  \
    case Fate::go_on:                         \
      break;                                  \
  }                                           \
  return whole

extern "C" {

#define OPEN(name)                                  \
  int name(const char* path, int flags, ...) {      \
    NEXT(name);                                     \
    mode_t mode = 0;                                \
    if (changes(flags)) {                           \
      va_list rest;                                 \
      va_start(rest, flags);                        \
      mode = va_arg(rest, mode_t);                  \
      va_end(rest);                                 \
      BEFALL(path, next_##name(path, flags, mode)); \
    }                                               \
    return next_##name(path, flags, mode);          \
  }
OPEN(open)
OPEN(open64)

ssize_t write(int descriptor, const void* data, size_t size) {
  NEXT(write);
  BEFALL_WRITE(descriptor, next_write(descriptor, data, size / 2),
               next_write(descriptor, data, size));
}
ssize_t pwrite(int descriptor, const void* data, size_t size, off_t at) {
  NEXT(pwrite);
  BEFALL_WRITE(descriptor, next_pwrite(descriptor, data, size / 2, at),
               next_pwrite(descriptor, data, size, at));
}
ssize_t pwrite64(int descriptor, const void* data, size_t size, off64_t at) {
  NEXT(pwrite64);
  BEFALL_WRITE(descriptor, next_pwrite64(descriptor, data, size / 2, at),
               next_pwrite64(descriptor, data, size, at));
}
int ftruncate(int descriptor, off_t size) noexcept {
  NEXT(ftruncate);
  BEFALL(descriptor, next_ftruncate(descriptor, size));
}
int ftruncate64(int descriptor, off64_t size) noexcept {
  NEXT(ftruncate64);
  BEFALL(descriptor, next_ftruncate64(descriptor, size));
}
int fsync(int descriptor) {
  NEXT(fsync);
  BEFALL(descriptor, next_fsync(descriptor));
}
int rename(const char* from, const char* to) noexcept {
  NEXT(rename);
  BEFALL(from, next_rename(from, to));
}
int renameat2(int from_dir, const char* from, int to_dir, const char* to, unsigned flags) noexcept {
  NEXT(renameat2);
  BEFALL(from, next_renameat2(from_dir, from, to_dir, to, flags));
}
int mkdir(const char* path, mode_t mode) noexcept {
  NEXT(mkdir);
  BEFALL(path, next_mkdir(path, mode));
}
int remove(const char* path) noexcept {
  NEXT(remove);
  BEFALL(path, next_remove(path));
}
int unlink(const char* path) noexcept {
  NEXT(unlink);
  BEFALL(path, next_unlink(path));
}
int unlinkat(int folder, const char* name, int flags) noexcept {
  NEXT(unlinkat);
  if (folder == AT_FDCWD || name[0] == '/') {
    BEFALL(name, next_unlinkat(folder, name, flags));
  }
  BEFALL(folder, next_unlinkat(folder, name, flags));
}

}  // extern "C"
