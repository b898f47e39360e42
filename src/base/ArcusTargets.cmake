# How a folder of Arcus becomes a library, and the packages it may use.
find_package(Threads REQUIRED)
find_package(OpenMP REQUIRED COMPONENTS CXX)
find_package(MPI REQUIRED COMPONENTS CXX)
# oneDNN's own package file asks for OpenCL, which only its GPU side needs: look for the library.
find_path(DNNL_INCLUDE_DIR dnnl.h)
find_library(DNNL_LIBRARY dnnl)
if(NOT DNNL_INCLUDE_DIR OR NOT DNNL_LIBRARY)
  message(FATAL_ERROR "oneDNN (dnnl.h, libdnnl) was not found: install libdnnl-dev, or add its "
                      "prefix to CMAKE_PREFIX_PATH")
endif()
add_library(DNNL::dnnl UNKNOWN IMPORTED)
set_target_properties(DNNL::dnnl PROPERTIES IMPORTED_LOCATION ${DNNL_LIBRARY}
                      INTERFACE_INCLUDE_DIRECTORIES ${DNNL_INCLUDE_DIR})
find_package(fmt REQUIRED)
find_package(spdlog REQUIRED)
find_package(nlohmann_json REQUIRED)
find_package(tomlplusplus REQUIRED)
find_package(CLI11 REQUIRED)
find_package(PkgConfig REQUIRED)
# The serial library: thread-safe, which the one built for MPI is not.
pkg_check_modules(HDF5 REQUIRED IMPORTED_TARGET hdf5-serial)
pkg_check_modules(HWLOC REQUIRED IMPORTED_TARGET hwloc)
pkg_check_modules(SENTENCEPIECE REQUIRED IMPORTED_TARGET sentencepiece)
# The regular expressions and the normalisation of other programs' tokenizers.
pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8)
pkg_check_modules(UTF8PROC REQUIRED IMPORTED_TARGET libutf8proc)
pkg_check_modules(XXHASH REQUIRED IMPORTED_TARGET libxxhash)

add_library(arcus_flags INTERFACE)
target_include_directories(arcus_flags INTERFACE ${CMAKE_SOURCE_DIR})
# Bits: an element's value must not depend on its place in an array, so products and sums are fused
# only where the source says so.
target_compile_options(arcus_flags INTERFACE
  -march=${ARCUS_ARCH} -mprefer-vector-width=512 -ffp-contract=off -fno-math-errno
  -Wall -Wextra -Wpedantic -Wshadow -Wno-missing-field-initializers -Wno-psabi)
if(ARCUS_WARNINGS_AS_ERRORS)
  target_compile_options(arcus_flags INTERFACE -Werror)
endif()
foreach(sanitizer IN LISTS ARCUS_SANITIZE)
  target_compile_options(arcus_flags INTERFACE -fsanitize=${sanitizer} -fno-omit-frame-pointer)
  target_link_options(arcus_flags INTERFACE -fsanitize=${sanitizer})
endforeach()

# arcus_library(NAME [PUBLIC lib...] [PRIVATE lib...]): all *.cpp of this folder as arcus_NAME.
function(arcus_library name)
  cmake_parse_arguments(ARG "" "" "PUBLIC;PRIVATE;SUBDIRS" ${ARGN})
  file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/*.cpp)
  foreach(sub IN LISTS ARG_SUBDIRS)
    file(GLOB more CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/${sub}/*.cpp)
    list(APPEND sources ${more})
  endforeach()
  if(sources)
    add_library(arcus_${name} STATIC ${sources})
    target_link_libraries(arcus_${name} PUBLIC arcus_flags ${ARG_PUBLIC} PRIVATE ${ARG_PRIVATE})
  else()
    add_library(arcus_${name} INTERFACE)
    target_link_libraries(arcus_${name} INTERFACE arcus_flags ${ARG_PUBLIC} ${ARG_PRIVATE})
  endif()
endfunction()
