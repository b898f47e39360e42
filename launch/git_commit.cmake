cmake_minimum_required(VERSION 3.25)
# Writes OUTPUT, a header with the commit of SOURCE_DIR, at every build; the file keeps its time when
# the commit is the same, so that nothing is compiled again.
find_package(Git QUIET)
set(commit "unknown")
if(GIT_EXECUTABLE AND EXISTS ${SOURCE_DIR}/.git)
  # No optional locks: a build must not touch the work tree's index.
  execute_process(COMMAND ${GIT_EXECUTABLE} --no-optional-locks describe --always --dirty --abbrev=12
                  WORKING_DIRECTORY ${SOURCE_DIR} OUTPUT_VARIABLE described RESULT_VARIABLE result
                  OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  if(result EQUAL 0 AND described)
    set(commit ${described})
  endif()
endif()
file(CONFIGURE OUTPUT ${OUTPUT} @ONLY CONTENT
     "#pragma once\n\nnamespace arcus {\ninline constexpr const char* kGitCommit = \"@commit@\";\n}  // namespace arcus\n")
