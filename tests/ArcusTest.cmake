# arcus_test(AREA.NAME SOURCES file... [LIBS lib...] [RANKS n...] [LABELS label...] [TIMEOUT s])
#
# One executable test_AREA_NAME. Without RANKS it runs once, alone; with RANKS it runs under mpirun
# as AREA.NAME.npN for each N. Labels: unit | mpi | gpu | slow | ...; unit or mpi is added.
set(ARCUS_MPIRUN_FLAGS --oversubscribe --bind-to none -q)
execute_process(COMMAND id -u OUTPUT_VARIABLE ARCUS_UID OUTPUT_STRIP_TRAILING_WHITESPACE)
if(ARCUS_UID EQUAL 0)
  list(APPEND ARCUS_MPIRUN_FLAGS --allow-run-as-root)
endif()

# arcus_soak(AREA.NAME VARIABLE=VALUE FILTER): the test again, label slow, longer by a variable of
# the environment that it reads.
function(arcus_soak name variable filter)
  string(REPLACE "." "_" target test_${name})
  add_test(NAME ${name}_soak COMMAND ${target} --gtest_filter=${filter})
  set_tests_properties(${name}_soak PROPERTIES TIMEOUT 3600 PROCESSORS 2 LABELS slow
    ENVIRONMENT "${variable};OMP_NUM_THREADS=1;OMP_WAIT_POLICY=passive;OMPI_MCA_mpi_yield_when_idle=1")
endfunction()

function(arcus_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SOURCES;LIBS;RANKS;LABELS;ARGS" ${ARGN})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 120)
  endif()
  if(ARCUS_SANITIZE)  # several times slower
    math(EXPR ARG_TIMEOUT "${ARG_TIMEOUT} * 5")
  endif()
  string(REPLACE "." "_" target test_${name})
  add_executable(${target} ${ARG_SOURCES})
  target_link_libraries(${target} PRIVATE ${ARG_LIBS} arcus_flags)
  set(environment OMP_NUM_THREADS=1;OMP_WAIT_POLICY=passive;OMPI_MCA_mpi_yield_when_idle=1;OMPI_MCA_btl_base_warn_component_unused=0)
  if(ARG_RANKS)
    target_link_libraries(${target} PRIVATE arcus_test_mpi_main)
    foreach(ranks IN LISTS ARG_RANKS)
      add_test(NAME ${name}.np${ranks}
               COMMAND ${MPIEXEC_EXECUTABLE} ${ARCUS_MPIRUN_FLAGS} -np ${ranks}
                       $<TARGET_FILE:${target}> ${ARG_ARGS})
      set_tests_properties(${name}.np${ranks} PROPERTIES TIMEOUT ${ARG_TIMEOUT} PROCESSORS 2
                           LABELS "mpi;${ARG_LABELS}" ENVIRONMENT "${environment}")
    endforeach()
  else()
    target_link_libraries(${target} PRIVATE GTest::gtest_main)
    add_test(NAME ${name} COMMAND ${target} ${ARG_ARGS})
    set_tests_properties(${name} PROPERTIES TIMEOUT ${ARG_TIMEOUT} PROCESSORS 1
                         LABELS "unit;${ARG_LABELS}" ENVIRONMENT "${environment}")
  endif()
endfunction()
