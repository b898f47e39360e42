#pragma once

#include <string>

namespace arcus {

/// What computes matrix products in this process. Ranks that differ in it may compute different
/// bits.
struct Backend {
  std::string library;           ///< with its version, e.g. "oneDNN 2.6.3"
  std::string isa;               ///< used at run time, as the library spells it: "avx512_core_amx"
  std::string instruction_sets;  ///< the same for people: "AVX-512 with BF16 and AMX"
};
/// The processor's, unless the library was told to use less of it (ONEDNN_MAX_CPU_ISA).
Backend backend();

/// Library and isa, e.g. "oneDNN 2.6.3 avx512_core_amx".
std::string backend_description();

}  // namespace arcus
