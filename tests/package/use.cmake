# Configures, builds and runs the outside project of this folder.
#
#   cmake -DFROM=install|subdirectory|fetch -DSOURCE=<chela> -DBUILD=<chela's build folder> -DSCRATCH=<folder>
#         -DGENERATOR=... -DCXX=... -DEIGEN_DIR=... -P use.cmake
set(options -G ${GENERATOR} -DCMAKE_CXX_COMPILER=${CXX} -DEigen3_DIR=${EIGEN_DIR})

function(run)
  execute_process(COMMAND ${ARGV} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(result)
    list(JOIN ARGV " " command)
    message(FATAL_ERROR "${command}\nended with ${result}:\n${output}")
  endif()
endfunction()

file(REMOVE_RECURSE ${SCRATCH})
if(FROM STREQUAL "install")
  run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${SCRATCH}/prefix)
  list(APPEND options -DCMAKE_PREFIX_PATH=${SCRATCH}/prefix)
endif()
run(${CMAKE_COMMAND} -S ${CMAKE_CURRENT_LIST_DIR} -B ${SCRATCH}/build ${options}
  -DCHELA_FROM=${FROM} -DCHELA_SOURCE=${SOURCE})
run(${CMAKE_COMMAND} --build ${SCRATCH}/build)
run(${SCRATCH}/build/outside)

if(FROM STREQUAL "install")
  file(WRITE ${SCRATCH}/fortran/CMakeLists.txt
    "cmake_minimum_required(VERSION 3.25)\nproject(fortran LANGUAGES CXX)\nfind_package(chela CONFIG REQUIRED COMPONENTS fortran)\n")
  execute_process(COMMAND ${CMAKE_COMMAND} -S ${SCRATCH}/fortran -B ${SCRATCH}/fortran/build ${options}
    RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT result OR NOT output MATCHES "no component 'fortran'")
    message(FATAL_ERROR "a component that is not installed should be refused by name:\n${output}")
  endif()
endif()
