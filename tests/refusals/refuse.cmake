# A source that must not compile, with the message of its first line (`// expect: <regular expression>`), and that must compile
# once WITHIN_LIMITS is defined, so that nothing but the limit under test stands in its way.
#
#   cmake -DCXX=... -DFLAGS=... -DINCLUDE=... -DEIGEN=... -DSOURCE=... -P refuse.cmake
separate_arguments(FLAGS)
file(STRINGS ${SOURCE} expected LIMIT_COUNT 1)
string(REGEX REPLACE "^// expect: " "" expected "${expected}")
set(compile ${CXX} ${FLAGS} -std=c++20 -O0 -fsyntax-only -I${INCLUDE} -isystem ${EIGEN})

execute_process(COMMAND ${compile} -DWITHIN_LIMITS ${SOURCE}
  RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
if(result)
  message(FATAL_ERROR "does not compile within the limits either:\n${output}")
endif()

execute_process(COMMAND ${compile} ${SOURCE}
  RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
if(NOT result)
  message(FATAL_ERROR "compiles, and should be refused with: ${expected}")
elseif(NOT output MATCHES "${expected}")
  message(FATAL_ERROR "is refused, but not with: ${expected}\n${output}")
endif()
