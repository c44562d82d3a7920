# Processor seconds that the compiler takes for one file, against a limit.
#
#   cmake -DCXX=... -DFLAGS=... -DINCLUDE=... -DEIGEN=... -DSOURCE=... -DOBJECT=... -DLIMIT=<seconds> -P measure.cmake
separate_arguments(FLAGS)

# The shell's `times` ends with the user and system time of what it ran, as 0m4.71s 0m0.30s. Unlike the time on the wall it
# does not depend on what else the machine does.
execute_process(
  COMMAND sh -c "\"$@\" && times" measure
    ${CXX} ${FLAGS} -std=c++20 -O2 -I${INCLUDE} -isystem ${EIGEN} -c ${SOURCE} -o ${OBJECT}
  RESULT_VARIABLE result OUTPUT_VARIABLE times)
if(result)
  message(FATAL_ERROR "${SOURCE} does not compile")
endif()
if(NOT times MATCHES "([0-9]+)m([0-9]+)[.,]?[0-9]*s ([0-9]+)m([0-9]+)[.,]?[0-9]*s[ \n]*$")
  message(FATAL_ERROR "no times in: ${times}")
endif()
math(EXPR seconds "60 * (${CMAKE_MATCH_1} + ${CMAKE_MATCH_3}) + ${CMAKE_MATCH_2} + ${CMAKE_MATCH_4}")  # whole seconds, each rounded down
message("one file with chela.hpp and one operator: ${seconds} s at -O2 (limit ${LIMIT} s)")
if(NOT seconds LESS LIMIT)
  message(FATAL_ERROR "too slow to compile")
endif()
