#pragma once

#include <string>

namespace arcus {

/// Library version and instruction set that matrix products use at run time, e.g.
/// "oneDNN 2.6.3 avx512_core_amx". Ranks that differ in it may compute different bits.
std::string backend_description();

}  // namespace arcus
