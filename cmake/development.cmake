# How our own tests, benchmarks and examples are compiled. Nothing here reaches those who use the library.

set(CMAKE_CXX_EXTENSIONS OFF)

if(PROJECT_IS_TOP_LEVEL AND NOT DEFINED CMAKE_CXX_COMPILER_LAUNCHER)
  find_program(CHELA_CCACHE ccache)
  mark_as_advanced(CHELA_CCACHE)
  if(CHELA_CCACHE)
    set(CMAKE_CXX_COMPILER_LAUNCHER "${CHELA_CCACHE}")
  endif()
endif()

find_package(OpenMP COMPONENTS CXX QUIET)

# Eigen and the other imported targets count as system headers, so the warnings are about our code only.
add_library(chela_development INTERFACE)
target_link_libraries(chela_development INTERFACE chela::chela $<TARGET_NAME_IF_EXISTS:OpenMP::OpenMP_CXX>)
# GCC 12 warns about its own AVX-512 intrinsics ("__Y is used uninitialized"), in every file that uses them, and about its own
# string concatenation ("may overlap", GCC bug 105651).
target_compile_options(chela_development INTERFACE -Wall -Wextra -Wpedantic
  $<$<AND:$<CXX_COMPILER_ID:GNU>,$<VERSION_LESS:$<CXX_COMPILER_VERSION>,13>>:-Wno-uninitialized -Wno-maybe-uninitialized -Wno-restrict>
  $<$<BOOL:${CHELA_WARNINGS_AS_ERRORS}>:-Werror>)

# chela_add_test(<name> <source>... [LABELS <label>...]) adds the doctest program test_<name> and the CTest test <name>.
function(chela_add_test name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "LABELS")
  add_executable(test_${name} ${arg_UNPARSED_ARGUMENTS})
  target_include_directories(test_${name} PRIVATE ${PROJECT_SOURCE_DIR}/tests)
  target_link_libraries(test_${name} PRIVATE chela_test_main)
  add_test(NAME ${name} COMMAND test_${name})
  set_tests_properties(${name} PROPERTIES LABELS "${arg_LABELS}")
endfunction()

# chela_add_bench(<op> <source>...) adds the Google Benchmark program bench_<op>_cpu. Eigen may use its own threads here: a
# comparison with its threaded product is wanted.
function(chela_add_bench op)
  add_executable(bench_${op}_cpu ${ARGN})
  target_include_directories(bench_${op}_cpu PRIVATE ${PROJECT_SOURCE_DIR}/bench ${PROJECT_SOURCE_DIR}/tests)
  target_link_libraries(bench_${op}_cpu PRIVATE chela_development benchmark::benchmark benchmark::benchmark_main)
endfunction()

# chela_add_example(<name> <source>... [TEST <argument>...]) adds the program <name>. With TEST, CTest runs it with these
# arguments as example_<name>.
function(chela_add_example name)
  set(run_as_test FALSE)
  if("TEST" IN_LIST ARGN)
    set(run_as_test TRUE)
  endif()
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "TEST")
  add_executable(${name} ${arg_UNPARSED_ARGUMENTS})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}/examples)
  target_compile_definitions(${name} PRIVATE EIGEN_DONT_PARALLELIZE)
  target_link_libraries(${name} PRIVATE chela_development CLI11::CLI11 nlohmann_json::nlohmann_json)
  if(run_as_test)
    add_test(NAME example_${name} COMMAND ${name} ${arg_TEST})
    set_tests_properties(example_${name} PROPERTIES LABELS cpu)
  endif()
endfunction()

# The CUDA programs: no Eigen, and architectures from CMAKE_CUDA_ARCHITECTURES (the preset cuda-release names those that the
# kernels are tuned for).
if(CHELA_ENABLE_CUDA)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80 90a)
  endif()
  set(CMAKE_CUDA_EXTENSIONS ON)  # nvcc's own default: CMake adds no flag of its own to the -std=c++20 of chela::cuda
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  add_library(chela_cuda_development INTERFACE)
  target_link_libraries(chela_cuda_development INTERFACE chela::cuda)
  # Of the host compiler's warnings, those that nvcc's own code is free of.
  target_compile_options(chela_cuda_development INTERFACE -Xcompiler=-Wall,-Wextra
    $<$<BOOL:${CHELA_WARNINGS_AS_ERRORS}>:SHELL:-Werror all-warnings>)

  # Builds every CUDA program and nothing else.
  add_custom_target(cuda_programs)

  # Benchmarks, examples, and tests that repeat others in half precision have kernels that the other tests have as well: fewer
  # architectures for them spare time where programs are only to be compiled.
  set(CHELA_CUDA_REPEATED_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}" CACHE STRING
    "GPUs that programs are compiled for whose kernels others have")

  # Convolutions that several programs call (tests/conv/compiled_once.cuh).
  foreach(element IN ITEMS bf16 fp16)
    set(directory ${PROJECT_SOURCE_DIR}/tests/conv/compiled)
    add_library(chela_cuda_compiled_${element} STATIC EXCLUDE_FROM_ALL
      ${directory}/long_${element}.cu ${directory}/short_long_${element}.cu)
    target_include_directories(chela_cuda_compiled_${element} PRIVATE ${PROJECT_SOURCE_DIR}/tests)
    target_link_libraries(chela_cuda_compiled_${element} PRIVATE chela_cuda_development)
  endforeach()
  set_target_properties(chela_cuda_compiled_fp16 PROPERTIES CUDA_ARCHITECTURES "${CHELA_CUDA_REPEATED_ARCHITECTURES}")

  # chela_add_cuda_test(<name> <source>...) adds the program test_<name> and the CTest test <name>, skipped without a device.
  function(chela_add_cuda_test name)
    add_executable(test_${name} ${ARGN})
    target_include_directories(test_${name} PRIVATE ${PROJECT_SOURCE_DIR}/tests)
    target_link_libraries(test_${name} PRIVATE chela_cuda_test_main)
    if(name MATCHES "_half$")
      set_target_properties(test_${name} PROPERTIES CUDA_ARCHITECTURES "${CHELA_CUDA_REPEATED_ARCHITECTURES}")
    endif()
    add_test(NAME ${name} COMMAND test_${name})
    set_tests_properties(${name} PROPERTIES LABELS cuda SKIP_RETURN_CODE 77)
    add_dependencies(cuda_programs test_${name})
  endfunction()

  # chela_add_cuda_bench(<op> <source>...) adds the Google Benchmark program bench_<op>_cuda.
  function(chela_add_cuda_bench op)
    add_executable(bench_${op}_cuda ${ARGN})
    target_include_directories(bench_${op}_cuda PRIVATE ${PROJECT_SOURCE_DIR}/bench ${PROJECT_SOURCE_DIR}/tests)
    target_link_libraries(bench_${op}_cuda PRIVATE chela_cuda_development benchmark::benchmark)
    set_target_properties(bench_${op}_cuda PROPERTIES CUDA_ARCHITECTURES "${CHELA_CUDA_REPEATED_ARCHITECTURES}")
    add_dependencies(cuda_programs bench_${op}_cuda)
  endfunction()

  # chela_add_cuda_example(<name> <source>... [TEST <argument>...]) likewise adds the program <name>.
  function(chela_add_cuda_example name)
    cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "TEST")
    add_executable(${name} ${arg_UNPARSED_ARGUMENTS})
    target_link_libraries(${name} PRIVATE chela_cuda_development)
    set_target_properties(${name} PROPERTIES CUDA_ARCHITECTURES "${CHELA_CUDA_REPEATED_ARCHITECTURES}")
    add_test(NAME example_${name} COMMAND ${name} ${arg_TEST})
    set_tests_properties(example_${name} PROPERTIES LABELS cuda SKIP_RETURN_CODE 77)
    add_dependencies(cuda_programs ${name})
  endfunction()
endif()
