#pragma once

#include <cstdint>
#include <memory>

namespace arcus::h5 {

/// What went wrong first while a file was written: an errno value, 0 = nothing.
struct WriteStatus {
  int error = 0;
};

/// A file-access property list (hid_t, owned by the caller) whose driver keeps write failures from
/// the HDF5 library and notes them in `status`. HDF5 1.10 ends the process with a segmentation
/// fault when flushing or closing a file fails, as on a full disk; with this driver the library
/// believes that all went well and the owner of the file looks at `status`. Files written under a
/// failed status are garbage. -1 when the property list cannot be made.
std::int64_t make_write_access(const std::shared_ptr<WriteStatus>& status);

}  // namespace arcus::h5
