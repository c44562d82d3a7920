# Finds what the library and its own programs need. Each failure names the way out.

# Eigen is the only dependency of the library. A parent project may bring its own target.
macro(chela_require_eigen)
  if(NOT TARGET Eigen3::Eigen)
    find_package(Eigen3 QUIET NO_MODULE)
    if(NOT TARGET Eigen3::Eigen)
      message(FATAL_ERROR "chela needs Eigen 3.4 or later and found none. "
        "Run cmake/bootstrap.sh, or set Eigen3_DIR to the folder that holds Eigen3Config.cmake.")
    elseif(Eigen3_VERSION VERSION_LESS 3.4)
      message(FATAL_ERROR "chela needs Eigen 3.4 or later and found ${Eigen3_VERSION} in ${Eigen3_DIR}.")
    endif()
  endif()
endmacro()

# A package that only our own tests, benchmarks or examples use.
macro(chela_require_tool package purpose)
  find_package(${package} CONFIG QUIET)
  if(NOT ${package}_FOUND)
    message(FATAL_ERROR "The ${purpose} of chela need ${package}. Run cmake/bootstrap.sh to install it, "
      "or configure without them: -DCHELA_BUILD_TESTS=OFF -DCHELA_BUILD_BENCHMARKS=OFF -DCHELA_BUILD_EXAMPLES=OFF.")
  endif()
endmacro()
