# Tests that run the compiler or CMake instead of a program of ours. All are labelled `package`.

set(compiler -DCXX=${CMAKE_CXX_COMPILER} "-DFLAGS=${CMAKE_CXX_FLAGS}" -DINCLUDE=${PROJECT_SOURCE_DIR}/include
  -DEIGEN=$<TARGET_PROPERTY:Eigen3::Eigen,INTERFACE_INCLUDE_DIRECTORIES>)

# chela_add_script_test(<name> <script> <argument>...) runs a CMake script.
function(chela_add_script_test name script)
  add_test(NAME ${name} COMMAND ${CMAKE_COMMAND} ${ARGN} -P ${CMAKE_CURRENT_SOURCE_DIR}/${script})
  set_tests_properties(${name} PROPERTIES LABELS package)
endfunction()

chela_add_script_test(headers_alone headers/alone.cmake ${compiler} -DSCRATCH=${CMAKE_CURRENT_BINARY_DIR}/headers)
chela_add_script_test(headers_reachable headers/reachable.cmake ${compiler})

add_executable(test_headers_link headers/first_file.cpp headers/second_file.cpp)
target_link_libraries(test_headers_link PRIVATE chela_development)
add_test(NAME headers_link COMMAND test_headers_link)
set_tests_properties(headers_link PROPERTIES LABELS package)

file(GLOB refusals CONFIGURE_DEPENDS refusals/*.cpp)
foreach(source IN LISTS refusals)
  cmake_path(GET source STEM name)
  chela_add_script_test(refuses_${name} refusals/refuse.cmake ${compiler} -DSOURCE=${source})
endforeach()

chela_add_script_test(compile_time compile_time/measure.cmake ${compiler}
  -DSOURCE=${CMAKE_CURRENT_SOURCE_DIR}/compile_time/one_operator.cpp
  -DOBJECT=${CMAKE_CURRENT_BINARY_DIR}/one_operator.o -DLIMIT=10)
set_tests_properties(compile_time PROPERTIES RUN_SERIAL TRUE)

foreach(way install subdirectory fetch)
  if(CHELA_INSTALL OR NOT way STREQUAL "install")
    chela_add_script_test(package_${way} package/use.cmake -DFROM=${way} -DSOURCE=${PROJECT_SOURCE_DIR}
      -DBUILD=${PROJECT_BINARY_DIR} -DSCRATCH=${CMAKE_CURRENT_BINARY_DIR}/package_${way}
      -DGENERATOR=${CMAKE_GENERATOR} -DCXX=${CMAKE_CXX_COMPILER} -DEIGEN_DIR=${Eigen3_DIR})
  endif()
endforeach()

if(CHELA_ENABLE_CUDA)
  chela_add_script_test(headers_cuda_reachable headers/reachable_cuda.cmake -DNVCC=${CMAKE_CUDA_COMPILER}
    -DINCLUDE=${PROJECT_SOURCE_DIR}/include)
endif()
