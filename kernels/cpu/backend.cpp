#include "kernels/backend.hpp"

#include <fmt/format.h>
#include <oneapi/dnnl/dnnl.h>

namespace arcus {
namespace {

struct IsaRow {
  dnnl_cpu_isa_t isa;
  const char* name;
  const char* instruction_sets;
};
constexpr IsaRow kIsas[] = {
    {dnnl_cpu_isa_sse41, "sse41", "SSE4.1"},
    {dnnl_cpu_isa_avx, "avx", "AVX"},
    {dnnl_cpu_isa_avx2, "avx2", "AVX2"},
    {dnnl_cpu_isa_avx2_vnni, "avx2_vnni", "AVX2 with VNNI"},
    {dnnl_cpu_isa_avx512_mic, "avx512_mic", "AVX-512"},
    {dnnl_cpu_isa_avx512_mic_4ops, "avx512_mic_4ops", "AVX-512"},
    {dnnl_cpu_isa_avx512_core, "avx512_core", "AVX-512"},
    {dnnl_cpu_isa_avx512_core_vnni, "avx512_core_vnni", "AVX-512 with VNNI"},
    {dnnl_cpu_isa_avx512_core_bf16, "avx512_core_bf16", "AVX-512 with BF16"},
    {dnnl_cpu_isa_avx512_core_amx, "avx512_core_amx", "AVX-512 with BF16 and AMX"}};

}  // namespace

Backend backend() {
  const dnnl_version_t* version = dnnl_version();
  Backend backend{
      .library = fmt::format("oneDNN {}.{}.{}", version->major, version->minor, version->patch),
      .isa = "other",
      .instruction_sets = "unknown"};
  for (const IsaRow& row : kIsas) {
    if (row.isa != dnnl_get_effective_cpu_isa()) continue;
    backend.isa = row.name;
    backend.instruction_sets = row.instruction_sets;
  }
  return backend;
}

std::string backend_description() {
  const Backend now = backend();
  return now.library + " " + now.isa;
}

}  // namespace arcus
