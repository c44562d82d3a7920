# Each public header is reached from chela.hpp or reference.hpp.
#
#   cmake -DCXX=... -DFLAGS=... -DINCLUDE=... -DEIGEN=... -P reachable.cmake
separate_arguments(FLAGS)
execute_process(
  COMMAND ${CXX} ${FLAGS} -std=c++20 -MM -I${INCLUDE} -isystem ${EIGEN} ${INCLUDE}/chela/chela.hpp ${INCLUDE}/chela/reference.hpp
  RESULT_VARIABLE result OUTPUT_VARIABLE reached)
if(result)
  message(FATAL_ERROR "chela.hpp and reference.hpp do not preprocess")
endif()

file(GLOB_RECURSE headers RELATIVE ${INCLUDE} ${INCLUDE}/*.hpp)
set(missing)
foreach(header IN LISTS headers)
  string(FIND "${reached}" "${INCLUDE}/${header}" position)
  if(position EQUAL -1)
    list(APPEND missing ${header})
  endif()
endforeach()
if(missing)
  list(JOIN missing "\n  " missing)
  message(FATAL_ERROR "neither chela.hpp nor reference.hpp includes:\n  ${missing}")
endif()
