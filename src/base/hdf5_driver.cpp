#include "src/base/hdf5_driver.hpp"

#include <fcntl.h>
#include <hdf5.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iterator>
#include <new>

#if H5_VERSION_GE(1, 13, 0)
#include <H5FDdevelop.h>
#endif

namespace arcus::h5 {
namespace {

constexpr haddr_t kMaxAddress = (haddr_t{1} << 62) - 1;
/// Linux moves at most 2 GiB - 4 KiB at a time.
constexpr std::size_t kMaxTransfer = std::size_t{1} << 30;

/// Driver information that travels in the property list; the driver copies it bytewise, so it
/// points at the owner's shared_ptr, which lives through H5Fcreate and H5Fopen.
struct AccessInfo {
  const std::shared_ptr<WriteStatus>* status;
};

/// An open file as the library sees it; `pub` comes first because the library casts.
struct DriverFile {
  H5FD_t pub{};
  int fd = -1;
  haddr_t eoa = 0;
  haddr_t eof = 0;
  dev_t device = 0;
  ino_t inode = 0;
  std::shared_ptr<WriteStatus> status;

  void note_error() const {
    if (status->error == 0) status->error = errno;
  }
};

DriverFile& self(H5FD_t* file) { return *reinterpret_cast<DriverFile*>(file); }
const DriverFile& self(const H5FD_t* file) { return *reinterpret_cast<const DriverFile*>(file); }

int open_flags(unsigned flags) {
  int result = O_CLOEXEC | ((flags & H5F_ACC_RDWR) != 0 ? O_RDWR : O_RDONLY);
  if ((flags & H5F_ACC_CREAT) != 0) result |= O_CREAT;
  if ((flags & H5F_ACC_TRUNC) != 0) result |= O_TRUNC;
  if ((flags & H5F_ACC_EXCL) != 0) result |= O_EXCL;
  return result;
}

H5FD_t* open_file(const char* name, unsigned flags, hid_t access, haddr_t) {
  const auto* info = static_cast<const AccessInfo*>(H5Pget_driver_info(access));
  if (info == nullptr) return nullptr;
  const std::shared_ptr<WriteStatus>& status = *info->status;
  const int fd = ::open(name, open_flags(flags), 0666);
  struct stat found {};
  if (fd < 0 || ::fstat(fd, &found) != 0) {
    status->error = errno;
    if (fd >= 0) ::close(fd);
    return nullptr;
  }
  auto* file = new (std::nothrow) DriverFile;
  if (file == nullptr) {
    ::close(fd);
    return nullptr;
  }
  // The library first tries to open a file that it is about to create; that failure is none.
  status->error = 0;
  file->fd = fd;
  file->eof = static_cast<haddr_t>(found.st_size);
  file->device = found.st_dev;
  file->inode = found.st_ino;
  file->status = status;
  return &file->pub;
}

herr_t close_file(H5FD_t* file) {
  if (::close(self(file).fd) != 0) self(file).note_error();
  delete &self(file);
  return 0;
}

/// Tells the library whether two open files are one.
int compare(const H5FD_t* left, const H5FD_t* right) {
  const DriverFile& a = self(left);
  const DriverFile& b = self(right);
  if (a.device != b.device) return a.device < b.device ? -1 : 1;
  if (a.inode != b.inode) return a.inode < b.inode ? -1 : 1;
  return 0;
}

herr_t query(const H5FD_t*, unsigned long* flags) {
  *flags = H5FD_FEAT_AGGREGATE_METADATA | H5FD_FEAT_ACCUMULATE_METADATA | H5FD_FEAT_DATA_SIEVE |
           H5FD_FEAT_AGGREGATE_SMALLDATA;
  return 0;
}

haddr_t get_eoa(const H5FD_t* file, H5FD_mem_t) { return self(file).eoa; }
herr_t set_eoa(H5FD_t* file, H5FD_mem_t, haddr_t address) {
  self(file).eoa = address;
  return 0;
}
haddr_t get_eof(const H5FD_t* file, H5FD_mem_t) { return self(file).eof; }

herr_t read(H5FD_t* file, H5FD_mem_t, hid_t, haddr_t address, std::size_t size, void* buffer) {
  auto* out = static_cast<char*>(buffer);
  while (size > 0) {
    const ssize_t got =
        ::pread(self(file).fd, out, std::min(size, kMaxTransfer), static_cast<off_t>(address));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return -1;
    if (got == 0) {  // beyond the end of the file all is zero
      std::memset(out, 0, size);
      return 0;
    }
    out += got;
    address += static_cast<haddr_t>(got);
    size -= static_cast<std::size_t>(got);
  }
  return 0;
}

herr_t write(H5FD_t* file, H5FD_mem_t, hid_t, haddr_t address, std::size_t size,
             const void* buffer) {
  DriverFile& target = self(file);
  target.eof = std::max(target.eof, address + size);
  const auto* in = static_cast<const char*>(buffer);
  while (size > 0 && target.status->error == 0) {
    const ssize_t put =
        ::pwrite(target.fd, in, std::min(size, kMaxTransfer), static_cast<off_t>(address));
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) {
      target.note_error();
      break;
    }
    in += put;
    address += static_cast<haddr_t>(put);
    size -= static_cast<std::size_t>(put);
  }
  return 0;
}

herr_t truncate(H5FD_t* file, hid_t, hbool_t) {
  DriverFile& target = self(file);
  if (target.eoa == target.eof) return 0;
  if (target.status->error == 0 && ::ftruncate(target.fd, static_cast<off_t>(target.eoa)) != 0) {
    target.note_error();
  }
  target.eof = target.eoa;
  return 0;
}

hid_t register_driver() {
  H5FD_class_t driver{};
#if H5_VERSION_GE(1, 13, 0)
  driver.version = H5FD_CLASS_VERSION;
  driver.value = static_cast<H5FD_class_value_t>(400);  // of the range for drivers of applications
#endif
  driver.name = "arcus_write";
  driver.maxaddr = kMaxAddress;
  driver.fc_degree = H5F_CLOSE_WEAK;
  driver.fapl_size = sizeof(AccessInfo);
  driver.open = open_file;
  driver.close = close_file;
  driver.cmp = compare;
  driver.query = query;
  driver.get_eoa = get_eoa;
  driver.set_eoa = set_eoa;
  driver.get_eof = get_eof;
  driver.read = read;
  driver.write = write;
  driver.truncate = truncate;
  const H5FD_mem_t types[] = H5FD_FLMAP_DICHOTOMY;
  std::copy(std::begin(types), std::end(types), driver.fl_map);
  return H5FDregister(&driver);
}

}  // namespace

std::int64_t make_write_access(const std::shared_ptr<WriteStatus>& status) {
  static const hid_t driver = register_driver();
  const hid_t access = H5Pcreate(H5P_FILE_ACCESS);
  if (driver < 0 || access < 0) return -1;
  const AccessInfo info{&status};
  if (H5Pset_driver(access, driver, &info) < 0) {
    H5Pclose(access);
    return -1;
  }
  return access;
}

}  // namespace arcus::h5
