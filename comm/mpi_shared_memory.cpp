#include "comm/mpi_shared_memory.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <random>

#include "comm/mpi_comm.hpp"

namespace arcus {
namespace {

/// What a rank tells the others so that they can map its part.
struct Offer {
  std::int64_t pid = 0;
  std::int64_t fd = -1;
  std::int64_t bytes = 0;
  std::int64_t mark = 0;  ///< stands at the start of the part while the others look at it
};

class FileHandle {
 public:
  explicit FileHandle(int fd) : fd_(fd) {}
  ~FileHandle() {
    if (fd_ >= 0) close(fd_);
  }
  FileHandle(const FileHandle&) = delete;
  FileHandle& operator=(const FileHandle&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

char* map(int fd, std::int64_t bytes) {
  void* memory = mmap(nullptr, static_cast<std::size_t>(bytes), PROT_READ | PROT_WRITE,
                      MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (memory == MAP_FAILED) return nullptr;
  // Fewer faults where the kernel gives shared memory large pages.
  madvise(memory, static_cast<std::size_t>(bytes), MADV_HUGEPAGE);
  return static_cast<char*>(memory);
}

/// The word at the start of a part, read and written by several processes.
std::atomic_ref<std::int64_t> mark_of(char* part) {
  return std::atomic_ref<std::int64_t>(*reinterpret_cast<std::int64_t*>(part));
}

/// Anonymous memory files: unlike those in /dev/shm they are bounded by the machine's memory alone.
/// Others open them through /proc, which the kernel allows to processes of the same user.
class ProcessMemory final : public SharedMemory {
 public:
  ProcessMemory(MPI_Comm comm, std::int64_t bytes) {
    int rank = 0;
    int size = 0;
    ARCUS_MPI(MPI_Comm_rank(comm, &rank));
    ARCUS_MPI(MPI_Comm_size(comm, &size));
    bytes_ = bytes;
    offers_.resize(static_cast<std::size_t>(size));
    parts_.assign(offers_.size(), nullptr);
    const FileHandle own(memfd_create("arcus rows", MFD_CLOEXEC));
    Offer& mine = offers_[static_cast<std::size_t>(rank)];
    mine = {getpid(), own.get(), bytes, static_cast<std::int64_t>(std::random_device()()) + 1};
    if (own.get() >= 0 && ftruncate(own.get(), bytes) == 0) {
      parts_[static_cast<std::size_t>(rank)] = map(own.get(), bytes);
    }
    if (char* part = parts_[static_cast<std::size_t>(rank)]; part != nullptr) {
      mark_of(part) = mine.mark;
    } else {
      mine.fd = -1;
    }
    ARCUS_MPI(MPI_Allgather(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, offers_.data(), sizeof(Offer),
                            MPI_BYTE, comm));
    int good = 1;
    for (int peer = 0; peer < size; ++peer) {
      if (!open_part(peer, peer == rank)) good = 0;
    }
    // Also the end of looking at marks, and of the need for the files.
    ARCUS_MPI(MPI_Allreduce(MPI_IN_PLACE, &good, 1, MPI_INT, MPI_MIN, comm));
    complete_ = good != 0;
    if (char* part = parts_[static_cast<std::size_t>(rank)]; part != nullptr) mark_of(part) = 0;
    ARCUS_MPI(MPI_Barrier(comm));
  }
  ~ProcessMemory() override {
    for (std::size_t r = 0; r < parts_.size(); ++r) {
      if (parts_[r] != nullptr) munmap(parts_[r], static_cast<std::size_t>(offers_[r].bytes));
    }
  }
  bool complete() const { return complete_; }

 private:
  bool open_part(int rank, bool own) {
    const Offer& offer = offers_[static_cast<std::size_t>(rank)];
    char*& part = parts_[static_cast<std::size_t>(rank)];
    if (own || offer.fd < 0) return part != nullptr;
    const std::string path = fmt::format("/proc/{}/fd/{}", offer.pid, offer.fd);
    const FileHandle file(open(path.c_str(), O_RDWR | O_CLOEXEC));
    if (file.get() < 0) return false;
    // In another process namespace the number means another process.
    if (lseek(file.get(), 0, SEEK_END) != offer.bytes) return false;
    part = map(file.get(), offer.bytes);
    return part != nullptr && mark_of(part) == offer.mark;
  }

  std::vector<Offer> offers_;
  bool complete_ = false;
};

}  // namespace

std::unique_ptr<SharedMemory> share_over_processes(MPI_Comm comm, std::int64_t bytes) {
  auto memory = std::make_unique<ProcessMemory>(comm, bytes);
  if (!memory->complete()) return nullptr;
  return memory;
}

}  // namespace arcus
