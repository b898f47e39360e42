#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace arcus::structure {

/// A folder of the tree, its CMake target and the folders that it may include besides itself.
struct Folder {
  std::string path;
  std::string target;  ///< "" where the folder makes no library
  std::vector<std::string> may_include;
};
const std::vector<Folder>& folders();

/// Broken rules of the tree below `root`, one sentence each ("FILE:LINE: ..."), in file order:
///  - project headers are included by their path from the root, along the arrows of folders();
///  - headers of MPI, NCCL, CUDA, oneDNN and HDF5 stay in the files that wrap them;
///  - only kernels/ and tests/ include a backend's headers (kernels/cpu, kernels/cuda) or name its
///    instances (cpu::, cuda::);
///  - nobody asks the wall clock;
///  - every folder makes the library named in folders(), linked along the arrows too.
std::vector<std::string> find_violations(const std::filesystem::path& root);

}  // namespace arcus::structure
