# Each CUDA header is reached from chela.cuh, which reaches no Eigen.
#
#   cmake -DNVCC=... -DINCLUDE=... -P reachable_cuda.cmake
execute_process(
  COMMAND ${NVCC} -std=c++20 -M -I${INCLUDE} -x cu ${INCLUDE}/chela/chela.cuh
  RESULT_VARIABLE result OUTPUT_VARIABLE reached)
if(result)
  message(FATAL_ERROR "chela.cuh does not preprocess")
endif()
if(reached MATCHES "Eigen/")
  message(FATAL_ERROR "chela.cuh reaches Eigen")
endif()

file(GLOB_RECURSE headers RELATIVE ${INCLUDE} ${INCLUDE}/*.cuh)
foreach(header IN LISTS headers)
  string(FIND "${reached}" "${header}" position)
  if(position EQUAL -1)
    message(FATAL_ERROR "chela.cuh does not include ${header}")
  endif()
endforeach()
