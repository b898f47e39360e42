# Writes OUTPUT with one ARCUS_ISA_FEATURE("name") for every instruction set extension that the
# compiler may use on its own for -march=${ARCUS_ARCH}; startup_check.cpp asks the processor for each.
function(arcus_write_isa_features output)
  set(features sse3 ssse3 sse4.1 sse4.2 popcnt fma bmi bmi2 avx avx2 avx512f avx512cd avx512bw
      avx512dq avx512vl avx512ifma avx512vbmi avx512vbmi2 avx512vnni avx512bitalg avx512vpopcntdq
      avx512bf16)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    list(APPEND features lzcnt movbe f16c avxvnni avx512fp16)
  endif()
  execute_process(COMMAND ${CMAKE_CXX_COMPILER} -march=${ARCUS_ARCH} -dM -E -x c++ /dev/null
                  OUTPUT_VARIABLE macros RESULT_VARIABLE result ERROR_VARIABLE message)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "The compiler does not know -march=${ARCUS_ARCH} (ARCUS_ARCH); use native "
                        "or a level such as x86-64-v3.\n${message}")
  endif()
  set(content "")
  foreach(feature IN LISTS features)
    string(TOUPPER "${feature}" macro)
    string(REPLACE "." "_" macro "${macro}")
    if(macros MATCHES "#define __${macro}__ ")
      string(APPEND content "ARCUS_ISA_FEATURE(\"${feature}\")\n")
    endif()
  endforeach()
  file(CONFIGURE OUTPUT ${output} CONTENT "${content}")
endfunction()
