# Each public header compiles in a file of its own, without warnings, without OpenMP, and without what its layer must not see:
# contracts and references get no Eigen, references include nothing but core/ and each other.
#
#   cmake -DCXX=... -DFLAGS=... -DINCLUDE=... -DEIGEN=... -DSCRATCH=... -P alone.cmake
separate_arguments(FLAGS)
file(GLOB_RECURSE headers RELATIVE ${INCLUDE} ${INCLUDE}/*.hpp)
file(MAKE_DIRECTORY ${SCRATCH})
set(failures 0)

foreach(header IN LISTS headers)
  set(visible)
  if(header MATCHES "^chela/(cpu/|chela.hpp)")
    set(visible -isystem ${EIGEN})
  endif()
  file(WRITE ${SCRATCH}/alone.cpp "#include \"${header}\"\n")
  execute_process(
    COMMAND ${CXX} ${FLAGS} -std=c++20 -O0 -fsyntax-only -Wall -Wextra -Wpedantic -Werror -I${INCLUDE} ${visible}
      ${SCRATCH}/alone.cpp
    RESULT_VARIABLE result ERROR_VARIABLE errors OUTPUT_VARIABLE errors)
  if(result)
    math(EXPR failures "${failures} + 1")
    message("${header} does not compile alone:\n${errors}")
  endif()

  if(header MATCHES "^chela/reference/")
    file(STRINGS ${INCLUDE}/${header} strangers REGEX "#include \"")
    list(FILTER strangers EXCLUDE REGEX "\"chela/(core|reference)/")
    if(strangers)
      math(EXPR failures "${failures} + 1")
      message("${header} may include core/ only, and has: ${strangers}")
    endif()
  endif()
endforeach()

list(LENGTH headers count)
if(failures)
  message(FATAL_ERROR "${failures} of ${count} headers failed")
endif()
message("${count} headers compile alone")
